"""PromptSource: where questions come from. Sources give raw examples; ``encode`` renders and tokenises them once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Example:
    """One raw question: plain ``prompt`` text or chat ``messages`` (exactly one of them), and what the rewards need.

    Attributes:
        prompt: Text given to the model as it is (or as the one user message, when a chat template is asked for).
        messages: Chat messages, each with "role" and "content"; always rendered by the tokenizer's chat template.
        answer: The reference answer, if any.
        columns: Any extra columns, passed on to rewards.
        where: File and line, or whatever finds it again, for messages.
    """

    prompt: str | None = None
    messages: tuple[Mapping[str, str], ...] | None = None
    answer: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class PromptSets:
    """Training and held-out questions; no question is in both."""

    train: Sequence[Example]
    heldout: Sequence[Example]


class PromptSource(ABC):
    """Subclass and write ``load``."""

    @abstractmethod
    def load(self) -> PromptSets:
        """Read or generate all questions. The same settings give the same questions in the same order.

        Raises:
            DataError: A file, a row or a task cannot be used.
        """
