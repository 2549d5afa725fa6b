"""Requeue: a job whose time is up saves the run at the end of its optimizer step and goes back into SLURM's queue."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl

from dppo_lightning.errors import ConfigError, Requeued

log = logging.getLogger(__name__)

CHECKPOINT = "requeue.ckpt"
SIGNAL = signal.SIGUSR1


class Requeue(pl.Callback):
    """On SIGUSR1: finish the optimizer step, save ``requeue.ckpt`` in the run directory, queue the job again, stop.

    Lightning's own requeueing saves inside the step that is running and loses a batch (its issue 21406), so this one
    goes with ``SLURMEnvironment(auto_requeue=False)``. The signal only sets a flag; the ranks agree on it after every
    optimizer step, since it reaches them at different times. The run stops by raising ``Requeued``, for which the
    command line exits with code 0.
    """

    def __init__(self) -> None:
        self.saved: Path | None = None
        self._asked = False

    def listen(self) -> None:
        """Wait for the signal from now on; must be called in the main thread, before an engine is started."""
        signal.signal(SIGNAL, self._note)
        # SLURM may signal every process of the job. The mask is inherited: the engine, which has no handler, would die
        # of the signal. Where no other thread of ours takes it, it stays pending until we look.
        signal.pthread_sigmask(signal.SIG_BLOCK, {SIGNAL})

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._asked = True

    def asked(self) -> bool:
        """Whether this process has been sent the signal."""
        if SIGNAL in signal.sigpending():
            signal.sigwait({SIGNAL})
            self._asked = True
        return self._asked

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.listen()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches or trainer.global_step >= trainer.max_steps:
            return
        if trainer.strategy.reduce_boolean_decision(self.asked(), all=False):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what SLURM sends to a job that it queues again
            self.saved = save(trainer, Path(trainer.default_root_dir) / CHECKPOINT)
            trainer.limit_val_batches = 0  # no held-out evaluation on the way out: an uninterrupted run has none here
            trainer.should_stop = True  # the module still logs this step

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._leave(trainer)  # trainer.min_steps would let the run go on

    def _leave(self, trainer: pl.Trainer) -> None:
        if self.saved is None:
            return
        where = f"saved after step {trainer.global_step} in {self.saved}"
        if trainer.is_global_zero:
            requeue(os.environ, where)
        raise Requeued(f"{where}; job {os.environ.get('SLURM_JOB_ID')} is queued again")


def save(trainer: pl.Trainer, path: Path) -> Path:
    """Save a checkpoint that appears only when it is whole; every rank must call."""
    unfinished = path.with_name(f"unfinished-{path.name}")
    trainer.save_checkpoint(unfinished)
    if trainer.is_global_zero:
        if path.is_dir():  # sharded strategies write folders
            shutil.rmtree(path)
        os.replace(unfinished, path)
    trainer.strategy.barrier("requeue")
    return path


def requeue(environ: Mapping[str, str], saved: str) -> None:
    """Put this process's job back into the queue.

    Raises:
        ConfigError: SLURM refuses; the checkpoint is there all the same.
    """
    command = ["scontrol", "requeue", environ["SLURM_JOB_ID"]]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        reason = done.stderr.strip() if done.returncode else None
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    if reason is not None:
        raise ConfigError(
            f"{saved}, but `{' '.join(command)}` failed ({reason}): submit with #SBATCH --requeue, "
            "or submit again with --ckpt_path"
        )


def checkpoint_to_continue(environ: Mapping[str, str], run_dir: Path) -> Path | None:
    """Where a job that SLURM has started again goes on: the run's newest checkpoint, None in a job's first start."""
    if int(environ.get("SLURM_RESTART_COUNT") or 0) < 1:
        return None
    there = [path for path in (run_dir / CHECKPOINT, run_dir / "checkpoints" / "last.ckpt") if path.exists()]
    return max(there, key=lambda path: path.stat().st_mtime, default=None)
