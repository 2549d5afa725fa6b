"""Files and folders that appear under their names only when they are whole and on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dppo_lightning.base.errors import DataError, one_line

UNFINISHED = ".unfinished-"
"""Prefix of what is being written; whatever has it after a kill is garbage."""
TORCH_CANNOT_WRITE = ("inline_container", "iostream", "PytorchStreamWriter")
"""Words in the RuntimeErrors that torch raises where a file cannot be written."""


def unfinished_of(path: Path) -> Path:
    """Path to write to, in the same folder, until what is to be ``path`` is whole."""
    return path.with_name(UNFINISHED + path.name)


@contextmanager
def reporting(path: Path) -> Iterator[None]:
    """Say in one line that ``path`` cannot be written, where the disk is to blame, and remove what is unfinished.

    Raises:
        DataError: There is no room, or the folder cannot be written to.
    """
    try:
        yield
    except BaseException as error:
        remove(unfinished_of(path))
        fault = _fault_of_the_disk(error)
        if fault is None:
            raise
        raise DataError(
            f"{path} could not be written ({one_line(fault)}): make room; what was there before still is"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a small text file, whole or not at all."""
    unfinished = unfinished_of(path)
    with reporting(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(text, encoding="utf-8")
        bring_to_disk(unfinished)
        replace(unfinished, path)


def append_text(path: Path, text: str) -> None:
    """Add whole lines to a log.

    Raises:
        DataError: There is no room; a line that is torn by it is cut off when the run goes on.
    """
    with reporting(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8", newline="") as file:
            file.write(text)


def replace(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target``; what had that name is removed after, so that no moment lacks both."""
    old = target.with_name(f"{UNFINISHED}old-{target.name}")
    if target.is_dir() and not target.is_symlink():  # a folder cannot be replaced by a rename
        os.rename(target, old)
    os.replace(source, target)
    remove(old)
    sync(target.parent)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def bring_to_disk(path: Path) -> None:
    """Have the system write a file, or all files of a folder, to the disk."""
    for found in [*path.rglob("*"), path]:
        sync(found)


def sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fault_of_the_disk(error: BaseException | None) -> BaseException | None:
    """Error that says what is wrong with the disk, where it is to blame; torch hides it behind errors of its own."""
    found: BaseException | None = None
    while error is not None:
        of_torch = isinstance(error, RuntimeError) and any(word in str(error) for word in TORCH_CANNOT_WRITE)
        if isinstance(error, OSError) or (of_torch and found is None):
            found = error
        error = error.__cause__ or error.__context__
    return found
