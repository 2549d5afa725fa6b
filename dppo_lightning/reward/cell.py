"""Program of a reward worker: three processes that trust each other less and less.

The guard is what the trainer starts; it owns the worker's folder and outlives the others. The keeper loads the reward,
which is the user's code, and never looks at a completion. A scorer is forked from it for each delivery, gives up all
that it does not need, reads completions, and writes scores as text: it may be lost at any time, and what it writes is
read with suspicion. So a completion that wrecks its process costs a fork, not the seconds that loading a reward takes.

A worker's standard input carries deliveries: a line of JSON, then as many bytes as it says; its standard output carries
the answers. When the trainer ends, however it does, the input ends, and with it the worker.
"""

from __future__ import annotations

import gc
import json
import os
import pickle
import select
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO

from dppo_lightning.base.errors import RewardError, one_line
from dppo_lightning.base.records import Failure
from dppo_lightning.reward import cleaning, confine
from dppo_lightning.reward.base import RewardFunction
from dppo_lightning.reward.messages import encoded, read_delivery, refused, send
from dppo_lightning.reward.scorer import LONGEST, Limits, serve_scorer

GRACE = 1.0
"""Seconds after its time limit when a completion's process is ended from outside."""

SHARED_DELIVERIES = 64
"""Deliveries after which a scorer that several share is replaced, with what memory it has lost."""

TICK = 0.02
"""Seconds between looks at a scorer that says nothing."""


def main() -> None:
    """Serve deliveries until the input ends; the folder is the second argument."""
    folder = sys.argv[2]
    try:
        guard(folder, os.getppid())
    finally:
        cleaning.remove(folder)


