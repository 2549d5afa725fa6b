"""Rows of a table become examples: their questions, and their reference answers as text."""

from __future__ import annotations

import logging
import math
import reprlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

import numpy as np

from dppo_lightning.base.errors import ConfigError, DataError
from dppo_lightning.prompts.base import Example, Framing, PromptSets, PromptSource, distinct_places, without

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowReader:
    """Reader that turns one row into one Example.

    Args:
        prompt_column: Column of the question's text, which is framed.
        messages_column: Column of chat messages, which are taken as they are. A row has exactly one of the two.
        answer_column: Column of the reference answer, text or a number; may be missing.
        framing: Framing that makes a question a prompt.

    Raises:
        ConfigError: Two of the columns have the same name.
    """

    prompt_column: str = "prompt"
    messages_column: str = "messages"
    answer_column: str = "answer"
    framing: Framing = field(default_factory=Framing)

    def __post_init__(self) -> None:
        if len({self.prompt_column, self.messages_column, self.answer_column}) < 3:
            raise ConfigError("prompt_column, messages_column and answer_column must be three different names")

    def example(self, row: Any, where: str) -> Example:
        """Check a row and convert it, all but its answer; its other columns go to ``columns``.

        Args:
            row: Row as the table holds it.
            where: File and line of the row, for messages.

        Raises:
            DataError: The row cannot be used.
        """
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: must be an object with {self.prompt_column!r}, got {reprlib.repr(row)}")
        prompt, messages = row.get(self.prompt_column), row.get(self.messages_column)
        if (prompt is None) == (messages is None):
            both, link = ("both", "and") if prompt is not None else ("neither", "nor")
            raise DataError(
                f"{where}: has {both} {self.prompt_column!r} {link} {self.messages_column!r}, and must have one of "
                f"them; its columns are {', '.join(map(str, row))}"
            )
        used = (self.prompt_column, self.messages_column, self.answer_column)
        columns = {name: value for name, value in row.items() if name not in used}
        if messages is not None:
            return Example(
                messages=_messages(messages, f"{where}: {self.messages_column!r}"), columns=columns, where=where
            )
        example = self.framing.example(_text(prompt, f"{where}: {self.prompt_column!r}"), None, columns)
        return replace(example, where=where)

    def examples(self, rows: Iterable[tuple[str, Any]]) -> list[Example]:
        """Check and convert the rows of one table, each with its file and line.

        Raises:
            DataError: A row cannot be used.
        """
        examples, answers = [], []
        for where, row in rows:
            examples.append(self.example(row, where))
            answers.append(row.get(self.answer_column))
        texts = answer_texts(answers, [f"{example.where}: {self.answer_column!r}" for example in examples])
        return [replace(example, answer=text) for example, text in zip(examples, texts, strict=True)]


def _text(value: Any, where: str, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"{where} must be text, got {reprlib.repr(value)} (chat messages go into a column of their own)"
        )
    if not value.strip() and not may_be_empty:
        raise DataError(f"{where} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where} holds half a character (an unpaired surrogate): {reprlib.repr(value)}") from None
    return value


def _messages(value: Any, where: str) -> tuple[Mapping[str, str], ...]:
    if not isinstance(value, list | tuple) or not value:
        raise DataError(f"{where} must be a list of messages, got {reprlib.repr(value)}")
    messages = tuple(_message(message, f"{where}[{place}]") for place, message in enumerate(value))
    if messages[-1]["role"] in ("assistant", "system"):
        raise DataError(f"{where} must end with what the model answers, but its last role is {messages[-1]['role']!r}")
    if not messages[-1]["content"].strip():
        raise DataError(f"{where} ends with an empty message")
    return messages


def _message(value: Any, where: str) -> Mapping[str, str]:
    if not isinstance(value, Mapping):
        raise DataError(f"{where} must be an object with 'role' and 'content', got {reprlib.repr(value)}")
    # Tables with one schema for all messages fill what a message does not have with nulls.
    given = {str(name): part for name, part in value.items() if part is not None}
    for name in ("role", "content"):
        if name not in given:
            raise DataError(f"{where} has no {name!r}")
    return {name: _text(part, f"{where}[{name!r}]", may_be_empty=name != "role") for name, part in given.items()}


