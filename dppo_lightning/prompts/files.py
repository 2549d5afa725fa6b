"""JsonlPrompts and ParquetPrompts: questions from files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from dppo_lightning.errors import DataError, reason
from dppo_lightning.optional import require
from dppo_lightning.prompts.answers import narrowed
from dppo_lightning.prompts.file_kinds import what_it_is
from dppo_lightning.prompts.framing import PLACE, Framing
from dppo_lightning.prompts.rows import RowPrompts, RowReader


class FilePrompts(RowPrompts):
    """Questions from a training file and maybe a held-out file. Subclass and write ``rows``.

    A row has the question as text or as chat messages (each with "role" and "content", the last one what the model
    answers), maybe an answer (text or a number), and any other columns, which go to the rewards. A question that is
    held out is removed from training.

    Args:
        train: File of training questions.
        heldout: File of held-out questions; None: ``heldout_size`` decides.
        heldout_size: Without a held-out file, this many different questions are drawn from the training file and held
            out, >= 0. A larger number holds out the same questions and more.
        seed: Of that draw, >= 0.
        prompt_column: Column of the question's text.
        messages_column: Column of chat messages; a row has exactly one of the two.
        answer_column: Column of the reference answer.
        template: Text around the question, with ``{question}`` in it; rows with messages are taken as they are.
        chat: Give the text as the user's message of a chat.
        system: System message of that chat.

    Raises:
        ConfigError: A number is negative, or two settings do not fit together.
    """

    def __init__(
        self,
        train: str,
        heldout: str | None = None,
        heldout_size: int = 0,
        seed: int = 0,
        prompt_column: str = "prompt",
        messages_column: str = "messages",
        answer_column: str = "answer",
        template: str = PLACE,
        chat: bool = False,
        system: str | None = None,
    ) -> None:
        reader = RowReader(prompt_column, messages_column, answer_column, Framing(template, chat, system))
        super().__init__(train, heldout, heldout_size, seed, reader)


class JsonlPrompts(FilePrompts):
    """Questions from JSON lines: one object a line, UTF-8; blank lines are skipped. Arguments: see FilePrompts."""

    def rows(self, part: str) -> Iterator[tuple[str, Any]]:
        try:
            with open(part, "rb") as file:
                for number, line in enumerate(file, start=1):
                    if not line.isspace():
                        where = f"{part}, line {number}"
                        yield where, _parsed(line, where, part)
        except OSError as error:
            what = what_it_is(part) or f"cannot be read: {error.strerror or error}"
            raise DataError(f"{part}: {what}") from error


def _parsed(line: bytes, where: str, part: str) -> Any:
    try:
        row = json.loads(line.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        raise DataError(_other_kind(part) or f"{where}: is not UTF-8: {error.reason}") from error
    except json.JSONDecodeError as error:
        problem = f"{where}: is not JSON: {error.msg} at column {error.colno}"
        raise DataError(_other_kind(part) or problem) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not JSON that can be read: {error}") from error
    if isinstance(row, list) and (kind := _other_kind(part)):
        raise DataError(kind)
    return row


def _other_kind(part: str) -> str | None:
    """What the whole file is, where that is not JSON lines."""
    what = what_it_is(part)
    return None if what is None or "JsonlPrompts" in what else f"{part}: {what}"


class ParquetPrompts(FilePrompts):
    """Questions from Parquet files, read batch by batch. Arguments: see FilePrompts."""

    def rows(self, part: str) -> Iterator[tuple[str, Any]]:
        arrow, parquet = require("pyarrow"), require("pyarrow.parquet")
        number = 0
        try:
            with parquet.ParquetFile(part) as file:
                types = {field.name: str(field.type) for field in file.schema_arrow}
                answer = self.reader.answer_column
                for batch in file.iter_batches(batch_size=4096):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"{part}, row {number}", narrowed(row, answer, types.get(answer))
        except (OSError, arrow.ArrowException) as error:
            why = getattr(error, "strerror", None) or reason(error)
            what = what_it_is(part)
            raise DataError(f"{part}: cannot be read as Parquet: {f'it {what}' if what else why}") from error