def guard(folder: str, trainer: int) -> None:
    """Start a keeper, and wait for its end or the trainer's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    commands, answers = os.fdopen(os.dup(0), "rb", buffering=0), os.dup(1)
    with open("/dev/null", "r+b", buffering=0) as nothing:  # a reward may print and read
        os.dup2(nothing.fileno(), 0)
        os.dup2(nothing.fileno(), 1)
    first = read_delivery(commands)
    if first is None:
        return
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # when memory runs out: this, and not the trainer
    user = confine.another_user(confine.needed_paths())
    spaces, new_user = confine.enter_namespaces()
    if new_user:  # which knows no user but this
        user = confine.User(None, missing="another user")
    keeper = os.fork()
    if keeper == 0:
        try:
            confine.die_with_parent()
            Cell(Limits(**first[0]), folder, user, spaces, commands, answers).serve(first[1])
        except BrokenPipeError:
            pass  # the trainer has ended
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(answers)
    commands.close()
    signal.signal(signal.SIGTERM, lambda *_: os.kill(keeper, signal.SIGKILL))
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    while os.waitpid(keeper, os.WNOHANG)[0] == 0:
        if os.getppid() != trainer:  # it has ended, and something else holds its end of the pipe
            os.kill(keeper, signal.SIGKILL)
        signal.sigtimedwait([signal.SIGCHLD], 0.5)


@dataclass
class Scorer:
    """A scorer, from its keeper's side.

    Attributes:
        pid: Process id.
        answers: Descriptor that its lines are read from.
        asks: Descriptor that it is told by what to score of the delivery.
        left: Number of deliveries that it may still score.
    """

    pid: int
    answers: int
    asks: int
    left: int


class Cell:
    """Keeper: forks scorers, watches them and ends them.

    Args:
        limits: Settings.
        folder: Folder that scorers may write to.
        user: User that scorers become.
        spaces: Namespaces that this process has for itself.
        commands: Stream of deliveries.
        answers: Descriptor for answers.
    """

    def __init__(
        self, limits: Limits, folder: str, user: confine.User, spaces: set[str], commands: BinaryIO, answers: int
    ) -> None:
        self.limits = limits
        self.folder = folder
        self.user = user
        self.spaces = spaces
        self.commands = commands
        self.answers = answers
        self.alone = "own process ids" in spaces and os.getpid() == 1  # else a signal to all would be one to all
        self.scratch = False
        self.longest = 1  # completions of one unit
        self.delivery = os.memfd_create("delivery")
        self.scorer: Scorer | None = None  # that lives
        self.shared: Scorer | None = None  # the same, where the next delivery may have it
        self.reward: RewardFunction

    def serve(self, reward: bytes) -> None:
        """Load the reward, and score until the input ends."""
        missing = [name for name in confine.SPACES if name not in self.spaces]
        mounts, sealed = confine.seal_mounts()
        if not sealed:
            missing.append("read-only mounts")
        if not confine.landlock_version():
            missing.append("Landlock")
        if self.user.missing:
            missing.append(self.user.missing)
        self.scratch = mounts and confine.mount_scratch(self.folder, self.user.id or 0)
        if self.user.id is not None and not self.scratch:
            os.chown(self.folder, self.user.id, self.user.id)
        confine.adopt_orphans()
        confine.hide_memory()
        os.environ["TMPDIR"] = os.environ["HOME"] = tempfile.tempdir = self.folder
        try:
            self.reward = pickle.loads(reward)
            self.reward.prepare()
        except BaseException as error:
            return send(self.answers, {"error": one_line(error, typed=True) if str(error) else type(error).__name__})
        gc.collect()
        gc.freeze()  # else each scorer's first collection copies every page
        send(self.answers, {"missing": missing})
        while (delivery := read_delivery(self.commands)) is not None:
            header, units = delivery
            self.longest = header["longest"]
            lines = self.score(units, list(range(header["units"])), header["together"])
            send(self.answers, {}, b"\n".join(lines))
        self._clean()
        return None

    def score(self, units: bytes, places: list[int], together: bool) -> list[bytes]:
        """Score some of the units of a delivery: in one scorer, and what that leaves each in one of its own.

        Args:
            units: The delivery.
            places: Places of the units.
            together: Whether they may share a scorer, which those of earlier and later deliveries use too.
        """
        lines: list[bytes] = []
        if together:
            scorer = self.shared or self._forked(len(places), SHARED_DELIVERIES)
            lines, _ = self._asked(scorer, units, places)
            scorer.left -= 1
            self.shared = scorer if scorer.left and len(lines) == len(places) else None
        if self.shared is None or not together:
            self._clean()
        for place in places[len(lines) :]:
            done, failure = self._asked(self._forked(1, 1), units, [place])
            lines += done or [encoded(failure)]
            self._clean()
        return lines

    def _asked(self, scorer: Scorer, units: bytes, places: list[int]) -> tuple[list[bytes], Failure]:
        os.pwrite(self.delivery, units, 0)
        with suppress(BrokenPipeError):  # it has ended
            os.write(scorer.asks, json.dumps({"bytes": len(units), "places": places}).encode() + b"\n")
        return self._watched(scorer, len(places))

    def _forked(self, count: int, deliveries: int) -> Scorer:
        """Start a scorer.

        Args:
            count: Number of the units that it scores of a delivery.
            deliveries: Number of deliveries that it may score.
        """
        (reads, writes), (wants, asks) = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                self._become_scorer((writes, wants, self.delivery), count * deliveries)
                serve_scorer(self.reward, self.limits)
            except Exception as error:
                line = refused(RewardError(f"a scorer did not start: {one_line(error, typed=True)}"))
                os.write(3, line + b"\n")
            finally:
                os._exit(0)
        os.close(writes)
        os.close(wants)
        self.scorer = Scorer(pid, reads, asks, deliveries)
        return self.scorer

    def _become_scorer(self, descriptors: tuple[int, ...], units: int) -> None:
        """Give up everything but what it is asked by and answers with: the descriptors from 3 on."""
        os.setsid()
        for number, kept in enumerate([os.dup(descriptor) for descriptor in descriptors], start=100):
            os.dup2(kept, number)  # out of the way of each other
        for number in range(len(descriptors)):
            os.dup2(100 + number, 3 + number, inheritable=False)
        os.closerange(3 + len(descriptors), 1 << 20)
        os.dup2(0, 2)
        os.chdir(self.folder)
        others = confine.processes_of_user() if self.user.id is None and not self.alone else 0
        seconds = int(units * self.longest * self.limits.timeout + GRACE) + 1
        confine.set_limits(self.limits.memory, seconds, others)
        confine.become(self.user)
        if confine.landlock_version():
            confine.forbid_writes(self.folder)
        confine.die_with_parent()
        confine.hide_memory()

    def _watched(self, scorer: Scorer, units: int) -> tuple[list[bytes], Failure]:
        """Wait for the scores of some units; the lines, and what happened where some are missing."""
        at_once = units if self.reward.asynchronous else 1  # lines come at the end
        patience = self.limits.timeout * self.longest * at_once + GRACE
        poll = select.poll()
        poll.register(scorer.answers, select.POLLIN)
        poll.register(self.commands, 0)  # only its end
        buffer, found, ended = b"", 0, False
        deadline = time.monotonic() + patience
        while True:
            # A scorer's children may hold its pipe open, so its end is looked for, too.
            events = dict(poll.poll(0 if ended else TICK * 1000))
            if events.get(self.commands.fileno(), 0) & (select.POLLHUP | select.POLLERR):
                self._clean()
                os._exit(0)
            part = os.read(scorer.answers, 1 << 16) if events.get(scorer.answers, 0) else b""
            buffer += part
            now = buffer.count(b"\n")
            if now > found:
                found, deadline = now, time.monotonic() + patience
            lines = buffer.split(b"\n")
            if found >= units:
                return lines[:units], Failure("died", "")
            if len(lines[-1]) > LONGEST:
                return lines[:-1], Failure("died", "wrote something else than scores")
            if ended and not part:
                return lines[:-1], self._cause(scorer.pid)
            if time.monotonic() > deadline:
                return lines[:-1], Failure("timeout", f"{self.limits.timeout:g} s")
            ended = ended or os.waitid(os.P_PID, scorer.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
            if events.get(scorer.answers, 0) and not part and not ended:
                time.sleep(TICK)  # it has closed its pipe and lives

    def _cause(self, pid: int) -> Failure:
        """What ended a scorer that has ended."""
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None or ended.si_code == os.CLD_EXITED:
            return Failure("died", "" if ended is None else f"exit code {ended.si_status}")
        if ended.si_status == signal.SIGXCPU:
            return Failure("timeout", "processor time")
        return Failure("died", f"signal {signal.Signals(ended.si_status).name}")

    def _clean(self) -> None:
        """End the scorer with all that it has started, and remove what it wrote."""
        if self.scorer is None:
            return
        os.close(self.scorer.answers)
        os.close(self.scorer.asks)
        self.scorer = self.shared = None
        if self.alone:
            with suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)  # every process of the namespace but this, its first
        else:
            cleaning.end_descendants(os.getpid())
        while True:
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                break
        if next(os.scandir(self.folder), None) is not None:
            if self.scratch:
                confine.unmount(self.folder)
                self.scratch = confine.mount_scratch(self.folder, self.user.id or 0)
            else:
                cleaning.empty(self.folder)
