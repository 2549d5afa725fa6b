"""RunDirectory: the one owner of a run on disk. It claims and locks the folder, and knows what can be gone on from.

    RUN/.lock           held by the process that trains; the lock of a process that has died is free
    RUN/run.json        the sessions of the run: command, versions, commit, configuration of each
    RUN/config.yaml     the configuration of the last session; ``sessions/<n>.yaml`` has that of each
    RUN/checkpoints/    ``step=<n>.ckpt``, each whole; ``last.ckpt`` and ``best.ckpt`` point to two of them
    RUN/before/<n>/     files of a session that was started again without a checkpoint

Whatever is written under its final name is whole: it is written beside it, brought to the disk, renamed.
"""

from __future__ import annotations

import json
import os
import re
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dppo_lightning.base.errors import ConfigError, DataError, one_line
from dppo_lightning.run.metrics_file import METRICS, cut_rows
from dppo_lightning.run.whole_files import UNFINISHED, remove, sync, unfinished_of, write_text

CHECKPOINTS = "checkpoints"
"""Name of the folder of checkpoints in a run directory."""
LAST, BEST = "last.ckpt", "best.ckpt"
"""Names of the links to a checkpoint, in that folder."""
LOGS = ("*.jsonl", "timeline.json", "tensorboard/**/*")
"""Patterns of the files that only grow."""
FORMAT = 1
"""Number of the format of a note, and so of a checkpoint: a newer one is refused."""
KEPT = (".lock", "before", "logs", "config.yaml")
"""What ``set_aside`` leaves in its place: without its settings a run could not be gone on with once more."""
_STEP = re.compile(r"step=(\d+)\.ckpt")


