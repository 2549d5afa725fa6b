"""When a run is saved, what is kept, and what the links point to."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.run.callbacks.checkpoint import Checkpoint, restore_generators, state_of_generators
from dppo_lightning.run.callbacks.heldout import HeldOutEvaluation
from dppo_lightning.run.cli import main
from dppo_lightning.run.metrics_file import read_rows
from tests.helpers.recipes import changed, recipe, refused, run
from tests.helpers.runs import QUIET, Letters, build
from tests.helpers.short_runs import shortened

Config = dict[str, Any]


@pytest.fixture
def config(tmp_path: Path, tiny_policy_dir: str) -> Config:
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}}
    return changed(
        recipe(tmp_path, tiny_policy_dir),
        trainer__max_steps=5,
        data__evaluate_every_n_steps=2,
        model__optimizer=optimizer,
    )


def there(folder: Path) -> dict[str, str]:
    """Checkpoints and links of a run: name -> name of what it is, or points to."""
    return {path.name: path.resolve().name for path in (folder / "checkpoints").glob("*.ckpt")}


def test_by_default_the_last_of_one_for_each_evaluation_is_kept(config: Config, tmp_path: Path) -> None:
    run("fit", config, tmp_path)
    assert there(tmp_path / "run") == {"step=5.ckpt": "step=5.ckpt", "last.ckpt": "step=5.ckpt"}
    assert {path.name for path in (tmp_path / "run" / "checkpoints").glob("*.json")} == {"step=5.json"}


@pytest.mark.parametrize("mode", ["max", "min"])
def test_the_best_by_a_metric_is_kept(mode: str, config: Config, tmp_path: Path) -> None:
    run("fit", config, tmp_path, "--checkpoint.best=heldout/length", f"--checkpoint.mode={mode}")
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.csv") if row["heldout/length"]]
    lengths = {int(row["step"]): float(row["heldout/length"]) for row in rows if row["step"] != "0"}
    pick = max if mode == "max" else min
    best = pick(lengths, key=lambda step: (lengths[step], -step if mode == "max" else step))
    assert there(tmp_path / "run")["best.ckpt"] == f"step={best}.ckpt"


def test_a_metric_that_the_evaluations_do_not_have_is_refused_before_the_first_step(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, "fit", config, tmp_path, "--checkpoint.best=heldout/rewards")
    assert "checkpoint.best='heldout/rewards' is no metric of the evaluations: there are heldout/" in line
    assert not (tmp_path / "run" / "completions.jsonl").exists()


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("every_n_steps=0", "checkpoint.every_n_steps must be >= 1, got 0"),
        ("every_n_minutes=0", "checkpoint.every_n_minutes must be > 0, got 0"),
        ("keep=0", "checkpoint.keep must be >= 1, got 0"),
    ],
)
def test_wrong_numbers_are_refused(
    option: str, says: str, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refused(capsys, "fit", config, tmp_path, f"--checkpoint.{option}")


def test_a_run_is_saved_when_the_time_has_come(tiny_policy_dir: str, tmp_path: Path) -> None:
    now = [0.0]

    class Hours(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            now[0] += 1000.0

    module, data = build(tiny_policy_dir, data={"prompts": Letters(6, heldout=2), "evaluate_every_n_steps": 100})
    saves = Checkpoint(every_n_minutes=30.0, keep=9, clock=lambda: now[0])
    settings = QUIET | {"enable_checkpointing": True, "default_root_dir": tmp_path, "max_steps": 5}
    pl.Trainer(callbacks=[HeldOutEvaluation(), Hours(), saves], **settings).fit(module, datamodule=data)
    assert set(there(tmp_path)) == {"step=2.ckpt", "step=4.ckpt", "step=5.ckpt", "last.ckpt"}


def test_summary_and_session_list_span_all_sessions(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("fit", changed(config, trainer__max_steps=2), tmp_path)
    before = capsys.readouterr().out
    with shortened():
        main(["fit", "--resume", str(tmp_path / "run"), "--trainer.max_steps=4"])
    after = capsys.readouterr().out
    first = before.split("held out: reward ")[1].split(" -> ")[0]
    assert after.split("held out: reward ")[1].startswith(f"{first} -> ")
    assert "for 4 steps" in after
    names = sorted(path.name for path in (tmp_path / "run" / "sessions").iterdir())
    sessions = [yaml.safe_load((tmp_path / "run" / "sessions" / name).read_text()) for name in names]
    steps = [session["trainer"]["max_steps"] for session in sessions]
    assert steps == [2, 4]


def test_random_generators_go_on_where_they_were() -> None:
    state = state_of_generators()
    drawn = random.random(), np.random.rand(), torch.rand(()).item(), random.gauss(0, 1), np.random.randn()
    restore_generators(state)
    assert (random.random(), np.random.rand(), torch.rand(()).item(), random.gauss(0, 1), np.random.randn()) == drawn


def test_a_checkpoint_without_held_out_prompts_names_no_metric(tiny_policy_dir: str, tmp_path: Path) -> None:
    module, data = build(tiny_policy_dir, data={"prompts": Letters(6)})
    settings = QUIET | {"enable_checkpointing": True, "default_root_dir": tmp_path, "max_steps": 1}
    trainer = pl.Trainer(callbacks=[HeldOutEvaluation(), Checkpoint(best="heldout/reward")], **settings)
    with pytest.raises(ConfigError, match="there are no held-out prompts"):
        trainer.fit(module, datamodule=data)
