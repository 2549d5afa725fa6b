"""HuggingFacePrompts: questions from a data set of the Hugging Face hub, or a local folder in its layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dppo_lightning.base.errors import DataError, one_line, require
from dppo_lightning.prompts.base import PLACE, Framing
from dppo_lightning.prompts.files import what_it_is
from dppo_lightning.prompts.rows import RowPrompts, RowReader, narrowed


class HuggingFacePrompts(RowPrompts):
    """Questions from a Hugging Face data set; rows are checked and split as those of files are.

    Args:
        path: Name on the hub, or a local folder of JSONL, CSV or Parquet files.
        name: Configuration of the data set, such as "main".
        train_split: Split of the training questions, such as "train" or "train[:1000]".
        heldout_split: Split of the held-out questions; None leaves it to ``heldout_size``.
        heldout_size: Number of different questions that are drawn from the training split and held out where there is
            no held-out split, >= 0. A larger number holds out the same questions and more.
        seed: Seed of the draw of held-out questions, >= 0.
        prompt_column: Column of the question's text.
        messages_column: Column of chat messages; a row has exactly one of the two.
        answer_column: Column of the reference answer.
        template: Text around the question, with ``{question}`` in it; rows with messages are taken as they are.
        chat: Give the text as the user's message of a chat.
        system: System message of that chat.
        revision: Commit or tag on the hub; None for the newest, which may change between runs.

    Raises:
        ConfigError: A number is negative, or two settings do not fit together.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        train_split: str = "train",
        heldout_split: str | None = None,
        heldout_size: int = 0,
        seed: int = 0,
        prompt_column: str = "prompt",
        messages_column: str = "messages",
        answer_column: str = "answer",
        template: str = PLACE,
        chat: bool = False,
        system: str | None = None,
        revision: str | None = None,
    ) -> None:
        reader = RowReader(prompt_column, messages_column, answer_column, Framing(template, chat, system))
        super().__init__(train_split, heldout_split, heldout_size, seed, reader)
        self.path = path
        self.name = name
        self.revision = revision

    def label(self, part: str) -> str:
        return f"{self.path} ({part})"

    def rows(self, part: str) -> Iterator[tuple[str, Any]]:
        datasets = require("datasets")
        try:
            table = datasets.load_dataset(self.path, self.name, split=part, revision=self.revision)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            what = what_it_is(self.path)
            raise DataError(f"{self.label(part)}: {what or f'cannot be loaded: {one_line(error)}'}") from error
        answer = self.reader.answer_column
        kind = getattr((table.features or {}).get(answer), "dtype", None)
        for number, row in enumerate(table, start=1):
            yield f"{self.label(part)}, row {number}", narrowed(row, answer, kind)
