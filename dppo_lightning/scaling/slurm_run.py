"""What a run started by srun has beside what every run has."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import ClusterEnvironment, SLURMEnvironment

from dppo_lightning.scaling.requeue import Requeue
from dppo_lightning.scaling.slurm_check import check_slurm, started_by_srun, under_slurm

log = logging.getLogger(__name__)


class SlurmRun:
    """Checks the job's set-up and adds requeueing to the trainer; does nothing outside SLURM.

    What is added is said in the log, and a recipe that brings its own wins: a ``Requeue`` among its callbacks, or a
    cluster environment among its plugins, which then also decides about requeueing.

    Args:
        environ: Environment variables of this process.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ
        self.active = started_by_srun(environ)

    def check(self, trainer: Mapping[str, Any]) -> None:
        """Compare the job with the trainer's configuration, and wait for the other tasks.

        Raises:
            ConfigError: They do not fit together, or not everybody comes.
        """
        if under_slurm(self.environ):
            check_slurm(self.environ, device_count(trainer.get("devices")), int(trainer.get("num_nodes") or 1))

    def callbacks(self, configured: list[pl.Callback]) -> list[pl.Callback]:
        """``Requeue``, which listens from now on, unless one is configured."""
        if not self.active or any(isinstance(callback, Requeue) for callback in configured):
            return []
        if self.environ.get("SLURM_PROCID") == "0":
            job = self.environ["SLURM_JOB_ID"]
            log.info(f"SLURM job {job}: on SIGUSR1 the run is saved after its step and the job is queued again")
        callback = Requeue()
        callback.listen()
        return [callback]

    def plugins(self, configured: Any) -> list[Any] | None:
        """The configured plugins and, unless there is one, an environment that leaves requeueing to ``Requeue``."""
        given = [] if configured is None else list(configured) if isinstance(configured, list) else [configured]
        if self.active and not any(isinstance(plugin, ClusterEnvironment) for plugin in given):
            given.append(SLURMEnvironment(auto_requeue=False))
        return given or None


def device_count(devices: Any) -> int:
    """Processes on a node that a value of ``trainer.devices`` stands for."""
    if isinstance(devices, list):
        return len(devices)
    text = str(devices)
    if text in ("auto", "-1", "None"):
        return max(torch.cuda.device_count(), 1)
    return int(text) if text.isdigit() else len([part for part in text.split(",") if part.strip()])


def default_run_dir(environ: Mapping[str, str]) -> str | None:
    """Run directory of a task that srun started: the same for every rank, and in every start of the job."""
    return f"runs/slurm-{environ['SLURM_JOB_ID']}" if started_by_srun(environ) else None
