"""HuggingFacePrompts, on local folders."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from dppo_lightning.base.errors import DataError
from dppo_lightning.prompts import HuggingFacePrompts, JsonlPrompts, ParquetPrompts


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of two splits, whose last test question is a training question too."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "data"
    data.mkdir()
    for split, places in (("train", range(6)), ("test", range(5, 9))):
        rows = [{"question": f"q{i}", "final": i, "level": i % 2} for i in places]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


def test_splits_and_columns_are_read_and_kept_apart(folder: Path) -> None:
    sets = HuggingFacePrompts(
        str(folder), heldout_split="test", prompt_column="question", answer_column="final", chat=True
    ).load()
    assert [(e.messages, e.answer, e.columns) for e in sets.train] == [
        (({"role": "user", "content": f"q{i}"},), str(i), {"level": i % 2}) for i in range(5)
    ]
    assert [e.answer for e in sets.heldout] == ["5", "6", "7", "8"]


def test_questions_are_held_out_of_the_training_split(folder: Path) -> None:
    sets = HuggingFacePrompts(str(folder), heldout_size=2, prompt_column="question").load()
    assert {e.prompt for e in sets.train} | {e.prompt for e in sets.heldout} == {f"q{i}" for i in range(6)}
    assert (len(sets.train), len(sets.heldout)) == (4, 2)


def test_what_is_wrong_is_named_with_data_set_split_and_row(folder: Path) -> None:
    with pytest.raises(DataError, match=r"data \(train\), row 1: has neither 'prompt'.*columns are question, final"):
        HuggingFacePrompts(str(folder)).load()
    with pytest.raises(DataError, match=r"data \(dev\): cannot be loaded: .*dev"):
        HuggingFacePrompts(str(folder), train_split="dev").load()
    with pytest.raises(DataError, match="BuilderConfig 'main' not found"):
        HuggingFacePrompts(str(folder), name="main").load()
    with pytest.raises(DataError, match=r"absent \(train\): cannot be loaded"):
        HuggingFacePrompts(str(folder / "absent")).load()


def test_a_folder_of_save_to_disk_is_named_as_what_it_is(folder: Path, tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"prompt": ["a", "b"]})
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "several")
    assert len(HuggingFacePrompts(str(tmp_path / "several")).load().train) == 2  # datasets reads a folder of splits
    for name, sources in (("one", (HuggingFacePrompts,)), ("several", ())):
        for source in (*sources, JsonlPrompts, ParquetPrompts):
            with pytest.raises(DataError, match=r"is a folder of save_to_disk: load it with load_from_disk and write"):
                source(str(tmp_path / name)).load()


def test_a_file_that_cannot_be_parsed_keeps_the_deeper_reason(folder: Path) -> None:
    (folder / "train.jsonl").write_text('{"question": "a"\n{"question": "b"}\n')
    with pytest.raises(DataError, match=r"data \(train\): cannot be loaded: .*JSON"):
        HuggingFacePrompts(str(folder)).load()
