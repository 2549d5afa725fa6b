"""Health: a warning for each way of going wrong, once; none for a run that learns."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.run.callbacks import Health
from dppo_lightning.run.callbacks.health import METRICS, WARNINGS
from dppo_lightning.train.metrics import GLOSSARY
from tests.helpers.places import ROOT
from tests.helpers.recipes import changed, recipe, run

SOUND = {
    "train/mismatch_tv": 0.01,
    "train/masked_share": 0.004,
    "train/entropy": 0.6,
    "train/length": 100.0,
    "train/truncated": 0.02,
    "train/reward": 0.5,
    "train/reward_std": 0.4,
    "train/ratio_max": 3.0,
}


def told(health: Health, steps: int, **values: float) -> list[str]:
    """Warnings of some steps that are alike."""
    changes = {f"train/{name}": value for name, value in values.items()}
    return [name for _ in range(steps) for name, _ in health.judge(SOUND | changes)]


def begun(**settings: Any) -> Health:
    health = Health(window=4, **settings)
    assert told(health, 8) == []
    return health


@pytest.mark.parametrize(
    ("warning", "change"),
    [
        ("mismatch", {"mismatch_tv": 0.07}),
        ("masked", {"masked_share": 0.35}),
        ("entropy_low", {"entropy": 0.05}),
        ("entropy_high", {"entropy": 2.0}),
        ("length", {"length": 20.0}),
        ("truncated", {"truncated": 0.6}),
        ("reward", {"reward": 0.25}),
        ("ratio", {"ratio_max": 150.0}),
    ],
)
def test_a_metric_that_leaves_its_band_is_warned_of_once(warning: str, change: dict[str, float]) -> None:
    health = begun()
    assert told(health, 20, **change) == [warning]
    assert told(health, 20) == []
    assert told(health, 20, **change) == []


def test_every_warning_is_of_a_case_above_and_of_a_metric_that_there_is() -> None:
    cases = test_a_metric_that_leaves_its_band_is_warned_of_once.pytestmark[0].args[1]
    assert [name for name, _ in cases] == list(WARNINGS)
    assert set(METRICS.values()) <= GLOSSARY.keys()
    assert SOUND.keys() == set(METRICS.values())


@pytest.mark.parametrize("warning", WARNINGS)
def test_the_docs_have_each_warning_word_for_word(warning: str) -> None:
    page = (ROOT / "docs" / "runs.md").read_text()
    section = page.split("## What the warnings mean")[1].split("\n## ")[0]
    assert f'- **`{warning}`**: "{WARNINGS[warning]}".' in section
    assert section.count("- **`") == len(WARNINGS)


def test_one_step_out_of_its_band_is_nothing() -> None:
    health = begun()
    for name in METRICS.values():
        assert health.judge(SOUND | {name: SOUND[name] * 1.4}) == []
    assert health.judge(SOUND | {"train/ratio_max": 1e9}) == []


def test_a_run_that_learns_as_the_quickstart_does_is_not_warned_of() -> None:
    numbers = np.random.default_rng(0)
    health = Health()
    for step in range(160):
        fresh = step % 4 == 0
        share = step / 160
        values = {
            "train/mismatch_tv": 1e-6 if fresh else abs(numbers.normal(0.009, 0.005)),
            "train/masked_share": 0.0 if fresh else abs(numbers.normal(0.004, 0.003)),
            "train/entropy": 0.72 - 0.42 * share + numbers.normal(0, 0.02),
            "train/length": numbers.normal(7.7, 0.2),
            "train/truncated": abs(numbers.normal(0.03, 0.02)),
            "train/reward": 0.37 + 0.3 * share + numbers.normal(0, 0.06),
            "train/reward_std": 0.48,
            "train/ratio_max": 1.0 if fresh else 82.6 if step == 21 else numbers.uniform(1.4, 20),
        }
        assert health.judge(values) == []


def test_growing_completions_are_not_warned_of() -> None:
    assert told(begun(), 20, length=2000.0) == []


def test_rewards_that_never_differed_have_no_band() -> None:
    health = Health(window=2)
    assert told(health, 4, reward_std=0.0) == []
    assert told(health, 9, reward_std=0.0, reward=0.0) == []


def test_few_completions_a_step_are_not_taken_for_a_fall() -> None:
    numbers = np.random.default_rng(0)
    health = Health()
    for _ in range(20_000):
        rewards = numbers.random(4) < 0.3
        values = {"train/reward": float(rewards.mean()), "train/reward_std": float(rewards.std())}
        assert health.judge(SOUND | values) == []


def test_what_is_missing_or_not_a_number_is_passed_over() -> None:
    health = begun()
    for _ in range(10):
        assert health.judge({}) == []
        assert health.judge(dict.fromkeys(SOUND, math.nan)) == []
        assert health.judge(dict.fromkeys(SOUND, math.inf)) == []


def test_a_run_that_goes_on_knows_how_it_began_and_what_it_was_warned_of() -> None:
    health = begun()
    assert told(health, 4, mismatch_tv=0.1) == ["mismatch"]
    continued = Health(window=4)
    continued.load_state_dict(health.state_dict())
    assert told(continued, 8, mismatch_tv=0.1) == []
    assert told(continued, 8, entropy=0.05) == ["entropy_low"]


@pytest.mark.parametrize(
    "setting",
    [
        {"window": 0},
        {"mismatch": 0.0},
        {"masked": 1.5},
        {"entropy": (2.0, 3.0)},
        {"entropy": (0.1, 0.9)},
        {"length": -0.1},
        {"truncated": 2.0},
        {"reward": 0.0},
        {"ratio": 1.0},
    ],
)
def test_a_band_that_is_out_of_range_is_refused(setting: dict[str, Any]) -> None:
    (name,) = setting
    with pytest.raises(ConfigError, match=f"Health: {name} must be"):
        Health(**setting)


def test_a_run_says_and_writes_it_and_takes_bands_of_ones_own(
    tiny_policy_dir: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = {"class_path": "dppo_lightning.run.callbacks.Health", "init_args": {"window": 1, "truncated": 0.0}}
    with caplog.at_level(logging.WARNING, logger="dppo_lightning"):
        run("fit", changed(recipe(tmp_path, tiny_policy_dir), trainer__callbacks=[own]), tmp_path)
    lines = (tmp_path / "run" / "health.txt").read_text().splitlines()
    assert len([line for line in lines if line.startswith("health, optimizer step 0, truncated: 100.0% of")]) == 1
    assert [line for line in lines if "truncated" in line] == [
        record.message for record in caplog.records if "truncated:" in record.message
    ]
