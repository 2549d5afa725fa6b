"""JsonlPrompts and ParquetPrompts: the same rows give the same examples, and what is wrong is named."""

from __future__ import annotations

import bz2
import gzip
import logging
import lzma
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dppo_lightning.base.errors import ConfigError, DataError
from dppo_lightning.prompts import Example, JsonlPrompts, ParquetPrompts
from tests.helpers.run_files import write_jsonl


def jsonl(folder: Path, rows: list[Any], name: str = "train.jsonl") -> str:
    return write_jsonl(folder / name, rows)


def parquet(folder: Path, rows: list[Any], name: str = "train.parquet") -> str:
    path = folder / name
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def test_a_row_of_text_becomes_an_example(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"prompt": "1+1=", "answer": 2, "level": {"a": [1]}}, {"prompt": "é?", "answer": "x"}])
    first, second = JsonlPrompts(path).load().train
    assert first == Example(prompt="1+1=", answer="2", columns={"level": {"a": [1]}})
    assert second == Example(prompt="é?", answer="x")


def test_a_row_of_messages_becomes_an_example(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "hi"}]
    (example,) = JsonlPrompts(jsonl(tmp_path, [{"messages": messages, "answer": 0.5}])).load().train
    assert example == Example(messages=tuple(messages), answer="0.5")


def test_text_can_be_framed_as_a_chat_from_a_column_of_another_name(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"question": "{1}?", "solution": "1", "prompt": "kept"}])
    source = JsonlPrompts(
        path,
        prompt_column="question",
        answer_column="solution",
        template="Q: {question} {A}",
        chat=True,
        system="Be brief.",
    )
    (example,) = source.load().train
    assert example == Example(
        messages=({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q: {1}? {A}"}),
        answer="1",
        columns={"prompt": "kept"},
    )


def test_blank_lines_and_a_byte_order_mark_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\n  \n{"prompt": ""}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 4: 'prompt' is empty"):
        JsonlPrompts(str(path)).load()
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\n{"prompt": "b"}')
    assert [example.prompt for example in JsonlPrompts(str(path)).load().train] == ["a", "b"]


def test_parquet_gives_what_json_lines_give(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"q{i}", "messages": None, "answer": i, "tags": ["a", "b"]}
        if i % 2
        else {"prompt": None, "messages": [{"role": "user", "content": f"q{i}"}], "answer": None, "tags": []}
        for i in range(9)
    ]
    from_parquet = ParquetPrompts(parquet(tmp_path, rows), heldout_size=3, seed=4).load()
    assert from_parquet == JsonlPrompts(jsonl(tmp_path, rows), heldout_size=3, seed=4).load()
    assert len(from_parquet.heldout) == 3


USER = {"role": "user", "content": "a"}
BAD_ROWS = {
    "not an object": (["a"], "must be an object"),
    "neither": ({"question": "a"}, r"has neither 'prompt' nor 'messages'.*columns are question"),
    "both": ({"prompt": "a", "messages": [USER]}, "has both"),
    "empty": ({"prompt": " \n"}, "'prompt' is empty"),
    "not text": ({"prompt": [USER]}, "'prompt' must be text"),
    "surrogate": ({"prompt": "\ud800"}, "half a character"),
    "answer list": ({"prompt": "a", "answer": [1]}, "'answer' must be text or a finite number"),
    "answer bool": ({"prompt": "a", "answer": True}, "'answer' must be text or a finite number"),
    "answer inf": ({"prompt": "a", "answer": float("inf")}, "'answer' must be text or a finite number"),
    "messages text": ({"messages": "a"}, "'messages' must be a list"),
    "messages empty": ({"messages": []}, "'messages' must be a list"),
    "message text": ({"messages": [USER, "a"]}, r"'messages'\[1\] must be an object"),
    "no role": ({"messages": [{"content": "a"}]}, r"'messages'\[0\] has no 'role'"),
    "no content": ({"messages": [{"role": "user", "content": None}]}, r"'messages'\[0\] has no 'content'"),
    "parts": ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "must be text"),
    "answered": ({"messages": [USER, {"role": "assistant", "content": "b"}]}, "last role is 'assistant'"),
    "silent": ({"messages": [{"role": "user", "content": " "}]}, "ends with an empty message"),
}


