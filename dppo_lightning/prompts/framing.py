"""Framing: how a question becomes what the model is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dppo_lightning.errors import ConfigError
from dppo_lightning.prompts.base import Example

PLACE = "{question}"


@dataclass(frozen=True)
class Framing:
    """Puts a question into its prompt.

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
        """The example that asks ``question``."""
        text = self.template.replace(PLACE, question)
        if not self.chat:
            return Example(prompt=text, answer=answer, columns=columns)
        system = () if self.system is None else ({"role": "system", "content": self.system},)
        return Example(messages=(*system, {"role": "user", "content": text}), answer=answer, columns=columns)
