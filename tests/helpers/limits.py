"""A test that takes too long fails by its name, what it has started ends, and the next test runs.

pytest-timeout's alarm raises in the test, where it waits. Two things are added here. What the test has started is
killed first: else ``with Popen(...)`` would wait for its child on the way out. And where the alarm does not end the
test, as in code that lets no signal through, the process ends: under pytest-xdist the next worker goes on.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.processes import children, kill, running, wait_until, with_variable

GRACE = 60.0
"""Seconds from the alarm to the end of the process: time for the test's fixtures to close what they hold."""

MARK = "DPPO_LIGHTNING_TEST_RUN"
"""Environment variable by which the processes of this run are known, also those that have lost their parents."""

before = pytest.StashKey[set[int]]()


def mark_this_run() -> None:
    os.environ[MARK] = f"{os.getpid()}-{uuid.uuid4().hex}"


def started() -> set[int]:
    """Running processes that this one has started, directly or not."""
    return children(os.getpid()) | (with_variable(MARK, os.environ[MARK]) - {os.getpid()})


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    item.stash[before] = children(os.getpid())
    limit = _limit(item)
    last = threading.Timer(limit + GRACE, _give_up, [item, limit])
    last.daemon = True
    if limit:
        last.start()
    try:
        return (yield)
    finally:
        last.cancel()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[Any]:
    item.stash[before] = children(os.getpid())  # engines and ranks that fixtures hold for further tests live on
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> Iterator[Any]:
    """Put the end of the children before what pytest-timeout does at the alarm."""
    done = yield
    fail = signal.getsignal(signal.SIGALRM)

    def alarm(number: int, frame: Any) -> None:
        kill(started() - item.stash[before])
        assert callable(fail)
        fail(number, frame)

    if settings.method == "signal" and callable(fail):
        signal.signal(signal.SIGALRM, alarm)
    return done


def _limit(item: pytest.Item) -> float:
    """Seconds; 0 where there is no limit."""
    marker = item.get_closest_marker("timeout")
    given = item.config.getvalue("timeout")
    if marker is not None:
        given = marker.args[0]
    return float(item.config.getini("timeout") if given is None else given)


def _give_up(item: pytest.Item, limit: float) -> None:
    capture = item.config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.suspend_global_capture(item)
    print(f"\n{item.nodeid} has not ended {GRACE:g} s after its limit of {limit:g} s", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
    kill(started())
    os._exit(1)


def end_what_is_left() -> list[str]:
    """At the end of a run: the command lines of what tests have left running, which is killed."""
    left = {pid for pid in started() if "resource_tracker" not in _command(pid) and "forkserver" not in _command(pid)}
    try:
        wait_until(lambda: not any(running(pid) for pid in left), seconds=10)
    except AssertionError:
        left = {pid for pid in left if running(pid)}
        commands = [f"{pid}: {_command(pid)}" for pid in left]
        kill(left)
        return commands
    return []


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
            return file.read().replace("\0", " ").strip()
    except OSError:
        return ""
