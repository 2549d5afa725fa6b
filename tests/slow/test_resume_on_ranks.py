"""Two ranks under ZeRO-2, killed together within a rollout, go on as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dppo_lightning.generate.vllm.server import hold_port
from dppo_lightning.run.checkpoint_files import read_weights
from dppo_lightning.train.hooks import RunCallback
from tests.helpers.killing import LOGS, metric_rows
from tests.helpers.places import ROOT
from tests.helpers.recipes import changed, recipe

pytestmark = pytest.mark.slow
PIECE = str(ROOT / "configs" / "scaling" / "zero2.yaml")


class KillAllRanks(RunCallback):
    """SIGKILL to every rank when five steps have been taken."""

    def on_step_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == 5:
            trainer.strategy.barrier("killed together")
            os.kill(os.getpid(), signal.SIGKILL)


def dppo(folder: Path, *words: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "dppo_lightning", *words]
    with hold_port() as port:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment |= {"MASTER_PORT": str(port.getsockname()[1])}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_two_halves_are_the_whole(optimizer: str, tiny_policy_dir: str, tmp_path: Path) -> None:
    for name in ("whole", "halves"):
        folder = tmp_path / name
        folder.mkdir()
        config = changed(
            recipe(folder, tiny_policy_dir),
            run_dir="run",
            trainer__max_steps=6,
            trainer__accumulate_grad_batches=2,
            data__steps_per_rollout=4,
            data__evaluate_every_n_steps=3,
            model__optimizer={"class_path": f"torch.optim.{optimizer}", "init_args": {"lr": 1e-3}},
        )
        if name == "halves":
            config["trainer"]["callbacks"] = [{"class_path": f"{__name__}.KillAllRanks"}]
        (folder / "recipe.yaml").write_text(yaml.safe_dump(config))
        code, said = dppo(folder, "fit", "--config", "recipe.yaml", "--config", PIECE, "--trainer.devices=2")
        assert (code != 0) == (name == "halves"), said
    code, said = dppo(tmp_path / "halves", "fit", "--resume", "run", "--trainer.callbacks=null")
    assert code == 0, said
    assert "the run goes on from" in said
    whole, halves = tmp_path / "whole" / "run", tmp_path / "halves" / "run"
    for name in LOGS:
        assert (halves / name).read_text() == (whole / name).read_text(), name
    assert metric_rows(halves / "metrics.csv") == metric_rows(whole / "metrics.csv")
    expected = read_weights(whole / "checkpoints" / "step=6.ckpt")
    for key, weight in read_weights(halves / "checkpoints" / "step=6.ckpt").items():
        torch.testing.assert_close(weight, expected[key], rtol=0, atol=0, msg=key)
