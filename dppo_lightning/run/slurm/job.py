"""A run under SLURM: SlurmRun checks its set-up; Requeue saves it when its time is up, and queues it again."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import ClusterEnvironment, SLURMEnvironment

from dppo_lightning.base.errors import ConfigError, Stopped
from dppo_lightning.run.callbacks.stop import SavedStop
from dppo_lightning.run.slurm.check import check_slurm, started_by_srun, under_slurm

log = logging.getLogger(__name__)

SIGNAL = signal.SIGUSR1
"""Signal that SLURM sends some time before the limit, see ``#SBATCH --signal`` in script.py."""


class Requeue(SavedStop):
    """On SIGUSR1: finish the optimizer step, save a checkpoint, queue the job again, stop with exit code 0.

    Lightning's own requeueing saves inside the step that is running and loses a batch (its issue 21406), so this one
    goes with ``SLURMEnvironment(auto_requeue=False)``. The signal only sets a flag; the ranks agree on it after every
    optimizer step, since it reaches them at different times. A rollout that is being generated is not waited for.
    """

    def __init__(self) -> None:
        self._signalled = False

    def listen(self) -> None:
        """Notice the signal from now on; must be called in the main thread, before an engine is started."""
        signal.signal(SIGNAL, self._on_signal)
        # SLURM may signal every process of the job. The engine has no handler and would die of the signal, but it
        # inherits the mask that is set here. Where no other thread of ours takes the signal, it stays pending until
        # ``requested`` looks.
        signal.pthread_sigmask(signal.SIG_BLOCK, {SIGNAL})

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self._signalled = True

    def requested(self) -> bool:
        if SIGNAL in signal.sigpending():
            signal.sigwait({SIGNAL})
            self._signalled = True
        return self._signalled

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.listen()

    def leave(self, trainer: pl.Trainer, saved: Path) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # SLURM sends it to a job that it queues again
        where = f"saved after step {trainer.global_step} in {saved}"
        if trainer.is_global_zero:
            requeue(os.environ, where)
        raise Stopped(f"{where}; job {os.environ.get('SLURM_JOB_ID')} is queued again", 0, on_every_rank=True)


def requeue(environ: Mapping[str, str], saved: str) -> None:
    """Put this process's job back into SLURM's queue.

    Args:
        environ: Environment variables of this process.
        saved: Phrase that says what was saved and where, for the message.

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
            "or submit again with --resume"
        )


def started_again(environ: Mapping[str, str]) -> bool:
    """Whether SLURM has started this job before."""
    return int(environ.get("SLURM_RESTART_COUNT") or 0) > 0


class SlurmRun:
    """Check the job's set-up and add requeueing to the trainer; outside SLURM, do nothing.

    The log says what is added. A recipe that has its own wins: a ``Requeue`` among its callbacks, or a cluster
    environment among its plugins, which then also decides about requeueing.

    Args:
        environ: Environment variables of this process.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ
        self.active = started_by_srun(environ)

    def check(self, trainer: Mapping[str, Any]) -> None:
        """Compare the job with the trainer's configuration, and wait for the other tasks.

        Args:
            trainer: Settings under ``trainer`` in the configuration.

        Raises:
            ConfigError: They do not fit together, or a task does not start.
        """
        if under_slurm(self.environ):
            check_slurm(self.environ, device_count(trainer.get("devices")), int(trainer.get("num_nodes") or 1))

    def callbacks(self, configured: list[pl.Callback]) -> list[pl.Callback]:
        """Callbacks to add: ``Requeue``, which listens from now on; none if one is configured."""
        if not self.active or any(isinstance(callback, Requeue) for callback in configured):
            return []
        if self.environ.get("SLURM_PROCID") == "0":
            job = self.environ["SLURM_JOB_ID"]
            log.info(f"SLURM job {job}: on SIGUSR1 the run is saved after its step and the job is queued again")
        callback = Requeue()
        callback.listen()
        return [callback]

    def plugins(self, configured: Any) -> list[Any] | None:
        """Plugins of the trainer: the configured ones, and an environment that leaves requeueing to ``Requeue``.

        The environment is left out where one is configured.
        """
        given = [] if configured is None else list(configured) if isinstance(configured, list) else [configured]
        if self.active and not any(isinstance(plugin, ClusterEnvironment) for plugin in given):
            given.append(SLURMEnvironment(auto_requeue=False))
        return given or None


def device_count(devices: Any) -> int:
    """Number of processes on a node that a value of ``trainer.devices`` stands for."""
    if isinstance(devices, list):
        return len(devices)
    text = str(devices)
    if text in ("auto", "-1", "None"):
        return max(torch.cuda.device_count(), 1)
    return int(text) if text.isdigit() else len([part for part in text.split(",") if part.strip()])


def default_run_dir(environ: Mapping[str, str]) -> str | None:
    """Run directory of a task that srun started: the same for every rank, and in every start of the job."""
    return f"runs/slurm-{environ['SLURM_JOB_ID']}" if started_by_srun(environ) else None
