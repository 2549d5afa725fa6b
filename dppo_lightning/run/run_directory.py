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
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dppo_lightning.base.errors import ConfigError, DataError, one_line

CHECKPOINTS = "checkpoints"
"""Name of the folder of checkpoints in a run directory."""
LAST, BEST = "last.ckpt", "best.ckpt"
"""Names of the links to a checkpoint, in that folder."""
UNFINISHED = ".unfinished-"
"""Prefix of what is being written; whatever has it after a kill is garbage."""
KEPT = (".lock", "before", "logs")
"""What ``set_aside`` leaves in its place."""
_STEP = re.compile(r"step=(\d+)\.ckpt")


class RunDirectory:
    """A run on disk.

    Args:
        path: Folder of the run; it need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
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
            (self.path / ".lock").unlink(missing_ok=True)

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

    def remove_unfinished(self) -> None:
        """Remove what a process was writing when it was killed; only for the one that holds the lock."""
        for folder in (self.path, self.checkpoints, self.path / "sessions"):
            for path in folder.glob(f"{UNFINISHED}*"):
                remove(path)

    def remove_checkpoints_after(self, step: int) -> None:
        """Remove checkpoints of more than ``step`` steps: the run goes on from ``step``, so they are of no run."""
        for path in self.checkpoints.glob("step=*.ckpt"):
            if step_of(path) > step:
                remove(path)


def step_of(checkpoint: Path) -> int:
    """Number of optimizer steps that a checkpoint's name says; -1 for a name of another form."""
    found = _STEP.fullmatch(checkpoint.name)
    return -1 if found is None else int(found[1])


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Write a file or a folder that appears under its name only when it is whole and on the disk.

    Yields:
        Path to write to, in the same folder; it is removed if an error is raised.

    Raises:
        DataError: There is no room, or the folder cannot be written to.
    """
    unfinished = path.with_name(UNFINISHED + path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(unfinished)
        yield unfinished
        bring_to_disk(unfinished)
        replace(unfinished, path)
    except BaseException as error:
        remove(unfinished)
        if not _is_disk_error(error):
            raise
        raise DataError(f"{path} could not be written ({one_line(error)}): make room and go on") from (error)


def write_text(path: Path, text: str) -> None:
    """Write a small text file, whole or not at all."""
    with written_whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def replace(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target``; what had that name is removed after, so that no moment lacks both."""
    old = target.with_name(f"{UNFINISHED}old-{target.name}")
    if target.is_dir() and not target.is_symlink():  # a folder cannot be replaced by a rename
        os.rename(target, old)
    os.replace(source, target)
    remove(old)
    _sync(target.parent)


def point(link: Path, target: Path) -> None:
    """Make ``link`` a link to ``target``, in the same folder; no moment lacks it."""
    fresh = link.with_name(UNFINISHED + link.name)
    remove(fresh)
    fresh.symlink_to(target.name)
    os.replace(fresh, link)
    _sync(link.parent)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def bring_to_disk(path: Path) -> None:
    """Have the system write a file, or all files of a folder, to the disk."""
    for found in [*path.rglob("*"), path]:
        _sync(found)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_disk_error(error: BaseException) -> bool:
    """Whether the disk is to blame; torch reports a full one as a RuntimeError of its own."""
    return isinstance(error, OSError) or (isinstance(error, RuntimeError) and "PytorchStreamWriter" in str(error))


class LogMarks:
    """How long each log of a run is, so that a run that goes on from a checkpoint can cut them back to it.

    A log is a file that only grows. ``metrics.csv`` is written anew when a metric appears, so its length is counted in
    rows, by its own logger.

    Args:
        path: Run directory.
    """

    PATTERNS = ("*.jsonl", "timeline.json", "tensorboard/**/*")

    def __init__(self, path: Path) -> None:
        self.path = path

    def take(self) -> dict[str, int]:
        """Length of each log in bytes, by its path in the run directory."""
        return {str(log.relative_to(self.path)): log.stat().st_size for log in self._logs()}

    def cut_back(self, lengths: dict[str, int]) -> None:
        """Cut every log to its length; a log that was not there then is removed.

        Raises:
            DataError: A log is shorter than it was: someone has changed it.
        """
        for log in self._logs():
            name = str(log.relative_to(self.path))
            if name not in lengths:
                log.unlink()
            elif log.stat().st_size < lengths[name]:
                raise DataError(
                    f"{log} has lost lines since the checkpoint was written ({log.stat().st_size} bytes of "
                    f"{lengths[name]}): restore it, or move it away"
                )
            else:
                os.truncate(log, lengths[name])

    def _logs(self) -> list[Path]:
        found = [log for pattern in self.PATTERNS for log in sorted(self.path.glob(pattern))]
        return [log for log in found if log.is_file()]


def fresh(path_of: Callable[[int], Path]) -> Path:
    """Make the first folder of ``path_of(1), path_of(2), …`` that does not exist; two processes never get the same."""
    number = 1
    while True:
        path = path_of(number)
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            number += 1
