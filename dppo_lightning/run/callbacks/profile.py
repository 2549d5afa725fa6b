"""Profile: a trace of some optimizer steps, by torch's profiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.profiler import ProfilerActivity, profile, schedule

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.train.hooks import ends_step

WARM_UP = 2
"""Number of optimizer steps before the trace: the first ones allocate, compile and fill caches."""


class Profile(pl.Callback):
    """Write ``profile.json`` in the run directory, a trace for chrome://tracing or ui.perfetto.dev.

    It holds ``steps`` optimizer steps after two that are left out, from the end of one step to the end of the last:
    generation (waiting for the engine, which runs in a process of its own), the training part, and the weight update of
    all but the last. Rank 0 only.

    Args:
        steps: Number of optimizer steps in the trace, >= 1.

    Raises:
        ConfigError: ``steps`` is out of range, or, when training starts, the run is too short for them.
    """

    def __init__(self, steps: int) -> None:
        if steps < 1:
            raise ConfigError(f"--profile must be a number of optimizer steps, at least 1, got {steps}")
        self.steps = steps
        self.running: profile | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        left = trainer.max_steps - trainer.global_step
        if left < self.steps + WARM_UP:
            raise ConfigError(
                f"--profile {self.steps} traces {self.steps} optimizer steps after {WARM_UP} others, and {left} are "
                f"left: set trainer.max_steps to at least {trainer.global_step + self.steps + WARM_UP}"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        path = Path(trainer.default_root_dir) / "profile.json"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self.running = profile(
            activities=activities,
            schedule=schedule(wait=WARM_UP - 1, warmup=1, active=self.steps, repeat=1),
            on_trace_ready=lambda finished: finished.export_chrome_trace(str(path)),
        )
        self.running.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.running is not None and ends_step(trainer, batch_idx):
            self.running.step()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.running is not None:
            self.running.stop()
        self.running = None
