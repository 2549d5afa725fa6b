"""DeepSpeed's compiled operations on disk: where they are, and locks of builds that were killed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

EXTENSIONS = Path("~/.cache/dppo-lightning/torch_extensions")
"""Folder of DeepSpeed's compiled operations, unless TORCH_EXTENSIONS_DIR names another."""

STALE_SECONDS = 3600.0
"""Age of a lock, in seconds, from which its build is taken for dead: a build takes minutes."""


def stale_locks(folders: Iterable[Path], now: float) -> list[str]:
    """Find the locks of killed builds of DeepSpeed operations; a run that needs such a one waits for ever, silently.

    Args:
        folders: Folders that may hold a folder for each extension that torch has built.
        now: Present time, in seconds since the epoch.
    """
    locks = {lock for folder in folders for depth in ("*", "*/*") for lock in folder.glob(f"{depth}/lock")}
    return sorted(str(lock) for lock in locks if now - _written(lock, now) > STALE_SECONDS)


def _written(path: Path, now: float) -> float:
    """Time of a file's last change, in seconds since the epoch; ``now`` where a build has just removed it."""
    try:
        return path.stat().st_mtime
    except OSError:
        return now
