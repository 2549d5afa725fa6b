"""``generate``: whole files or none."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dppo_lightning.base.errors import ConfigError, DataError, RewardError
from dppo_lightning.reward.base import Sample, Score
from dppo_lightning.run.commands import GeneratingTrainer
from tests.helpers.rewards import Failing, ShareOf, share
from tests.helpers.run_files import read_jsonl
from tests.helpers.runs import QUIET, Letters, build, fit


def generate(policy: str, output: Path, data: dict[str, Any] | None = None, **arguments: Any) -> list[dict[str, Any]]:
    module, source = build(policy, data={"prompts": Letters(2, heldout=3)} | (data or {}))
    GeneratingTrainer(**QUIET).generate(module, source, str(output), **arguments)
    return read_jsonl(output)


def test_held_out_prompts_are_completed_and_scored(tiny_policy_dir: str, tmp_path: Path) -> None:
    rows = generate(tiny_policy_dir, tmp_path / "new" / "out.jsonl", samples=2)
    assert [row["prompt"] for row in rows] == ["ccc", "ccc", "d", "d", "ee", "ee"]
    for row in rows:
        assert row["reward"] == share(row["completion"], ShareOf().characters)
        assert 1 <= row["tokens"] <= 6
        assert row["finish_reason"] == ("length" if len(row["completion"]) == 6 else "stop")
    assert len({row["completion"] for row in rows}) > 3
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.jsonl"]


def test_prompts_of_a_file_replace_those_of_the_recipe(tiny_policy_dir: str, tmp_path: Path) -> None:
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"prompt": "what", "answer": "that"}\n{"prompt": "why"}\n')
    rows = generate(tiny_policy_dir, tmp_path / "out.jsonl", prompts=str(asked))
    assert [(row["prompt"], row["answer"]) for row in rows] == [("what", "that"), ("why", None)]


def test_the_same_seed_writes_the_same_file(tiny_policy_dir: str, tmp_path: Path) -> None:
    texts = [generate(tiny_policy_dir, tmp_path / f"{i}.jsonl", {"seed": seed}) for i, seed in enumerate((1, 1, 2))]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_a_checkpoints_weights_are_used(tiny_policy_dir: str, tmp_path: Path) -> None:
    """Trained until only letters come."""
    run = fit(
        tiny_policy_dir,
        {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)},
        {"samples_per_prompt": 8},
        max_steps=12,
    )
    run.module.trainer.save_checkpoint(tmp_path / "trained.ckpt")
    before = generate(tiny_policy_dir, tmp_path / "before.jsonl", samples=8)
    after = generate(tiny_policy_dir, tmp_path / "after.jsonl", samples=8, ckpt_path=str(tmp_path / "trained.ckpt"))
    means = [sum(row["reward"] for row in rows) / len(rows) for rows in (before, after)]
    assert means[1] > means[0] + 0.3


def test_an_existing_output_is_refused_and_kept(tiny_policy_dir: str, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("precious")
    with pytest.raises(ConfigError, match="exists already"):
        generate(tiny_policy_dir, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "precious"


def test_less_than_one_sample_is_refused(tiny_policy_dir: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="samples must be >= 1, got 0"):
        generate(tiny_policy_dir, tmp_path / "out.jsonl", samples=0)


def test_a_missing_prompt_file_is_named(tiny_policy_dir: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing\.jsonl"):
        generate(tiny_policy_dir, tmp_path / "out.jsonl", prompts=str(tmp_path / "missing.jsonl"))
    assert not list(tmp_path.iterdir())


def test_nothing_to_complete_is_an_error(tiny_policy_dir: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, DataError)):
        generate(tiny_policy_dir, tmp_path / "out.jsonl", {"prompts": Letters(2, heldout=0)})
    assert not list(tmp_path.iterdir())


class Odd(ShareOf):
    """Reports a part for the first completion of a group alone."""

    whole_groups = True

    def score(self, samples: Sequence[Sample]) -> list[Score]:  # type: ignore[override]
        return [Score(1.0, {"first": 1.0} if place == 0 else {}) for place, _ in enumerate(samples)]


def test_a_reward_that_fails_leaves_no_file(tiny_policy_dir: str, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        generate(tiny_policy_dir, tmp_path / "out.jsonl", {"reward": Failing(ZeroDivisionError())})
    assert not list(tmp_path.iterdir())


def test_a_part_that_was_not_reported_is_null(tiny_policy_dir: str, tmp_path: Path) -> None:
    rows = generate(tiny_policy_dir, tmp_path / "out.jsonl", {"reward": Odd()}, samples=2)
    assert [row["parts"] for row in rows[:2]] == [{"first": 1.0}, {"first": None}]


def test_a_disk_that_fails_leaves_no_file_of_the_outputs_name(
    tiny_policy_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        generate(tiny_policy_dir, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