class RunDirectory:
    """A run on disk.

    Args:
        path: Folder of the run; it need not exist.
        alone: Whether the folder that it is in was made for it.
    """

    def __init__(self, path: str | Path, alone: bool = False) -> None:
        self.path = Path(path)
        self.alone = alone
        self.checkpoints = self.path / CHECKPOINTS
        self._lock: FileLock | None = None

    @property
    def holds_run(self) -> bool:
        """Whether a run has begun here."""
        return any((self.path / name).exists() for name in ("config.yaml", "completions.jsonl", CHECKPOINTS))

    def claim(self) -> None:
        """Make the folder, and take its lock until this process ends or ``release`` is called.

        Raises:
            ConfigError: Another process trains in it, or it cannot be written to.
        """
        if self._lock is not None:
            return
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            who = self.sessions[-1:] or [{}]
            at = f" (process {who[0]['pid']} on {who[0]['host']})" if "pid" in who[0] else ""
            raise ConfigError(
                f"another process{at} is training in {str(self.path)!r}: wait for it, or set --run_dir to a new folder"
            ) from None
        except OSError as error:
            raise ConfigError(f"run directory {str(self.path)!r} cannot be used: {one_line(error)}") from error
        self._lock = lock

    def release(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @property
    def sessions(self) -> list[dict[str, Any]]:
        """Sessions of the run, from ``run.json``; none where there is no such file or it cannot be read."""
        try:
            found = json.loads((self.path / "run.json").read_text(encoding="utf-8"))["sessions"]
        except (OSError, ValueError, KeyError, TypeError):
            return []
        return found if isinstance(found, list) else []

    def newest(self) -> Path | None:
        """Find the checkpoint to go on from: where ``last.ckpt`` points, else the one of the most steps, else none."""
        linked = self.checkpoints / LAST
        if linked.exists():
            return linked.resolve()
        steps = {step_of(path): path for path in self.checkpoints.glob("step=*.ckpt")}
        return steps[max(steps)] if steps else None

    def resolve(self, name: str) -> Path:
        """Find a checkpoint.

        Args:
            name: "last", "best", the name of a checkpoint of this run, with or without ".ckpt", or a path.

        Raises:
            ConfigError: There is no such checkpoint.
        """
        newest = self.newest() if name == "last" else None
        for path in (newest, self.checkpoints / f"{name}.ckpt", self.checkpoints / name, Path(name)):
            if name and path is not None and path.exists():
                return path.resolve() if path.is_symlink() else path
        found = sorted((path.name for path in self.checkpoints.glob("*.ckpt")), key=lambda name: (len(name), name))
        there = f"there are {', '.join(found)}" if found else "it has none"
        raise ConfigError(f"no checkpoint {name!r} in {self.checkpoints}: {there}; name one of them, or a path")

    def checkpoint_of(self, step: int) -> Path:
        """Path of the checkpoint after ``step`` optimizer steps."""
        return self.checkpoints / f"step={step}.ckpt"

    def note(self, checkpoint: Path) -> dict[str, Any]:
        """Read what was noted of a checkpoint of this run: see ``write_note``; nothing where there is no note."""
        try:
            found = json.loads(_note_of(checkpoint.resolve()).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write_note(self, step: int, values: dict[str, Any]) -> None:
        """Note, beside the checkpoint of ``step``, how long the logs are, and further plain values."""
        note = {"format": FORMAT, "step": step, "logs": self._log_lengths()} | values
        write_text(_note_of(self.checkpoint_of(step)), json.dumps(note, indent=1) + "\n")

    def cut_back(self, checkpoint: Path) -> None:
        """Cut every log back to where it was when the checkpoint was written; remove checkpoints of later steps.

        A log is a file that only grows; ``metrics.csv`` is written anew when a metric appears, so its rows are counted.

        Raises:
            DataError: A log has lost lines since.
        """
        note = self.note(checkpoint)
        if "logs" not in note:
            raise DataError(f"{_note_of(checkpoint)} is missing or damaged: it says how long the logs were")
        for log in self._logs():
            name = str(log.relative_to(self.path))
            length = note["logs"].get(name)
            if length is None:
                log.unlink()
            elif log.stat().st_size < length:
                raise DataError(
                    f"{log} has lost lines since {checkpoint.name} was written: it has {log.stat().st_size} bytes and "
                    f"had {length}: restore it, or start a new run"
                )
            else:
                os.truncate(log, length)
        cut_rows(self.path / METRICS, note.get("rows", 0))
        for path in self.checkpoints.glob("step=*.ckpt"):
            if step_of(path) > note["step"]:
                self._remove_checkpoint(path)

    def _log_lengths(self) -> dict[str, int]:
        return {str(log.relative_to(self.path)): log.stat().st_size for log in self._logs()}

    def _logs(self) -> list[Path]:
        found = [log for pattern in LOGS for log in sorted(self.path.glob(pattern))]
        return [log for log in found if log.is_file()]

    def point(self, name: str, checkpoint: Path) -> None:
        """Make ``last.ckpt`` or ``best.ckpt`` a link to a checkpoint; at no moment is it missing."""
        link = self.checkpoints / name
        fresh = unfinished_of(link)
        remove(fresh)
        fresh.symlink_to(checkpoint.name)
        os.replace(fresh, link)
        sync(link.parent)

    def prune(self, keep: int) -> None:
        """Remove all checkpoints but the ``keep`` newest and those that a link points to."""
        linked = {(self.checkpoints / name).resolve() for name in (LAST, BEST)}
        newest = sorted(self.checkpoints.glob("step=*.ckpt"), key=step_of)
        for path in newest[:-keep]:
            if path.resolve() not in linked:
                self._remove_checkpoint(path)

    def _remove_checkpoint(self, path: Path) -> None:
        for link in (self.checkpoints / LAST, self.checkpoints / BEST):
            if link.is_symlink() and link.resolve() == path.resolve():
                link.unlink()
        remove(path)
        remove(_note_of(path))

    def set_aside(self) -> Path | None:
        """Move the files of a session that left no checkpoint into ``before/<n>``; the folder, if there were any."""
        files = [path for path in self.path.iterdir() if path.name not in KEPT] if self.path.is_dir() else []
        if not files:
            return None
        before = self.path / "before"
        target = before / str(len(list(before.iterdir())) if before.is_dir() else 0)
        target.mkdir(parents=True)
        for path in files:
            os.rename(path, target / path.name)
        return target

    def discard_unless_begun(self) -> None:
        """Remove the files of a run that failed before its first completion, so that the folder can be used again."""
        if any((self.path / name).exists() for name in ("completions.jsonl", "heldout.jsonl", CHECKPOINTS)):
            return
        for name in ("config.yaml", "run.json", "start.txt", METRICS, "sessions", "tensorboard", ".lock"):
            remove(self.path / name)
        self.release()
        for folder in (self.path, self.path.parent) if self.alone else (self.path,):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def remove_unfinished(self) -> None:
        """Remove what a process was writing when it was killed; only for the one that holds the lock."""
        for folder in (self.path, self.checkpoints, self.path / "sessions"):
            for path in folder.glob(f"{UNFINISHED}*"):
                remove(path)


def step_of(checkpoint: Path) -> int:
    """Number of optimizer steps that a checkpoint's name says; -1 for a name of another form."""
    found = _STEP.fullmatch(checkpoint.name)
    return -1 if found is None else int(found[1])


def _note_of(checkpoint: Path) -> Path:
    return checkpoint.with_suffix(".json")


def new_run_dir(parent: Path) -> RunDirectory:
    """Make a folder named by the present time; two processes never get the same one."""
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    first = not parent.exists()
    for number in count(2):
        try:
            (parent / name).mkdir(parents=True)
            return RunDirectory(parent / name, alone=first)
        except FileExistsError:
            name = f"{name.partition('+')[0]}+{number}"
    raise AssertionError
