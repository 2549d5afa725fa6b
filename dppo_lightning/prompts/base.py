"""PromptSource, a source of questions; framing of a question; equality of questions.

Sources give raw examples; ``encode`` renders and tokenises them once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dppo_lightning.base.errors import ConfigError


@dataclass(frozen=True)
class Example:
    """One raw question: ``prompt`` text or chat ``messages`` (exactly one of them), answer and columns for rewards.

    Attributes:
        prompt: Text given to the model as it is (or as the one user message, when a chat template is asked for).
        messages: Chat messages, each with "role" and "content"; always rendered by the tokenizer's chat template.
        answer: The reference answer, if any.
        columns: Any extra columns, passed on to rewards.
        where: File and line of the question, or another description of its place, for messages.
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
    """Base of the sources of questions; subclasses write ``load``."""

    @abstractmethod
    def load(self) -> PromptSets:
        """Read or generate all questions. The same settings give the same questions in the same order.

        Raises:
            DataError: A file, a row or a task cannot be used.
        """


def question_key(example: Example) -> Hashable:
    """Key that is equal for examples that ask the same; white space around, and chat or plain text, do not count."""
    if example.messages is None:
        return (("user", (example.prompt or "").strip()),)
    return tuple((message["role"], message["content"].strip()) for message in example.messages)


def distinct_places(examples: Iterable[Example]) -> list[int]:
    """Places of the examples whose question has not occurred before them."""
    seen: dict[Hashable, int] = {}
    for place, example in enumerate(examples):
        seen.setdefault(question_key(example), place)
    return list(seen.values())


def without(examples: Sequence[Example], heldout: Iterable[Example]) -> list[Example]:
    """Return the examples whose question is not among the held-out ones, in order."""
    taken = {question_key(example) for example in heldout}
    return [example for example in examples if question_key(example) not in taken] if taken else list(examples)


PLACE = "{question}"


@dataclass(frozen=True)
class Framing:
    """Text and chat around a question, which make it a prompt.

    Args:
        template: Text around the question; every ``{question}`` in it is replaced, other braces stay as they are.
        chat: Give the text as the user's message of a chat, not as a text to continue.
        system: System message of that chat, if any.

    Raises:
        ConfigError: The template has no ``{question}``, or there is a system message without a chat.
    """

    template: str = PLACE
    chat: bool = False
    system: str | None = None

    def __post_init__(self) -> None:
        if PLACE not in self.template:
            raise ConfigError(f"template must contain {PLACE}, got {self.template!r}")
        if self.system is not None and not self.chat:
            raise ConfigError("system is a chat message: set chat to true, or leave system out")

    def example(self, question: str, answer: str | None, columns: Mapping[str, Any]) -> Example:
        """Make the example that asks ``question``."""
        text = self.template.replace(PLACE, question)
        if not self.chat:
            return Example(prompt=text, answer=answer, columns=columns)
        system = () if self.system is None else ({"role": "system", "content": self.system},)
        return Example(messages=(*system, {"role": "user", "content": text}), answer=answer, columns=columns)
