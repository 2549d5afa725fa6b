"""Numbers of a table as answers: what is whole stays whole, what is missing is missing, no digit is lost."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dppo_lightning.base.errors import DataError
from dppo_lightning.prompts import HuggingFacePrompts, JsonlPrompts, ParquetPrompts
from dppo_lightning.prompts.rows import answer_texts


def texts(*values: Any) -> list[str | None]:
    return answer_texts(values, [f"row {place}" for place in range(len(values))])


@given(st.lists(st.none() | st.integers(-(2**53) + 1, 2**53 - 1), min_size=1))
def test_integers_that_a_gap_made_floats_are_integers_again(values: list[int | None]) -> None:
    floats = [math.nan if value is None else float(value) for value in values]
    assert texts(*floats) == [None if value is None else str(value) for value in values]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ((6.0, None, 7.0), ["6", None, "7"]),
        ((6.0, 6.5), ["6.0", "6.5"]),
        ((6, 6.5, "6.0"), ["6", "6.5", "6.0"]),
        ((6.0, 7), ["6", "7"]),
        ((-0.0, 1e15), ["0", "1000000000000000"]),
        ((2**80, np.int64(-3), np.uint8(7)), [str(2**80), "-3", "7"]),
        ((Decimal("6.00"), Decimal("NaN"), Decimal("1E+30")), ["6", None, "1" + 30 * "0"]),
        ((Decimal("6.50"), Decimal("6.00")), ["6.50", "6.00"]),
        ((np.float32(0.1), np.float32(6)), ["0.1", "6.0"]),
        ((np.float64(6), np.float32("nan")), ["6", None]),
        ((), []),
    ],
)
def test_a_column_of_numbers_by_hand(values: tuple[Any, ...], wanted: list[str | None]) -> None:
    assert texts(*values) == wanted


@pytest.mark.parametrize("value", [True, np.bool_(False), math.inf, Decimal("-Infinity"), [6.0], {"a": 1}])
def test_what_is_neither_text_nor_a_finite_number_is_refused(value: Any) -> None:
    with pytest.raises(DataError, match="row 1 must be text or a finite number"):
        texts(1.0, value)


@pytest.mark.parametrize("value", [2.0**53, -1e20, np.float32(2**24), np.float16(2048)])
def test_a_whole_number_that_its_float_cannot_tell_from_its_neighbours_is_refused(value: Any) -> None:
    with pytest.raises(DataError, match=r"row 1 is .* has lost the last digits.*store the answers as integers or text"):
        texts(type(value)(1), value)


def test_every_kind_of_table_gives_the_same_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    prompts = [f"{i}?" for i in range(3)]
    for name, kind in (("double", pa.float64()), ("single", pa.float32()), ("half", pa.float16())):
        pq.write_table(pa.table({"prompt": prompts, "answer": pa.array([None, 6, 7], kind)}), tmp_path / name)
        assert [e.answer for e in ParquetPrompts(str(tmp_path / name)).load().train] == [None, "6", "7"]
    pq.write_table(pa.table({"prompt": prompts, "answer": pa.array([None, 0.1, 7], pa.float32())}), tmp_path / "tenths")
    assert [e.answer for e in ParquetPrompts(str(tmp_path / "tenths")).load().train] == [None, "0.1", "7.0"]
    lines = [json.dumps({"prompt": p, "answer": a}) for p, a in zip(prompts, (math.nan, 6.0, 7.0), strict=True)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert [e.answer for e in JsonlPrompts(str(tmp_path / "a.jsonl")).load().train] == [None, "6", "7"]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.csv").write_text("prompt,answer\n0?,\n1?,6\n2?,7\n")
    assert [e.answer for e in HuggingFacePrompts(str(tmp_path / "set")).load().train] == [None, "6", "7"]
    (tmp_path / "tenths").rename(tmp_path / "set" / "train.parquet")
    (tmp_path / "set" / "train.csv").unlink()
    assert [e.answer for e in HuggingFacePrompts(str(tmp_path / "set")).load().train] == [None, "0.1", "7.0"]
