"""The recipes for the CPU, really run: the demo learns, and a real pretrained model stays in step with its engine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers.command_line import dppo
from tests.helpers.run_files import read_jsonl, read_metrics

pytestmark = pytest.mark.slow


def test_the_quickstart_raises_the_held_out_reward(tmp_path: Path) -> None:
    dppo("prepare", "tiny", "--out", tmp_path / "tiny")
    printed = dppo("fit", "--config", "configs/quickstart.yaml", "--model.policy", tmp_path / "tiny",
                   "--run_dir", tmp_path / "run")  # fmt: skip
    heldout = read_metrics(tmp_path / "run" / "metrics.csv")["heldout/reward"]
    assert 1 / 3 <= heldout[0] <= 1 / 2
    assert heldout[-1] - heldout[0] >= 0.15
    assert max(read_metrics(tmp_path / "run" / "metrics.csv")["sync/parity_error"]) < 1e-4
    before, after = map(float, re.search(r"held out: reward (\d\.\d{3}) -> (\d\.\d{3}) ", printed).groups())
    assert (before, after) == pytest.approx(
        (heldout[0], heldout[-1]), abs=0.0005 + 1e-6
    )  # printed digits, and the CSV's


def test_smollm2_trains_in_step_with_its_engine(tmp_path: Path) -> None:
    dppo("prepare", "smollm2", "--out", tmp_path / "smollm2")
    dppo("fit", "--config", "configs/smollm2_arithmetic.yaml", "--model.policy", tmp_path / "smollm2",
         "--run_dir", tmp_path / "run", "--trainer.max_steps", "2",
         "--data.prompts.init_args.heldout", "16")  # fmt: skip
    parity = read_metrics(tmp_path / "run" / "metrics.csv")["sync/parity_error"]
    assert len(parity) == 2
    assert max(parity) < 1e-3
    rows = read_jsonl(tmp_path / "run" / "completions.jsonl")
    assert len(rows) == 2 * 64
    assert all(row["prompt"].endswith("<|im_start|>assistant\n") and row["tokens"] <= 32 for row in rows)
    assert {"strict", "lenient"} == set(rows[0]["parts"])
