"""Chats as the model's template writes them; what a message says is text, never one of the template's own tokens.

A question that holds ``<|im_end|>`` would otherwise end its message, and what follows would be another role's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from dppo_lightning.base.errors import DataError
from dppo_lightning.base.special_tokens import Ids
from dppo_lightning.prompts.base import Example

Message = Mapping[str, str]

PRIVATE = range(0xF0000, 0xFFFFE)
"""Characters that have no meaning of their own (the supplementary private use area)."""


def render(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    """Write a chat as the tokenizer's template does, up to where the answer begins.

    Raises:
        DataError: There is no template, or it refuses the messages; names the prompt ``name``.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"prompt {name} is a chat, and the model's tokenizer has no chat template: use plain prompts (without chat "
            "or messages), or a model with a chat template"
        )
    try:
        given = [dict(message) for message in messages]
        return str(tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True))
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        said = " ".join(str(error).split())
        raise DataError(f"the model's chat template refuses prompt {name}: {said}") from error


class ControlTokens:
    """Tokens that a chat template writes and a message must not: the tokenizer's special tokens, and its own markup.

    Markup (``<think>`` of Qwen 3, say) is an added token that is not called special and that the template names. The
    messages of an assistant may hold it: templates look for it there.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        added = {str(token): (place, token.special) for place, token in tokenizer.added_tokens_decoder.items()}
        template = str(tokenizer.chat_template)
        self.special = {text: place for text, (place, special) in added.items() if special}
        self.all = self.special | {
            text: place for text, (place, _) in added.items() if text in template and not _is_words(text)
        }

    def of_role(self, role: str) -> Mapping[str, int]:
        """Tokens that a message of ``role`` must not hold, text -> id."""
        return self.special if role == "assistant" else self.all

    def holders(self, examples: Sequence[Example]) -> list[int]:
        """Places of the chats of which a message holds such a token."""
        said = [
            (place, text, message.get("role", ""))
            for place, example in enumerate(examples)
            for message in example.messages or ()
            for text in message.values()
            if text
        ]
        if not said or not self.all:
            return []
        rows = self.tokenizer([text for _, text, _ in said], add_special_tokens=False, verbose=False)["input_ids"]
        found = (
            place
            for (place, _, role), row in zip(said, rows, strict=True)
            if not set(self.of_role(role).values()).isdisjoint(row)
        )
        return list(dict.fromkeys(found))


def _is_words(text: str) -> bool:
    return all(character.isalnum() or character.isspace() for character in text)


class AsText:
    """Encoder of chats whose messages hold control tokens: those of the template are ids, those of messages are text.

    The template is given the messages with a mark inside each control token, so that it writes only its own unmarked.
    These are replaced by stand-ins, characters that occur in none of the chats, and a copy of the tokenizer reads the
    text: it knows the stand-ins, with the properties of the tokens that they stand for, and not the tokens. All else
    is encoded as the tokenizer itself would, in one piece.

    Args:
        control: Control tokens of the model's tokenizer.
        chats: All chats that are to be encoded.

    Raises:
        DataError: The tokenizer has no copy that reads its control tokens as text.
    """

    def __init__(self, control: ControlTokens, chats: Sequence[Sequence[Message]]) -> None:
        self.control = control
        taken = {character for chat in chats for message in chat for text in message.values() for character in text}
        free = (character for character in map(chr, PRIVATE) if character not in taken)
        self._mark = next(free)
        self._stand_ins = dict(zip(control.all, free, strict=False))
        self._own = _pattern(control.all)
        self._copy, self._ids = self._copied()

    def _copied(self) -> tuple[Tokenizer, dict[int, int]]:
        """Copy of the tokenizer, and what its ids of added tokens are in the original."""
        backend = getattr(self.control.tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise DataError(f"{self._refusal()}: remove them from the messages, or take a model with a fast tokenizer")
        state: dict[str, Any] = json.loads(backend.to_str())
        state["post_processor"] = state["truncation"] = state["padding"] = None
        originals = {}
        for token in state["added_tokens"]:
            token["content"] = self._stand_ins.get(token["content"], token["content"])
            originals[token["content"]] = token["id"]
        copy = Tokenizer.from_str(json.dumps(state))
        everything, words = copy.get_vocab(), set(copy.get_vocab(with_added_tokens=False).values())
        if any(everything[stand_in] in words for stand_in in self._stand_ins.values()):  # ids with gaps between them
            raise DataError(f"{self._refusal()}: remove them from the messages")
        return copy, {everything[text]: place for text, place in originals.items()}

    def _refusal(self) -> str:
        return "messages hold tokens of the chat template, and the model's tokenizer cannot read them as text"

    def marked(self, messages: Sequence[Message]) -> list[Message]:
        """Messages with a mark inside each control token."""
        patterns = [_pattern(self.control.of_role(message.get("role", ""))) for message in messages]
        return [
            {key: pattern.sub(self._with_mark, text) for key, text in message.items()}
            for pattern, message in zip(patterns, messages, strict=True)
        ]

    def _with_mark(self, found: re.Match[str]) -> str:
        return found[0][0] + self._mark + found[0][1:]

    def unmarked(self, text: str) -> str:
        """Text without the marks."""
        return text.replace(self._mark, "")

    def encode(self, text: str, name: str) -> Ids:
        """Encode a rendered chat with marks.

        Raises:
            DataError: The tokenizer's own words hold a control token, so that text cannot be told from it.
        """
        written = self.unmarked(self._own.sub(lambda found: self._stand_ins[found[0]], text))
        row = self._copy.encode(written, add_special_tokens=False).ids
        control = set(self.control.all.values())
        for place in row:
            if place in control and place not in self._ids:
                token = self.control.tokenizer.decode([place])
                raise DataError(f"prompt {name}: the model's tokenizer cannot read {token!r} as text: remove it")
        return tuple(self._ids.get(place, place) for place in row)


def _pattern(texts: Iterable[str]) -> re.Pattern[str]:
    """Pattern of any of the texts, the longest that fits first; without texts it matches nowhere."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
