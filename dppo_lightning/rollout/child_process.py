"""A child process that serves one parent: both ends of the pipe between them.

The pipe is an inherited socket pair, which nobody else can open. The child lives no longer than its parent: it ends
when the pipe closes, and, in case a fork of the parent still holds the pipe, when it is orphaned.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from dppo_lightning.errors import EngineError

LOG_LINES = 5
FOLDER = "DPPO_CHILD_FOLDER"
"""Environment variable that tells a child which folder to delete should its parent not live to do it."""


class ChildProcess:
    """The parent's end.

    Args:
        module: Run with ``python -m``; its arguments are the pipe's descriptor, the parent's process id, and
            ``descriptors``.
        environment: The child's whole environment.
        descriptors: More file descriptors that the child inherits.
        log: File for what the child prints; None: a temporary one, which stays only when the child crashes.
        name: What error messages call it.
    """

    def __init__(
        self,
        module: str,
        environment: Mapping[str, str],
        descriptors: Sequence[int] = (),
        log: Path | None = None,
        name: str = "child",
    ) -> None:
        self.name = name
        self.folder = Path(tempfile.mkdtemp(prefix="dppo-"))
        self.log = self.folder / "engine.log" if log is None else log
        mine, theirs = socket.socketpair()
        inherited = (theirs.fileno(), *descriptors)
        with theirs, self.log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(inherited[0]), str(os.getpid()), *map(str, descriptors)],
                # What the child leaves in temporary files goes with the folder.
                env=dict(environment) | {"TMPDIR": str(self.folder), FOLDER: str(self.folder)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=inherited,
                start_new_session=True,  # Ctrl-C in the terminal is the parent's to handle
            )
        self._pipe = Connection(mine.detach())
        self._stop = weakref.finalize(self, _stop, self._process, self._pipe, self.folder, os.getpid())

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._stop.alive and self._process.poll() is None

    def send(self, kind: str, value: Any = None) -> None:
        """Raises EngineError when the child is dead."""
        try:
            self._pipe.send((kind, value))
        except OSError as error:
            self._raise_dead(error)

    def receive(self, timeout: float | None) -> tuple[str, Any] | None:
        """The next message, or None when none came within ``timeout`` seconds (None waits without limit).

        Raises:
            EngineError: The child is dead, or told that it cannot go on.
        """
        try:
            if not self._pipe.poll(timeout):
                return None
            kind, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._raise_dead(error)
        if kind == "broken":
            self.fail(value)
        return kind, value

    def fail(self, reason: str, keep_log: bool = True) -> NoReturn:
        """Stop a child that is of no more use, and say why."""
        log = self._keep_log() if keep_log else ""
        self.close()
        raise EngineError(f"the {self.name} process stopped: {reason}{log}")

    def _raise_dead(self, error: Exception) -> NoReturn:
        if not self._stop.alive:
            raise EngineError(f"the {self.name} process is not running") from error
        try:
            code = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self.fail("it closed its pipe")
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        self.fail(f"{how}; it last said: {' | '.join(lines[-LOG_LINES:]) or 'nothing'}")

    def _keep_log(self) -> str:
        """Save a temporary log from being deleted with its folder."""
        if self.log.parent == self.folder:
            kept = self.folder.with_suffix(".log")
            shutil.copyfile(self.log, kept)
            self.log = kept
        return f" (log: {self.log})"

    def close(self) -> None:
        """End the child and delete its folder; safe to call twice."""
        self._stop()


def _stop(process: subprocess.Popen[bytes], pipe: Connection, folder: Path, owner: int) -> None:
    """Also runs when the parent's interpreter exits; a fork of the parent must leave the child alone."""
    if os.getpid() != owner:
        return
    pipe.close()
    try:
        process.wait(timeout=2)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the child leads a session: what it started goes too
        process.wait()
    shutil.rmtree(folder, ignore_errors=True)


class ParentLink:
    """The child's end. A thread reads the pipe at all times, so that the parent can never block on a busy child.

    Args:
        descriptor: Of the pipe, inherited.
        parent: Process id of the parent.
    """

    def __init__(self, descriptor: int, parent: int) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            # A scheduler signals every process of a job; the parent decides what follows, and ends the child.
            signal.signal(number, signal.SIG_IGN)
        os.set_inheritable(descriptor, False)
        self._pipe = Connection(descriptor)
        self._messages: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()

    def _read(self) -> None:
        try:
            while True:
                self._messages.put(self._pipe.recv())
        except (EOFError, OSError):
            _leave()

    def receive(self, wait: bool) -> tuple[str, Any] | None:
        """The next message; without one, None or, with ``wait``, sleep until it comes."""
        try:
            return self._messages.get(block=wait)
        except queue.Empty:
            return None

    def send(self, kind: str, value: Any = None) -> None:
        self._pipe.send((kind, value))


def _end_with(parent: int) -> None:
    """End when the parent has ended. PR_SET_PDEATHSIG would also fire when only the thread that started us ends."""
    while os.getppid() == parent:
        time.sleep(1)
    _leave()


def _leave() -> None:
    shutil.rmtree(os.environ[FOLDER], ignore_errors=True)
    if os.getsid(0) == os.getpid():
        end_session(os.getpid())
    os._exit(0)


def end_session(leader: int) -> None:
    """Kill what a child has started, which is in the session that it leads.

    Killed processes leave the named semaphores of ``multiprocessing`` behind, as its tracker is killed too. They are
    told by their inodes: a process sees what it created under a name that is gone.
    """
    inodes = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getsid(int(process.name)) == leader:
                lines = (process / "maps").read_text().splitlines()
                inodes |= {int(line.split()[4]) for line in lines if "/dev/shm/sem." in line}
    for semaphore in Path("/dev/shm").glob("sem.mp-*"):
        with contextlib.suppress(OSError):
            if semaphore.stat().st_ino in inodes:
                semaphore.unlink()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)
