"""JsonlPrompts and ParquetPrompts: questions from files, and messages for a file that is neither."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dppo_lightning.base.errors import DataError, one_line, require
from dppo_lightning.prompts.base import PLACE, Framing
from dppo_lightning.prompts.rows import RowPrompts, RowReader, narrowed


class FilePrompts(RowPrompts):
    """Base of questions from a training file and maybe a held-out file; subclasses write ``rows``.

    A row has the question as text or as chat messages (each with "role" and "content"; the model answers the
    last one), maybe an answer (text or a number), and any other columns, which go to the rewards. A question that is
    held out is removed from training.

    Args:
        train: File of training questions.
        heldout: File of held-out questions; None leaves it to ``heldout_size``.
        heldout_size: Number of different questions that are drawn from the training file and held out where there is no
            held-out file, >= 0. A larger number holds out the same questions and more.
        seed: Seed of the draw of held-out questions, >= 0.
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
    """Questions from JSON lines: one object a line, UTF-8; blank lines are skipped. Arguments: as FilePrompts."""

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
    """Say what the whole file is, where that is not JSON lines."""
    what = what_it_is(part)
    return None if what is None or "JsonlPrompts" in what else f"{part}: {what}"


class ParquetPrompts(FilePrompts):
    """Questions from Parquet files, read batch by batch. Arguments: as FilePrompts."""

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
            why = getattr(error, "strerror", None) or one_line(error)
            what = what_it_is(part)
            raise DataError(f"{part}: cannot be read as Parquet: {f'it {what}' if what else why}") from error


MAGIC = {
    b"\x1f\x8b": "is compressed with gzip: unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd: unpack it first",
    b"BZh": "is compressed with bzip2: unpack it first",
    b"\xfd7zXZ": "is compressed with xz: unpack it first",
    b"PK\x03\x04": "is a zip archive: unpack it first",
    b"PAR1": "is Parquet: read it with ParquetPrompts",
    b"ARROW1": "is an Arrow file: load it with datasets and write it with to_parquet, for ParquetPrompts",
    b"\xff\xfe": "is UTF-16: write it as UTF-8",
    b"\xfe\xff": "is UTF-16: write it as UTF-8",
}
"""First bytes of a file -> what it is, and what to do."""


def what_it_is(path: str) -> str | None:
    """Say what a file or folder is, and what to do; None where that is not known, or it cannot be read."""
    folder = Path(path)
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return "is a folder of save_to_disk: load it with load_from_disk and write it with to_parquet"
    try:
        with open(path, "rb") as file:
            start = file.read(4096)
    except OSError:
        return None
    for magic, what in MAGIC.items():
        if start.startswith(magic):
            return what
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"["):
        return "is a JSON array: write one object a line"
    if text.startswith(b"{"):
        return "is JSON: JsonlPrompts reads it, one object a line"
    return None
