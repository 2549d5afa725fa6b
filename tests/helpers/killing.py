"""Runs that are killed at a moment that a test chooses, and what is compared afterwards."""

from __future__ import annotations

import csv
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from dppo_lightning.base.records import Group
from dppo_lightning.run.cli import main
from dppo_lightning.train.hooks import RunCallback
from tests.helpers.rank_pool import IMPORTED_ONCE
from tests.helpers.short_runs import shortened

LOGS = ("completions.jsonl", "heldout.jsonl", "mask_audit.jsonl")
TIMES = ("time/", "perf/", "stream/ready", "stream/in_flight")
"""Beginnings of the names of metrics that say when something was done, not what."""


class KillAt(RunCallback):
    """Kill this process as nothing else can: no handler runs, nothing is closed.

    Args:
        moment: "generation", "rollout", "batch", "backward", "optimizer", "evaluation", "step_end", "checkpoint" (half
            written) or "end".
        step: Optimizer steps taken then.
    """

    def __init__(self, moment: str, step: int) -> None:
        self.moment = moment
        self.step = step

    def _at(self, moment: str, trainer: pl.Trainer) -> None:
        if moment == self.moment and trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_generation_progress(self, trainer: pl.Trainer, done: int, total: int) -> None:
        if done:
            self._at("generation", trainer)

    def on_rollout(self, trainer: pl.Trainer, pl_module: pl.LightningModule, groups: list[Group]) -> None:
        self._at("rollout", trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._at("batch", trainer)

    def on_before_backward(self, trainer: pl.Trainer, *_: Any) -> None:
        self._at("backward", trainer)

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        self._at("optimizer", trainer)

    def on_heldout(self, trainer: pl.Trainer, pl_module: pl.LightningModule, groups: list[Group]) -> None:
        self._at("evaluation", trainer)

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._at("step_end", trainer)

    def on_save_checkpoint(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.moment == "checkpoint" and trainer.global_step == self.step:
            torch.save = _half  # type: ignore[assignment]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._at("end", trainer)


def _half(value: Any, file: Any) -> None:
    file.write(b"half of a checkpoint")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_process(arguments: list[str], folder: Path) -> int:
    """Run ``dppo`` in a process of its own, forked from one that has imported it, and return its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    process = context.Process(target=_command, args=(arguments, str(folder)))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _command(arguments: list[str], folder: str) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    with shortened():
        main(arguments)


def what_it_made(run: Path) -> dict[str, Any]:
    """Everything that a run that went on must have in common with one that was never interrupted."""
    logs = {name: (run / name).read_text() for name in LOGS if (run / name).exists()}
    (last,) = {path.resolve() for path in (run / "checkpoints").glob("last.ckpt")}
    return logs | {"metrics": metric_rows(run / "metrics.csv"), "weights": weights_of(last), "last": last.name}


def metric_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a run's metrics, without what says when something was done, and what has no value."""
    with path.open(newline="") as file:
        return [
            {name: value for name, value in row.items() if value and not name.startswith(TIMES)}
            for row in csv.DictReader(file)
        ]


def weights_of(checkpoint: Path) -> dict[str, Tensor]:
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare two results of ``what_it_made``, to the last bit."""
    for name in expected:
        if name != "weights":
            assert found[name] == expected[name], name
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=0, msg=name)
