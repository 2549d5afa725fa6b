"""``dppo fit`` on every rank of a pool."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import torch

from dppo_lightning.cli import main


def fit(folder: Path, arguments: list[str]) -> dict[str, list[float]]:
    """Run in ``folder``; on rank 0 the logged metrics by name."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        main(["fit", *arguments, "--run_dir", "run"])
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        return logged(folder / "run" / "metrics.csv")
    finally:
        os.chdir(before)


def logged(path: Path) -> dict[str, list[float]]:
    """The columns of a run's metrics.csv, without their gaps."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}
