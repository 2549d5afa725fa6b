"""CellProcess: the trainer's end of a reward worker, which it starts, asks, and replaces."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import pickle
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from dppo_lightning.base.errors import RewardError, one_line
from dppo_lightning.base.records import Failure
from dppo_lightning.reward.calling import Outcome, Unit
from dppo_lightning.reward.cleaning import end_descendants
from dppo_lightning.reward.messages import read_outcome, send
from dppo_lightning.reward.rewarding import Rewarding

log = logging.getLogger(__name__)

START_LIMIT = 600.0
"""Seconds that a worker may take to load the reward."""

SLACK = 60.0
"""Seconds beyond all time limits of a delivery after which its worker itself is taken for dead."""

STARTS = 3
"""Tries to start a worker that ends before it is there: someone may have killed it, or memory was short."""

END_LIMIT = 2.0
"""Seconds that a worker may take to end."""

BOOT = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from dppo_lightning.reward.cell import main; main()"

KEPT = ("LD_LIBRARY_PATH", "PYTHONHOME")
"""Variables without which some installations of Python do not start."""

ENVIRONMENT = {
    "PYTHONHASHSEED": "0",  # a score may depend on the order of a set
    "OMP_NUM_THREADS": "1",  # a process with threads cannot be forked safely
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


class Closed(Exception):
    """The pool was closed during a call."""


class CellProcess:
    """Caller in a worker process (reward/cell.py), which is started when it is needed and replaced when it is lost.

    Args:
        pickled: Reward, as cloudpickle writes it.
        name: Name of the reward, for messages.
        settings: Settings of the calls.
        tell: Called with what the machine does not permit, after each start.
    """

    def __init__(self, pickled: bytes, name: str, settings: Rewarding, tell: Any) -> None:
        self.pickled = pickled
        self.name = name
        self.settings = settings
        self.tell = tell
        self.process: subprocess.Popen[bytes] | None = None
        self.folder = ""
        self._closed = False
        self._asking = threading.Lock()

    def score(self, units: Sequence[Unit], together: bool) -> list[Outcome]:
        with self._asking:
            return self._score(units, together)

    def _score(self, units: Sequence[Unit], together: bool) -> list[Outcome]:
        try:
            return self._delivered(units, together)
        except (OSError, EOFError) as error:
            self._replace(error)
        # Someone ended the worker itself, or it was for want of memory: one unit at a time may still be scored.
        found: list[Outcome] = []
        for unit in units:
            try:
                found += self._delivered([unit], together)
            except (OSError, EOFError) as error:
                self._replace(error)
                found.append(Failure("died", "its worker ended"))
        return found

    def stop(self) -> None:
        """Tell the process to end; a call that is under way raises ``Closed``."""
        self._closed = True
        if self.process is not None:
            self.process.terminate()

    def close(self) -> None:
        """End the process, with all that it has started."""
        self.stop()
        with self._asking:  # who closes it a second time waits for the end, too
            process, self.process = self.process, None
            if process is not None:
                self._end(process, END_LIMIT)

    def _end(self, process: subprocess.Popen[bytes], patience: float) -> None:
        """Wait so many seconds for a worker that was told to end, then kill it."""
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            end_descendants(process.pid)
            process.kill()
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)  # the guard does it, where it was given time to
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()

    def _replace(self, error: Exception) -> None:
        if self._closed:
            raise Closed from error
        log.warning(f"a reward worker ended ({one_line(error)}); another takes its place")
        process, self.process = self.process, None
        if process is not None:
            self._end(process, 0.0)

    def _delivered(self, units: Sequence[Unit], together: bool) -> list[Outcome]:
        process = self.process or self._started()
        assert process.stdin is not None
        counts = [len(unit) for unit in units]
        header = {"units": len(units), "longest": max(counts), "together": together}
        send(process.stdin.fileno(), header, pickle.dumps([list(unit) for unit in units], protocol=5))
        patience = 2 * sum(counts) * (self.settings.timeout + 1.0) + SLACK
        _, body = self._receive(process, patience)
        lines = body.split(b"\n")
        if len(lines) != len(units):
            raise EOFError(f"{len(lines)} answers to {len(units)} units")
        return [read_outcome(line, count, not together) for line, count in zip(lines, counts, strict=True)]

    def _started(self) -> subprocess.Popen[bytes]:
        """Start a worker, again where it is killed meanwhile."""
        for left in reversed(range(STARTS)):
            try:
                return self._start()
            except (OSError, EOFError) as error:
                self._replace(error)
                if left == 0:
                    raise RewardError(f"a worker process for {self.name} did not start: {one_line(error)}") from error
        raise AssertionError

    def _start(self) -> subprocess.Popen[bytes]:
        if self._closed:
            raise Closed
        environment = {name: os.environ[name] for name in KEPT if name in os.environ} | ENVIRONMENT
        self.folder = tempfile.mkdtemp(prefix="dppo-reward-")
        self.process = process = subprocess.Popen(
            [sys.executable, "-c", BOOT, json.dumps([path or os.getcwd() for path in sys.path]), self.folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment,
            start_new_session=True,  # Ctrl-C is the trainer's
        )
        assert process.stdin is not None
        with suppress(OSError):  # a delivery fits in, and neither side waits for the other in the middle of it
            fcntl.fcntl(process.stdin.fileno(), fcntl.F_SETPIPE_SZ, 1 << 20)
        if self._closed:
            process.terminate()
        limits = {
            "timeout": self.settings.timeout,
            "memory": self.settings.memory_mib << 20,
            "concurrency": self.settings.concurrency,
        }
        send(process.stdin.fileno(), limits, self.pickled)
        hello, _ = self._receive(process, START_LIMIT)
        if "error" in hello:
            raise RewardError(
                f"{self.name} cannot be loaded in a worker process, {hello['error']}: define it in a module that can "
                "be imported, or trust it with data.rewarding.isolation: none"
            )
        self.tell(hello["missing"])
        return process

    def _receive(self, process: subprocess.Popen[bytes], seconds: float) -> tuple[dict[str, Any], bytes]:
        """Read a message.

        Raises:
            EOFError: The worker has ended.
            TimeoutError: It says nothing for so long.
        """
        assert process.stdout is not None
        deadline, pipe = time.monotonic() + seconds, process.stdout.fileno()
        data, header, wanted = bytearray(), None, 0
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        while header is None or len(data) < wanted:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError(f"no answer for {seconds:g} s")
            part = os.read(pipe, 1 << 20)
            if not part:
                raise EOFError("no answer: the process has ended")
            data += part
            if header is None and b"\n" in data:
                line, _, rest = bytes(data).partition(b"\n")
                header, data = json.loads(line), bytearray(rest)
                wanted = header["bytes"]
        return header, bytes(data)
