"""``dppo doctor`` itself: its options, and the report that it prints."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from rich.table import Table

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.run.doctor.machine import Finding, Status, available_memory, examine
from dppo_lightning.run.doctor.memory import GIB
from dppo_lightning.run.doctor.recipe import report
from dppo_lightning.run.parsing import OneLineParser, underscored
from dppo_lightning.run.slurm.job import device_count

COLOURS: dict[Status, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor_parser() -> LightningArgumentParser:
    """Parser of ``dppo doctor``."""
    parser = OneLineParser(prog="dppo doctor", description="Check this machine, and size a recipe.")
    parser.add_argument("--config", action="append", default=[], help="Recipe; several combine, the last one wins.")
    parser.add_argument("--gpus", type=int, help="Number of GPUs to size the recipe for.")
    parser.add_argument("--gpu_memory_gib", type=float, help="Memory of each GPU, in GiB.")
    return parser


def run_doctor(arguments: list[str], read_recipe: Callable[[list[str]], Mapping[str, Any]]) -> None:
    """Run ``dppo doctor``; exit with code 1 when something fails.

    Args:
        arguments: Words of the command line after ``dppo doctor``.
        read_recipe: Function that parses recipe files as ``dppo fit`` does, and builds nothing.
    """
    chosen = doctor_parser().parse_args(underscored(arguments))
    recipe = read_recipe(chosen.config) if chosen.config else None
    if not print_report(recipe, chosen.gpus, chosen.gpu_memory_gib):
        sys.exit(1)


def print_report(
    recipe: Mapping[str, Any] | None = None, gpus: int | None = None, gpu_memory_gib: float | None = None
) -> bool:
    """Print what was found of the machine and of the recipe; returns whether nothing fails.

    Args:
        recipe: Parsed configuration to size; None: the machine alone.
        gpus: Number of GPUs to size for; None: as many as the recipe uses.
        gpu_memory_gib: Memory of each GPU in GiB; None: that of this machine's first GPU, or, on a machine without
            one, what the machine has free.

    Raises:
        ConfigError: A number is out of range, or the recipe's model cannot be found.
    """
    if gpus is not None and gpus < 1:
        raise ConfigError(f"dppo doctor: --gpus must be >= 1, got {gpus}")
    if gpu_memory_gib is not None and not gpu_memory_gib > 0:
        raise ConfigError(f"dppo doctor: --gpu-memory-gib must be > 0, got {gpu_memory_gib}")
    if recipe is None and (gpus is not None or gpu_memory_gib is not None):
        raise ConfigError("dppo doctor: --gpus and --gpu-memory-gib size a recipe: give one with --config")
    console = Console()
    findings = examine(os.environ, recipe)
    console.print(findings_table(findings))
    healthy = all(finding.status != "fail" for finding in findings)
    if recipe is None:
        return healthy
    trainer = recipe["trainer"]
    ranks = gpus or device_count(trainer.get("devices")) * int(trainer.get("num_nodes") or 1)
    table, lines, fits = report(recipe, ranks, gpu_bytes(gpu_memory_gib))
    console.print(table)
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return healthy and fits


def gpu_bytes(gib: float | None) -> float:
    """Bytes of the GPU to size for: ``gib`` GiB, or this machine's first GPU, or the free memory of the machine."""
    if gib is not None:
        return gib * GIB
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return available_memory()


def findings_table(findings: list[Finding]) -> Table:
    """Lay out the findings, one in each row."""
    table = Table(title="dppo doctor")
    for heading in ("", "what", "found", "what to do"):
        table.add_column(heading)
    for finding in findings:
        colour = COLOURS[finding.status]
        table.add_row(f"[{colour}]{finding.status}[/]", finding.what, finding.found, finding.todo)
    return table
