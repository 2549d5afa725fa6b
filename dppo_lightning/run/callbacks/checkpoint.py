"""Checkpoint: saves the run, so that it can go on as if nothing had been."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.base.records import Group
from dppo_lightning.run.checkpoint_files import CheckpointFiles
from dppo_lightning.run.metrics_file import MetricsFile
from dppo_lightning.run.run_directory import BEST, LAST, RunDirectory
from dppo_lightning.run.whole_files import bring_to_disk, remove, replace, reporting, unfinished_of
from dppo_lightning.scaling.ranks import Ranks
from dppo_lightning.scaling.resume import apply_optimizer_settings, optimizer_settings
from dppo_lightning.train.datamodule import RolloutDataModule
from dppo_lightning.train.head import PolicyHead
from dppo_lightning.train.hooks import RunCallback
from dppo_lightning.train.module import DPPOModule


class Checkpoint(RunCallback, pl.callbacks.Checkpoint):
    """Save the run in ``checkpoints/step=<n>.ckpt`` of its directory, n being the optimizer steps taken.

    It holds weights, optimizer, schedule, the state of every random generator, prompt order, the rollout that is half
    used, groups generated ahead, and what the other callbacks keep. ``last.ckpt`` points to the newest. A checkpoint
    appears under its name only when it is whole.

    Args:
        every_n_steps: Optimizer steps between two checkpoints, >= 1; None: as between two evaluations.
        every_n_minutes: Longest time between two checkpoints, in minutes, > 0; the step that is running is finished.
        keep: Number of newest checkpoints that are kept, >= 1.
        best: Metric of the evaluations whose best checkpoint is kept, too, with ``best.ckpt`` pointing to it; None: no.
        mode: Whether the best value is the largest ("max") or the smallest ("min").
        settle: Wait, before saving, until what is being generated ahead is complete, so that a run that goes on from
            the checkpoint sees the very same tokens. Else requests in flight are asked again, with the same seeds and
            newer weights. Of no effect with ``data.streaming.max_staleness`` 0, when nothing is generated ahead.
        clock: Clock of ``every_n_minutes``, in seconds.

    Raises:
        ConfigError: A number is out of range; or, when training starts, ``best`` is no metric of the evaluations.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        every_n_minutes: float = 30.0,
        keep: int = 1,
        best: str | None = None,
        mode: Literal["max", "min"] = "max",
        settle: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("keep", keep)):
            if value is not None and value < 1:
                raise ConfigError(f"checkpoint.{name} must be >= 1, got {value}")
        if not every_n_minutes > 0:
            raise ConfigError(f"checkpoint.every_n_minutes must be > 0, got {every_n_minutes}")
        if mode not in ("max", "min"):
            raise ConfigError(f"checkpoint.mode must be max or min, got {mode!r}")
        self.every_n_steps = every_n_steps
        self.every_n_minutes = every_n_minutes
        self.keep = keep
        self.best = best
        self.mode = mode
        self.settle = settle
        self.clock = clock
        self._saved_at = 0.0  # time of the last checkpoint
        self._step = -1  # optimizer steps of the last checkpoint
        self._evaluated = False  # since the last checkpoint
        self._generators: list[dict[str, Any]] | None = None  # to restore when training starts
        self._projection: dict[str, Tensor | None] | None = None  # the same
        self._configured: list[dict[str, float]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # the user's own is left alone
            trainer.strategy.checkpoint_io = CheckpointFiles()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._configured = optimizer_settings(trainer)  # a checkpoint's take their place next

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        apply_optimizer_settings(trainer, self._configured)
        if self._projection is not None:
            head_of(pl_module).restore_rollout(self._projection)
            self._projection = None
        self._saved_at = self.clock()
        self._step = trainer.global_step
        if self.best is not None and self.best not in trainer.callback_metrics:
            found = sorted(name for name in trainer.callback_metrics if name.startswith("heldout/"))
            there = f"there are {', '.join(found)}" if found else "there are no held-out prompts"
            if trainer.global_step == 0:  # the evaluation before the first step has logged what there is
                raise ConfigError(f"checkpoint.best={self.best!r} is no metric of the evaluations: {there}")
        self._evaluated = False
        if self._generators is not None:
            restore_generators(self._generators[trainer.global_rank % len(self._generators)])
            self._generators = None

    def on_heldout(self, trainer: pl.Trainer, pl_module: pl.LightningModule, groups: list[Group]) -> None:
        self._evaluated = True

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step < trainer.max_steps and self._due(trainer):  # the last step's evaluation is to come
            self.save(trainer, self.settle)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step > self._step:
            self.save(trainer, self.settle)

    def _due(self, trainer: pl.Trainer) -> bool:
        data = data_of(trainer)
        every = data.evaluate_every_n_steps if self.every_n_steps is None else self.every_n_steps
        late = self.clock() - self._saved_at > 60 * self.every_n_minutes
        if trainer.world_size > 1:
            assert data.ranks is not None
            late = data.ranks.from_controller(late)
        return late or trainer.global_step % every == 0 or (self.best is not None and self._evaluated)

    def save(self, trainer: pl.Trainer, settle: bool) -> Path:
        """Save the run as it is between two optimizer steps; every rank must call. Returns the checkpoint's path.

        Args:
            trainer: Trainer of the run.
            settle: See the class.

        Raises:
            DataError: The checkpoint could not be written; the one before is still there.
            ConfigError: Something in it could not be loaded again without running code.
        """
        data, step = data_of(trainer), trainer.global_step
        run = RunDirectory(trainer.default_root_dir)
        path = run.checkpoint_of(step)
        if step == self._step and path.exists():
            return path
        if settle:
            data.settle()
        ranks = data.ranks
        assert ranks is not None
        unfinished = unfinished_of(path)
        with ranks.together(), reporting(path):
            if ranks.is_controller:
                path.parent.mkdir(parents=True, exist_ok=True)
                remove(unfinished)
        with ranks.together(), reporting(path):
            trainer.save_checkpoint(unfinished)
        with ranks.together(), reporting(path):
            if ranks.is_controller:
                bring_to_disk(unfinished)
                note = self._note(trainer)
                run.write_note(step, note)
                replace(unfinished, path)
                self._link(run, path, note["score"])
        self._step, self._saved_at, self._evaluated = step, self.clock(), False
        return path

    def _note(self, trainer: pl.Trainer) -> dict[str, Any]:
        """What can be known of the checkpoint without loading it."""
        module, data = trainer.lightning_module, data_of(trainer)
        assert isinstance(module, DPPOModule)
        rows = [logger.rows for logger in trainer.loggers if isinstance(logger, MetricsFile)]
        for logger in trainer.loggers:
            if isinstance(logger, pl.loggers.TensorBoardLogger):
                logger.experiment.flush()
        score = trainer.callback_metrics.get(self.best or "") if self._evaluated else None
        return {
            "settings": identity(module, data),
            "rows": rows[0] if rows else 0,
            "score": None if score is None else float(score),
        }

    def _link(self, run: RunDirectory, path: Path, score: float | None) -> None:
        """Point to the new checkpoint, and remove those that nothing keeps."""
        run.point(LAST, path)
        if self.best is not None and score is not None:
            before = run.note(run.checkpoints / BEST).get("score")
            sign = 1 if self.mode == "max" else -1
            if before is None or sign * score > sign * before:
                run.point(BEST, path)
        run.prune(self.keep)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        ranks = data_of(trainer).ranks
        assert isinstance(ranks, Ranks)
        checkpoint["generators"] = ranks.all_gather(state_of_generators())
        plan = data_of(trainer).plan
        if plan is not None and not plan.ends_rollout:
            checkpoint["rollout_projection"] = head_of(pl_module).rollout_state()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._generators = checkpoint.get("generators")
        self._projection = checkpoint.get("rollout_projection")


def head_of(module: pl.LightningModule) -> PolicyHead:
    """Return the head of the policy that is trained."""
    assert isinstance(module, DPPOModule)
    assert module.policy is not None
    return module.policy.head


def data_of(trainer: pl.Trainer) -> RolloutDataModule:
    """Return the rollout data module of the run."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(data, RolloutDataModule)
    return data


def identity(module: DPPOModule, data: RolloutDataModule) -> dict[str, Any]:
    """Return the settings that a run cannot change when it goes on, as plain values."""
    names = ("seed", "prompts_per_step", "samples_per_prompt", "steps_per_rollout")
    return module.settings | {f"data.{name}": getattr(data, name) for name in names}


def state_of_generators() -> dict[str, Any]:
    """Return the state of every global random generator of this process, as plain values and tensors."""
    kind, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), place, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_generators(state: dict[str, Any]) -> None:
    """Put the global random generators back to a state; devices that there are no more are left out."""
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    for device, saved in enumerate(state.get("cuda", [])[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(saved, device)
