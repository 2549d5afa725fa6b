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
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from dppo_lightning.base.errors import EngineError

LOG_LINES = 5
"""Number of lines of a dead child's log that the error message shows."""

KILL_SECONDS = 30.0
"""Seconds to wait for a killed process to end; one that takes longer waits in the kernel, for a device or a disk that
does not answer."""

FOLDER_VARIABLE = "DPPO_CHILD_FOLDER"
"""Environment variable of a child that names the folder which it deletes when its parent has ended without doing so."""


class ChildDied(EngineError):
    """The child has ended, or was ended because it could not go on; ``ChildProcess.restart`` can follow."""


class ChildProcess:
    """The parent's end.

    Args:
        module: Module that the child runs, with ``python -m``; its arguments are the pipe's descriptor, the parent's
            process id, and ``descriptors``.
        environment: The child's whole environment.
        descriptors: More file descriptors that the child inherits.
        log: File for the child's output; None: a temporary one, which stays only when the child crashes.
        name: Name of the child in error messages.
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
        self.log.write_bytes(b"")
        self._command = [sys.executable, "-m", module]
        # Temporary files that the child leaves are deleted with the folder.
        self._environment = dict(environment) | {"TMPDIR": str(self.folder), FOLDER_VARIABLE: str(self.folder)}
        self._descriptors = tuple(descriptors)
        self._start()

    def _start(self) -> None:
        mine, theirs = socket.socketpair()
        inherited = (theirs.fileno(), *self._descriptors)
        arguments = [str(inherited[0]), str(os.getpid()), *map(str, self._descriptors)]
        with theirs, self.log.open("ab") as output:
            self._log_start = os.fstat(output.fileno()).st_size
            self._process = subprocess.Popen(
                self._command + arguments,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=inherited,
                start_new_session=True,  # Ctrl-C in the terminal is the parent's to handle
            )
        self._pipe = Connection(mine.detach())
        self._stop = weakref.finalize(self, _stop, self._process, self._pipe, self.folder, os.getpid())

    def restart(self) -> None:
        """Start a child that has died again: a new process and a new pipe, in the same folder, its log continued."""
        before = self._stop
        self._pipe.close()
        self.folder.mkdir(exist_ok=True)  # a child that took its parent for dead has deleted it
        self._start()
        before.detach()

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the child runs."""
        return self._stop.alive and not _ended(self._process)

    def send(self, kind: str, value: Any = None) -> None:
        """Send a message.

        Args:
            kind: Kind of the message.
            value: Value of the message, anything that can be pickled.

        Raises:
            ChildDied: The child is dead.
        """
        try:
            self._pipe.send((kind, value))
        except OSError as error:
            raise self._dead() from error

    def receive(self, timeout: float | None) -> tuple[str, Any] | None:
        """Return the next message, or None when none came within ``timeout`` seconds (None waits without limit).

        Raises:
            ChildDied: The child is dead, or said that it cannot go on.
            EngineError: It was closed.
        """
        try:
            if not self._pipe.poll(timeout):
                return None
            kind, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._dead() from error
        if kind == "broken":
            raise self.end(value)
        return kind, value

    def unread(self) -> Iterator[tuple[str, Any]]:
        """Messages that a dead child sent before it died and that were not received yet."""
        with contextlib.suppress(EOFError, OSError):
            while self._pipe.poll(0):
                yield self._pipe.recv()

    def end(self, reason: str) -> ChildDied:
        """End a child that cannot go on; return the exception that says why. Folder, log and unread messages stay."""
        _end(self._process)
        return ChildDied(f"the {self.name} process stopped: {reason}")

    def give_up(self, message: str) -> NoReturn:
        """Close a child that will not be started again, keep its log, and raise EngineError."""
        log = self._keep_log()
        self.close()
        raise EngineError(f"{message} (log: {log})")

    def _dead(self) -> EngineError:
        if not self._stop.alive:
            return EngineError(f"the {self.name} process is not running")
        if not _ended(self._process, patience=1.0):
            return self.end("it closed its pipe")
        _end(self._process)
        code = self._process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return self.end(f"{how}; it last said: {self._last_words() or 'nothing'}")

    def _last_words(self) -> str:
        """Last lines in the log of this process, without those of a process before it."""
        if not self.log.exists():
            return ""
        said = self.log.read_bytes()[self._log_start :].decode(errors="replace")
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        return " | ".join(lines[-LOG_LINES:])

    def _keep_log(self) -> Path:
        """Save a temporary log from being deleted with its folder."""
        if self.log.parent == self.folder:
            kept = self.folder.with_suffix(".log")
            if self.log.exists():
                shutil.copyfile(self.log, kept)
            self.log = kept
        return self.log

    def close(self) -> None:
        """End the child and delete its folder; safe to call twice."""
        self._stop()


