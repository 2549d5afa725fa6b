"""--deterministic: two runs of one recipe agree to the bit, and what cannot agree is refused in one line."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.recipes import changed, recipe, refused, run

TIMES = ("time/", "perf/")


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def left_by(folder: Path) -> dict[str, Any]:
    """What a run leaves, but for what it was timed at."""
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in csv.DictReader(file)]
    return {
        "weights": checkpoint["state_dict"],
        "optimizer": checkpoint["optimizer_states"],
        "metrics": rows,
        **{name: (folder / name).read_text() for name in ("completions.jsonl", "heldout.jsonl", "mask_audit.jsonl")},
    }


@pytest.mark.parametrize("threads", [1, 2])
def test_two_runs_agree_to_the_bit(threads: int, tiny_policy_dir: str, tmp_path: Path) -> None:
    left, before = [], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name in ("one", "two"):
            config = changed(
                recipe(tmp_path, tiny_policy_dir),
                run_dir=str(tmp_path / name),
                data__steps_per_rollout=2,
                trainer__max_steps=4,
                trainer__accumulate_grad_batches=2,
            )
            run("fit", config, tmp_path, "--deterministic=true")
            assert torch.are_deterministic_algorithms_enabled()
            left.append(left_by(tmp_path / name))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(before)
    one, two = left
    assert len(one["metrics"]) > 4
    for what in one:
        assert same(one[what], two[what]), what


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data__selection": {"oversampling": 0.5}}, "data.selection.oversampling"),
        ({"data__streaming": {"max_staleness": 1, "late": "drop"}}, "data.streaming.late"),
        ({"data__streaming": {"max_staleness": 1}}, "data.streaming.max_staleness"),
    ],
)
def test_what_differs_from_run_to_run_is_refused(
    change: dict[str, Any], said: str, tiny_policy_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = changed(recipe(tmp_path, tiny_policy_dir), **change)
    try:
        for option in ("--deterministic=true", "--trainer.deterministic=true"):
            line = refused(capsys, "fit", config, tmp_path, option)
            assert line.startswith("error: --deterministic: ")
            assert said in line
    finally:
        torch.use_deterministic_algorithms(False)
    assert not (tmp_path / "run").exists()
