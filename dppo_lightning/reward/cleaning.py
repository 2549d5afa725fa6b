"""End of what a scorer has started, and of the files that it has written."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import time
from contextlib import suppress

import psutil


def end_descendants(pid: int) -> None:
    """Kill every process that ``pid`` has started, directly or not; those that start more meanwhile too."""
    try:
        parent = psutil.Process(pid)
    except psutil.NoSuchProcess:
        return
    while True:
        alive = []
        for child in parent.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if child.status() != psutil.STATUS_ZOMBIE:
                    child.send_signal(signal.SIGKILL)
                    alive.append(child)
        if not alive:
            return
        time.sleep(0.001)


def empty(folder: str) -> None:
    """Remove what is in a folder, also where its owner may not."""
    for root, folders, _ in os.walk(folder):
        for name in folders:
            path = os.path.join(root, name)
            if not os.path.islink(path):
                os.chmod(path, stat.S_IRWXU)
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            os.unlink(entry.path)


def remove(folder: str) -> None:
    """Remove a folder."""
    if os.path.isdir(folder):
        empty(folder)
        os.rmdir(folder)
