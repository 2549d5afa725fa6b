"""Processes that tests start: which there are, whether they live, and how they end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

PATIENCE = 60.0
"""Seconds that a test waits for what always comes: a test that waits in vain fails, however loaded the machine is."""


def _stat(pid: int) -> list[str]:
    """State, parent, process group, session, ...; of no process: nothing."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def state(pid: int) -> str:
    """The letter that ``ps`` shows, "T" for one that is stopped; "" when there is none."""
    return next(iter(_stat(pid)), "")


def running(pid: int) -> bool:
    return state(pid) not in ("", "Z", "X")


def children(pid: int) -> set[int]:
    """Process ids of all that ``pid`` started, and of what those started; none of a process that has ended."""
    found: set[int] = set()
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found |= {int(child)} | children(int(child))
    except (FileNotFoundError, ProcessLookupError):
        pass  # it ended while we looked
    return found


def session_of(leader: int) -> list[int]:
    """Running processes of the session that ``leader`` leads."""
    pids = (int(folder.name) for folder in Path("/proc").glob("[0-9]*"))
    return [pid for pid in pids if running(pid) and (_stat(pid) or [""] * 4)[3] == str(leader)]


def with_variable(name: str, value: str) -> set[int]:
    """Running processes that were started with an environment variable."""
    wanted, found = f"{name}={value}".encode(), set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.add(int(folder.name))
        except OSError:
            continue  # ended, or another user's
    return {pid for pid in found if running(pid)}


def kill(pids: Iterable[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def wait_until(true: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Fails when it never becomes true."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not true within {seconds:g} s"
        time.sleep(0.02)


def wait_until_gone(*pids: int) -> None:
    wait_until(lambda: not any(running(pid) for pid in pids))


def take_signals() -> None:
    """Runs in a child between fork and exec (``preexec_fn``), where the test will send signals to it.

    A job in the background of a script inherits SIGINT ignored, one under nohup SIGHUP: the child would never see them.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