class RowPrompts(PromptSource):
    """Base of questions from a table with a training and maybe a held-out part; subclasses write ``rows``.

    Args:
        train: Name of the training part.
        heldout: Name of the held-out part; None leaves it to ``heldout_size``.
        heldout_size: Number of different questions that are drawn from the training part and held out where there is no
            held-out part, >= 0. A larger number holds out the same questions and more.
        seed: Seed of the draw of held-out questions, >= 0.
        reader: Reader that turns rows into examples.

    Raises:
        ConfigError: A number is negative, or both ``heldout`` and ``heldout_size`` are given.
    """

    def __init__(self, train: str, heldout: str | None, heldout_size: int, seed: int, reader: RowReader) -> None:
        for name, value in (("heldout_size", heldout_size), ("seed", seed)):
            if value < 0:
                raise ConfigError(f"{name} must be >= 0, got {value}")
        if heldout is not None and heldout_size > 0:
            raise ConfigError(f"held-out questions come from {heldout!r} already: leave heldout_size out")
        self.train = train
        self.heldout = heldout
        self.heldout_size = heldout_size
        self.seed = seed
        self.reader = reader

    @abstractmethod
    def rows(self, part: str) -> Iterator[tuple[str, Any]]:
        """Yield (file and line, row) of the part called ``part``."""

    def label(self, part: str) -> str:
        """Name of the part in messages."""
        return part

    def load(self) -> PromptSets:
        train = self._read(self.train)
        heldout = self._draw(train) if self.heldout is None else self._read(self.heldout)
        kept = without(train, heldout)
        removed = len(train) - len(kept)
        if not kept:
            raise DataError(f"nothing is left to train on: every question of {self.label(self.train)} is held out")
        if removed and self.heldout is not None:
            log.info(
                f"removed {removed} questions from {self.label(self.train)}: they are held out in "
                f"{self.label(self.heldout)}"
            )
        elif removed:
            log.info(f"held out {len(heldout)} questions of {self.label(self.train)}; {len(kept)} of its rows remain")
        return PromptSets(kept, heldout)

    def _read(self, part: str) -> list[Example]:
        examples = self.reader.examples(self.rows(part))
        if not examples:
            raise DataError(f"{self.label(part)}: holds no questions")
        return examples

    def _draw(self, train: list[Example]) -> list[Example]:
        if self.heldout_size == 0:
            return []
        places = distinct_places(train)
        if self.heldout_size >= len(places):
            raise DataError(
                f"{self.label(self.train)}: has {len(places)} different questions, so "
                f"heldout_size={self.heldout_size} leaves none to train on"
            )
        order = np.random.default_rng(self.seed).permutation(len(places))
        return [train[places[i]] for i in sorted(order[: self.heldout_size])]


# Tables turn whole numbers into one of these where a value is missing, or where their writer had no other kind.
Fractional = float | np.floating | Decimal


def answer_texts(values: Sequence[Any], places: Sequence[str]) -> list[str | None]:
    """Convert the answers of one column to text; a missing one (null, NaN) is None.

    Floats and decimals are written without a fraction when every one of the column is a whole number, else as Python
    writes them: 6.0 among whole numbers is "6", in a column with 6.5 it is "6.0".

    Args:
        values: Values of the column (text, numbers, null or NaN), in the order of the rows.
        places: File and line of each value, for messages.

    Raises:
        DataError: A value is neither text nor a finite number, or a whole number that a float cannot hold exactly.
    """
    numbers = [value for value in values if isinstance(value, Fractional) and not _missing(value)]
    whole = all(math.isfinite(value) and value == int(value) for value in numbers)
    return [_answer_text(value, whole, where) for value, where in zip(values, places, strict=True)]


def _answer_text(value: Any, whole: bool, where: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Fractional) and _missing(value):
        return None
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer | Fractional):
        raise DataError(f"{where} must be text or a finite number, got {reprlib.repr(value)}")
    if not math.isfinite(value):
        raise DataError(f"{where} must be text or a finite number, got {reprlib.repr(value)}")
    if isinstance(value, int | np.integer) or not whole:
        return str(value)
    if not isinstance(value, Decimal) and abs(float(value)) >= exact_below(value):
        raise DataError(
            f"{where} is {value}, and such a float has lost the last digits of a whole number from "
            f"{exact_below(value)} on: store the answers as integers or text"
        )
    return str(int(value))


def narrowed(row: Mapping[str, Any], column: str, kind: str | None) -> Mapping[str, Any]:
    """Convert a number of ``column`` to the narrow float that the table holds: 0.1, not 0.10000000149011612.

    Args:
        row: Row as the table's reader gives it, every float a double.
        column: Name of the column; the row may lack it.
        kind: Type of the column, as pyarrow and datasets call it ("float" and "float32" are the same).
    """
    narrow = {"halffloat": np.float16, "float16": np.float16, "float": np.float32, "float32": np.float32}.get(str(kind))
    if narrow is None or row.get(column) is None:
        return row
    return {**row, column: narrow(row[column])}


def exact_below(value: Any) -> int:
    """Bound below which the float's type holds every whole number exactly: 2^53 for a double."""
    return 2 ** (int(np.finfo(type(value)).nmant) + 1)


def _missing(value: float | np.floating | Decimal) -> bool:
    return value.is_nan() if isinstance(value, Decimal) else bool(np.isnan(value))
