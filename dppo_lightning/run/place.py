"""Where a command records, and what it goes on from: decided before anything slow begins."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from lightning.fabric.utilities import rank_zero

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.run.run_directory import RunDirectory, new_run_dir

log = logging.getLogger(__name__)

RUN_DIR = "DPPO_RUN_DIR"
"""Environment variable that tells the ranks that Lightning starts which directory rank 0 has chosen."""
RUNS = Path("runs")
"""Folder of the run directories that nobody has named."""


def is_rank_zero() -> bool:
    """Whether this process is rank 0, or will be when the ranks meet."""
    only: Any = rank_zero.rank_zero_only
    return bool(only.rank == 0)


def claim(named: str | None, chosen: str | None, goes_on: bool) -> tuple[RunDirectory, Path | None]:
    """Make a run directory this process's own, where its run goes on or where it begins.

    The other ranks find what rank 0 has left.

    Args:
        named: Run directory; None: a new one.
        chosen: Checkpoint to go on from, as ``RunDirectory.resolve`` takes it; None: none, or the newest of a run that
            goes on.
        goes_on: Whether a run that is there goes on.

    Returns:
        The run directory, and the checkpoint that the run goes on from, if any.

    Raises:
        ConfigError: It holds a run that is not to go on, another process trains in it, or there is no such checkpoint.
        DataError: A log has lost lines.
    """
    named = named or os.environ.get(RUN_DIR)
    run = RunDirectory(named) if named else new_run_dir(RUNS)
    os.environ[RUN_DIR] = str(run.path)
    goes_on = goes_on and run.holds_run
    if is_rank_zero():
        if run.holds_run and not goes_on:
            raise ConfigError(
                f"run directory {str(run.path)!r} already holds a run: go on with it by "
                f"dppo fit --resume {run.path}, or set --run_dir to a new one"
            )
        run.claim()
    checkpoint = run.resolve(chosen) if chosen is not None else run.newest() if goes_on else None
    if is_rank_zero() and goes_on:
        _go_on(run, checkpoint)
    return run, checkpoint


def _go_on(run: RunDirectory, checkpoint: Path | None) -> None:
    """Leave nothing in the directory that is later than the checkpoint, and say what is done."""
    run.remove_unfinished()
    if checkpoint is None:
        log.info(f"there is no checkpoint in {run.path}: the run begins anew; earlier files are in {run.set_aside()}")
        return
    newest = run.newest()
    if newest is not None and checkpoint.parent == newest.parent and checkpoint != newest:
        raise ConfigError(
            f"the run has gone on to {newest.name}: to go on from {checkpoint.name}, in a directory of its own: "
            f"dppo fit --config {run.path / 'config.yaml'} --ckpt_path {checkpoint} --run_dir NEW"
        )
    if newest is not None:
        run.cut_back(newest)
    log.info(f"the run goes on from {checkpoint}")


def find_checkpoint(named: str | None, chosen: str | None) -> str | None:
    """Find the checkpoint that ``validate``, ``test`` or ``generate`` reads.

    Args:
        named: Run directory, if one is named.
        chosen: Checkpoint, as ``RunDirectory.resolve`` takes it; None: none.

    Raises:
        ConfigError: There is no such checkpoint, or "last" and "best" come without a run.
    """
    if chosen is None:
        return None
    if chosen in ("last", "best") and named is None:
        raise ConfigError(f"--ckpt_path {chosen} needs the run: set --run_dir to its directory")
    return str(RunDirectory(named or ".").resolve(chosen))


def folder_of_evaluation(named: str | None) -> str:
    """Folder that ``validate`` and ``test`` write to: never a run's own files.

    Args:
        named: Run directory, if one is named; of one that holds a run a new folder in ``evaluations`` is taken.
    """
    if named is not None and not RunDirectory(named).holds_run:
        return named
    return str(new_run_dir(RUNS if named is None else Path(named) / "evaluations").path)
