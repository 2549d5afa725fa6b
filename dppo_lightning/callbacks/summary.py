"""Summary: three lines at the end of a run."""

from __future__ import annotations

import time
from pathlib import Path

import lightning.pytorch as pl

from dppo_lightning.callbacks.base import RunCallback
from dppo_lightning.metrics import heldout_metrics
from dppo_lightning.records import Group


class Summary(RunCallback):
    """Prints held-out reward and accuracy before and after, the time taken, and where things are."""

    def __init__(self) -> None:
        self.evaluations: list[dict[str, float]] = []
        self.started = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started = time.perf_counter()

    def on_heldout(self, trainer: pl.Trainer, pl_module: pl.LightningModule, groups: list[Group]) -> None:
        self.evaluations.append(heldout_metrics(groups, trainer.datamodule.solved_at))  # type: ignore[attr-defined]

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            print("\n".join(self.lines(trainer)), flush=True)

    def lines(self, trainer: pl.Trainer) -> list[str]:
        """The three lines."""
        seconds = time.perf_counter() - self.started
        return [
            self._heldout(),
            f"time: {seconds:.0f} s for {trainer.global_step} steps",
            f"run: {Path(trainer.default_root_dir)} (curves.png, metrics.csv, completions.jsonl, checkpoints/)",
        ]

    def _heldout(self) -> str:
        if not self.evaluations:
            return "held out: no held-out prompts"
        before, after = self.evaluations[0], self.evaluations[-1]
        reward = f"reward {before['heldout/reward']:.3f} -> {after['heldout/reward']:.3f}"
        accuracy = f"accuracy {before['heldout/avg_at_k']:.3f} -> {after['heldout/avg_at_k']:.3f}"
        change = after["heldout/reward"] - before["heldout/reward"]
        return f"held out: {reward} ({change:+.3f}), {accuracy}"
