"""benchmarks/: every file says what it takes, and the small ones end in a line of JSON. The others: slow/."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from dppo_lightning.base.errors import DataError
from tests.helpers.benchmarks import BENCHMARKS, load, shown_help
from tests.helpers.places import ROOT

COMMANDS = sorted(path.stem for path in BENCHMARKS.glob("[a-z]*.py"))


def last_line(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> dict:
    """Run a benchmark in this process; what its last line says."""
    module = load(name, monkeypatch)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--rounds", "1", "--threads", "1", *arguments])
    threads = torch.get_num_threads()
    try:
        module.main()
    finally:
        torch.set_num_threads(threads)
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_spoilt_rows_and_recipes_give_a_result_or_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    module = load("fuzz", monkeypatch)
    monkeypatch.setattr(
        sys, "argv", ["fuzz.py", "--rows", "400", "--configs", "12", "--recipe", str(ROOT / "configs/quickstart.yaml")]
    )
    module.main()
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert found["tracebacks"] == 0
    assert 0.3 < found["errors"] / (found["rows"] + found["configs"]) < 0.9  # it spoils, and not all


def test_what_is_no_one_line_error_is_counted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    module = load("fuzz", monkeypatch)
    ends = iter([None, DataError("one line"), DataError("two\nlines"), KeyError("x"), module.Hang("slow")])

    def case(draw: object) -> None:
        if (error := next(ends)) is not None:
            raise error

    assert module.count(5, case, "row", 60.0) == {"results": 1, "errors": 2, "tracebacks": 3}
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_the_benchmarks_are_those_of_the_docs() -> None:
    assert set(COMMANDS) >= {"head", "step", "rollout", "sync", "scaling", "bookkeeping", "rewards"}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_needs_none_of_the_peers(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for peer in ("trl", "vllm", "datasets"):
        monkeypatch.setitem(sys.modules, peer, None)  # an import of it fails
    shown = shown_help(name, monkeypatch, capsys)
    assert "usage:" in shown
    assert "--help" in shown
    assert '__name__ == "__main__"' in (BENCHMARKS / f"{name}.py").read_text()


@pytest.mark.parametrize(("name", "arguments"), [("head", []), ("step", ["--only", "trl"]), ("step", [])])
def test_a_missing_peer_is_one_line(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = load(name, monkeypatch)
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit, match=r"^TRL is not installed: install the bench extra, .*\[bench\]'$"):
        module.main()


@pytest.mark.slow
def test_scaling_fits_a_straight_line_and_draws_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    scaling, head = load("scaling", monkeypatch), load("head", monkeypatch)
    monkeypatch.setattr(scaling, "step_mb", scaling.measure)  # in this process, which is quicker
    monkeypatch.setattr(scaling, "in_new_process", head.memory)
    plot = tmp_path / "scaling.png"
    arguments = ["--tokens", "64", "512", "--vocabularies", "128", "256", "--width", "32", "--plot", str(plot)]
    found = last_line("scaling", arguments, monkeypatch, capsys)
    assert set(found) == {"time_exponent_tokens", "head_mb_by_vocab", "head_mb_by_tokens"}
    assert 0 < found["time_exponent_tokens"] < 2
    assert set(found["head_mb_by_vocab"]) == {"128", "256"}
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_sync_sends_the_whole_model(
    tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    found = last_line("sync", ["--model", tiny_model_dir], monkeypatch, capsys)
    assert set(found) == {"seconds", "gb_per_s", "restart_seconds"}
    size = (Path(tiny_model_dir) / "model.safetensors").stat().st_size
    assert found["seconds"] * found["gb_per_s"] * 1e9 == pytest.approx(size, rel=0.05)  # the header apart


def test_bookkeeping_is_measured_by_the_number_of_groups(
    tiny_policy_dir: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--groups", "2", "50", "--samples", "2", "--model", tiny_policy_dir]
    found = last_line("bookkeeping", arguments, monkeypatch, capsys)
    assert list(found["ms_per_completion"]) == ["2", "50"]
    assert min(found["ms_per_completion"].values()) > 0


def test_isolated_rewards_are_measured_beside_those_in_process(
    tiny_policy_dir: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--completions", "32", "--tokens", "4", "--model", tiny_policy_dir, "--workers", "1"]
    found = last_line("rewards", arguments, monkeypatch, capsys)
    assert set(found) == {"isolated_over_in_process", "completions_per_s", "start_seconds"}
    assert min(found.values()) > 0


@pytest.mark.slow
def test_shared_prompts_are_measured_by_shape(
    tiny_policy_dir: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--only", "shared", "--small", "--model", tiny_policy_dir]
    found = last_line("step", arguments, monkeypatch, capsys)
    assert set(found) == {"shared_prompt_speedup", "shared_prompt_speedups"}
    assert list(found["shared_prompt_speedups"]) == ["16 + 2 x 4", "8 + 2 x 40"]


@pytest.mark.slow
def test_a_long_run_is_watched_to_its_end(
    tiny_policy_dir: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    found = last_line("long_run", ["--steps", "100", "--tokenizer", tiny_policy_dir], monkeypatch, capsys)
    assert set(found) >= {"steps", "memory_growth", "files_growth", "threads_growth", "time_growth"}
    assert found["steps"] == 100
    assert found["threads_growth"] == 0


def test_growth_leaves_out_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    growth = load("long_run", monkeypatch).growth
    assert growth([1.0, 9.0, *[100.0] * 2, *[120.0] * 4, *[110.0] * 2]) == pytest.approx(0.1)
    assert growth([5.0] * 100) == 0