def _ended(process: subprocess.Popen[bytes], patience: float = 0.0) -> bool:
    """Whether a process ends within ``patience`` seconds. It stays a zombie, so no other can get its process id."""
    deadline = time.monotonic() + patience
    while process.returncode is None:
        try:
            if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return True
        except ChildProcessError:  # the program that started us has SIGCHLD ignored: the kernel keeps no zombies
            process.poll()
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.01)
    return True


def _end(process: subprocess.Popen[bytes], patience: float = 1.0) -> None:
    """Give a process ``patience`` seconds to end by itself, then kill it, and in any case all that it has started."""
    if process.returncode is None:
        _ended(process, patience)
        end_session(process.pid)
        process.wait()


def _stop(process: subprocess.Popen[bytes], pipe: Connection, folder: Path, owner: int) -> None:
    """End the child, also when the parent's interpreter exits; a fork of the parent must leave the child alone."""
    if os.getpid() != owner:
        return
    pipe.close()
    _end(process, patience=2)
    shutil.rmtree(folder, ignore_errors=True)


class ParentLink:
    """The child's end. A thread reads the pipe at all times, so that the parent can never block on a busy child.

    Args:
        descriptor: File descriptor of the pipe, inherited.
        parent: Process id of the parent.
    """

    def __init__(self, descriptor: int, parent: int) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            # A scheduler sends signals to every process of a job; the parent decides what follows, and ends the child.
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
        """Return the next message, or None when there is none; with ``wait`` sleep until one comes."""
        try:
            return self._messages.get(block=wait)
        except queue.Empty:
            return None

    def send(self, kind: str, value: Any = None) -> None:
        self._pipe.send((kind, value))


def _end_with(parent: int) -> None:
    """End when the parent has ended. PR_SET_PDEATHSIG would also act when only the thread that started us ends."""
    while os.getppid() == parent:
        time.sleep(1)
    _leave()


def _leave() -> None:
    shutil.rmtree(os.environ[FOLDER_VARIABLE], ignore_errors=True)
    if os.getsid(0) == os.getpid():
        end_session(os.getpid())
    os._exit(0)


def end_session(leader: int) -> None:
    """Kill a child and all that it has started, which is in the session that it leads; return when all have ended.

    The leader must not have been waited for: its process id, which names the session, could be another's by now.

    Killed processes leave the named semaphores of ``multiprocessing`` behind, as its tracker is killed too. They are
    recognised by their inodes: a process sees the files that it created under names that no longer exist.

    Args:
        leader: Process id of the child.
    """
    inodes = set()
    for process in _session_of(leader):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{process}/maps").read_text().splitlines()
            inodes |= {int(line.split()[4]) for line in lines if "/dev/shm/sem." in line}
    for semaphore in Path("/dev/shm").glob("sem.mp-*"):
        with contextlib.suppress(OSError):
            if semaphore.stat().st_ino in inodes:
                semaphore.unlink()
    deadline = time.monotonic() + KILL_SECONDS
    while (left := _session_of(leader)) and time.monotonic() < deadline:
        for process in left:
            if process != os.getpid():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(process, signal.SIGKILL)
        if left == [os.getpid()]:
            return
        time.sleep(0.01)  # a process that is killed takes a moment: it gives back its memory first


def _session_of(leader: int) -> list[int]:
    """Process ids of a session that have not ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if session == str(leader) and state not in "ZX":
                found.append(int(folder.name))
    return found