@pytest.mark.parametrize(("row", "problem"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named_with_file_and_line(tmp_path: Path, row: Any, problem: str) -> None:
    path = jsonl(tmp_path, [{"prompt": "good"}, row])
    with pytest.raises(DataError, match=rf"train\.jsonl, line 2.*{problem}") as caught:
        JsonlPrompts(path).load()
    assert "\n" not in str(caught.value)


def test_a_bad_row_of_parquet_is_named_with_its_number(tmp_path: Path) -> None:
    path = parquet(tmp_path, [{"prompt": "a"}] * 5000 + [{"prompt": None}])
    with pytest.raises(DataError, match=r"train\.parquet, row 5001: has neither"):
        ParquetPrompts(path).load()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"prompt": "a"', "is not JSON: .* at column 15"),
        (b'{"prompt": "\xff"}', "is not UTF-8"),
        (b"9" * 5000, "is not JSON that can be read"),
        (b"[" * 100_000, "is not JSON that can be read"),
    ],
    ids=["cut", "bytes", "huge number", "deep"],
)
def test_a_line_that_cannot_be_parsed_is_named(tmp_path: Path, line: bytes, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2: {problem}"):
        JsonlPrompts(str(path)).load()


@pytest.mark.parametrize("source", [JsonlPrompts, ParquetPrompts])
def test_files_that_cannot_be_read_are_named(tmp_path: Path, source: type[JsonlPrompts] | type[ParquetPrompts]) -> None:
    with pytest.raises(DataError, match=r"absent: cannot be read.*[Nn]o such file"):
        source(str(tmp_path / "absent")).load()
    with pytest.raises(DataError, match="cannot be read"):
        source(str(tmp_path)).load()


def test_a_file_that_is_not_parquet_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl: cannot be read as Parquet"):
        ParquetPrompts(jsonl(tmp_path, [{"prompt": "a"}])).load()


OTHER_KINDS = {
    "gzip": (gzip.compress(b'{"prompt": "a"}\n'), "compressed with gzip: unpack it"),
    "bzip2": (bz2.compress(b'{"prompt": "a"}\n'), "compressed with bzip2: unpack it"),
    "xz": (lzma.compress(b'{"prompt": "a"}\n'), "compressed with xz: unpack it"),
    "zstd": (b"\x28\xb5\x2f\xfd\x24\x00", "compressed with zstd: unpack it"),
    "array": (b'\n[{"prompt": "a"}, {"prompt": "b"}]\n', "JSON array: write one object a line"),
    "long array": (b'[\n  {"prompt": "a"}\n]\n', "JSON array: write one object a line"),
    "utf-16": ('{"prompt": "a"}'.encode("utf-16"), "UTF-16: write it as UTF-8"),
}


@pytest.mark.parametrize(("content", "problem"), OTHER_KINDS.values(), ids=OTHER_KINDS)
@pytest.mark.parametrize("source", [JsonlPrompts, ParquetPrompts])
def test_a_file_of_another_kind_is_named_as_what_it_is(
    tmp_path: Path, source: type[JsonlPrompts] | type[ParquetPrompts], content: bytes, problem: str
) -> None:
    (tmp_path / "train").write_bytes(content)
    with pytest.raises(DataError, match=rf"train: .*is .*{problem}") as caught:
        source(str(tmp_path / "train")).load()
    assert "\n" not in str(caught.value)


def test_parquet_and_json_lines_point_to_each_other(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is Parquet: read it with ParquetPrompts"):
        JsonlPrompts(parquet(tmp_path, [{"prompt": "a"}])).load()
    with pytest.raises(DataError, match="it is JSON: JsonlPrompts reads it"):
        ParquetPrompts(jsonl(tmp_path, [{"prompt": "a"}])).load()


def test_files_without_rows_are_errors(tmp_path: Path) -> None:
    full, empty = jsonl(tmp_path, [{"prompt": "a"}]), jsonl(tmp_path, [], "empty.jsonl")
    with pytest.raises(DataError, match=r"empty\.jsonl: holds no questions"):
        JsonlPrompts(empty).load()
    with pytest.raises(DataError, match=r"empty\.jsonl: holds no questions"):
        JsonlPrompts(full, empty).load()


def test_held_out_questions_are_removed_from_training_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = jsonl(tmp_path, [{"prompt": text} for text in ("a", "b ", "c", "b", "a")])
    heldout = jsonl(tmp_path, [{"messages": [{"role": "user", "content": "b"}]}, {"prompt": "z"}], "heldout.jsonl")
    with caplog.at_level(logging.INFO):
        sets = JsonlPrompts(train, heldout).load()
    assert [example.prompt for example in sets.train] == ["a", "c", "a"]
    assert len(sets.heldout) == 2
    assert "removed 2 questions" in caplog.text
    with pytest.raises(DataError, match="nothing is left to train on"):
        JsonlPrompts(train, train).load()


@settings(max_examples=40, deadline=None)
@given(
    questions=st.lists(st.integers(0, 15), min_size=1, max_size=30),
    size=st.integers(0, 16),
    seed=st.integers(0, 3),
)
def test_a_draw_never_overlaps_training_and_loses_no_other_row(questions: list[int], size: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = JsonlPrompts(
            jsonl(Path(folder), [{"prompt": str(q), "row": i} for i, q in enumerate(questions)]),
            heldout_size=size,
            seed=seed,
        )
        if size >= len(set(questions)):
            with pytest.raises(DataError, match=f"has {len(set(questions))} different questions"):
                source.load()
            return
        sets = source.load()
        assert source.load() == sets
    held = [example.prompt for example in sets.heldout]
    assert len(set(held)) == len(held) == size
    rows = [example.columns["row"] for example in sets.heldout]
    assert rows == sorted(rows)
    assert [e.columns["row"] for e in sets.train] == [i for i, q in enumerate(questions) if str(q) not in held]


def test_a_larger_draw_holds_out_the_same_and_more_and_the_seed_decides(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"prompt": str(i)} for i in range(100)])
    held = {
        (size, seed): {e.prompt for e in JsonlPrompts(path, heldout_size=size, seed=seed).load().heldout}
        for size, seed in ((10, 0), (20, 0), (10, 1))
    }
    assert held[10, 0] < held[20, 0]
    assert held[10, 0] != held[10, 1]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"heldout_size": -1}, "heldout_size must be >= 0"),
        ({"seed": -1}, "seed must be >= 0"),
        ({"heldout": "b", "heldout_size": 1}, "leave heldout_size out"),
        ({"template": "no place"}, "template must contain {question}"),
        ({"system": "Be brief."}, "set chat to true"),
        ({"prompt_column": "answer"}, "three different names"),
    ],
)
def test_settings_that_do_not_fit_fail_when_the_source_is_built(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        JsonlPrompts("a", **settings)


def test_without_pyarrow_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pyarrow is not installed: pip install 'dppo-lightning\[reasoning\]'"):
        ParquetPrompts("a").load()
