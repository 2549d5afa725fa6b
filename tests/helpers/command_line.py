"""The command line where a test is not: on every rank of a pool, and in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from dppo_lightning.run.cli import main
from tests.helpers.places import ROOT
from tests.helpers.run_files import read_metrics
from tests.helpers.short_runs import shortened


def fit(folder: Path, arguments: list[str]) -> dict[str, list[float]]:
    """Run ``dppo fit`` on this rank, in ``folder``, and return the logged metrics by name."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        with shortened():
            main(["fit", *arguments, "--run_dir", "run"])
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        return read_metrics(folder / "run" / "metrics.csv")
    finally:
        os.chdir(before)


def dppo(*arguments: str | Path) -> str:
    """Run ``dppo`` in a process of its own, at the root of the repository, and return what it prints."""
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, timeout=1200).stdout
