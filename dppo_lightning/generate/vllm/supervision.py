"""EngineProcess: an engine's child process, started again when it dies.

The parent remembers everything that a new process must be given to be where the dead one was, so the caller notices
nothing but time. It knows the messages of the pipe (worker.py), and nothing of the engine behind it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from dppo_lightning.base.records import Completion
from dppo_lightning.generate.engine import Failed, Request
from dppo_lightning.generate.vllm.child_process import ChildDied, ChildProcess

log = logging.getLogger(__name__)


class Outstanding:
    """Requests that were submitted and not answered yet, in their order, and those of them that are to be aborted."""

    def __init__(self) -> None:
        self._requests: dict[str, Request] = {}
        self._aborted: set[str] = set()

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def requests(self) -> list[Request]:
        """All of them, in their order."""
        return list(self._requests.values())

    @property
    def aborted(self) -> set[str]:
        """Ids of those that are to be aborted."""
        return self._aborted & self._requests.keys()

    def add(self, requests: Iterable[Request]) -> None:
        """Remember requests that are submitted."""
        self._requests.update((request.id, request) for request in requests)

    def abort(self, ids: Iterable[str]) -> None:
        """Note that requests are to be aborted."""
        self._aborted = self.aborted | set(ids)

    def remove_answered(self, results: Iterable[Completion | Failed]) -> None:
        """Forget the requests that these results answer."""
        for result in results:
            self._requests.pop(result.request_id, None)
            self._aborted.discard(result.request_id)


class EngineProcess:
    """A child process that serves requests, and that a new one replaces when it dies.

    The new process gets the start message, the weights of the last ``load``, the pause, and every request that is not
    answered, with its own seed. What was partly generated is generated again from its beginning, so that all its tokens
    carry the version in force. Answers that the dead process had sent are kept: no request is answered twice.

    Args:
        child: The process; nothing has been sent to it.
        start: Value of its "start" message.
        timeout: Seconds that any command may take, the start among them; > 0. A process that takes longer is ended.
        max_restarts: Most deaths in a row after which a new process is started, >= 0; a completion ends the row.

    Attributes:
        child: The process.
        outstanding: Requests that are not answered.
        ready: Value of the process's "ready" message; None before it came.
        weights: Weights that the last ``load`` was given; None before.
    """

    def __init__(self, child: ChildProcess, start: Any, timeout: float, max_restarts: int) -> None:
        self.child = child
        self.outstanding = Outstanding()
        self.timeout = timeout
        self.max_restarts = max_restarts
        self.ready: Any = None
        self._start = start
        self.weights: Any = None
        self._weights_lost = ""
        self._paused = False
        self._arrived: list[Completion | Failed] = []
        self._deaths = 0
        try:
            child.send("start", start)
        except ChildDied as death:
            child.give_up(str(death))

    def wait_until_ready(self) -> None:
        """Wait for the first process, whose "ready" message is then in ``ready``.

        Raises:
            EngineError: It died. It is not started again: the cause would stop every other process too.
        """
        try:
            self.ready = self._answer("ready")
        except ChildDied as death:
            self.child.give_up(str(death))

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests."""
        self.outstanding.add(requests)
        self._send("submit", requests)

    def refuse(self, failures: Iterable[Failed]) -> None:
        """Have ``poll`` return failures of requests that were never submitted."""
        self._arrived.extend(failures)

    def poll(self, timeout: float | None) -> list[Completion | Failed]:
        """Do as ``RolloutEngine.poll``; return at once while paused, when nothing can finish."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            try:
                waits = bool(self.outstanding) and not self._arrived and not self._paused
                remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
                while self._receive(remaining if waits else 0.0) is not None:
                    waits = False
                break
            except ChildDied as death:
                self._replace(death)
        arrived, self._arrived = self._arrived, []
        return arrived

    def abort(self, ids: Collection[str]) -> None:
        """Stop requests."""
        self.outstanding.abort(ids)
        self.command("abort", set(ids))

    def pause(self) -> None:
        """Stop generating."""
        self._paused = True
        self.command("pause")

    def resume(self) -> None:
        """Go on generating."""
        self._paused = False
        self.command("resume")

    def load(self, weights: Any) -> None:
        """Have the process load weights, and every later process too.

        Args:
            weights: Value of the "update" message; the memory that it refers to stays as it is until
                ``forget_weights``.
        """
        self.weights, self._weights_lost = weights, ""
        self.command("update", weights)

    def forget_weights(self, reason: str) -> None:
        """Note that no new process can be given the weights in force, until the next ``load``.

        Args:
            reason: Why they are lost, for the error message.
        """
        self._weights_lost = reason

    def command(self, kind: str, value: Any = None) -> None:
        """Have the process do something and wait until it has; results that come before are kept for ``poll``.

        Args:
            kind: Kind of the message; the answer has the same.
            value: Value of the message.
        """
        if self._send(kind, value):
            try:
                self._answer(kind)
            except ChildDied as death:
                self._replace(death)

    def _send(self, kind: str, value: Any) -> bool:
        """Send a message; return False when a new process had to be started, which has got everything already."""
        try:
            self.child.send(kind, value)
        except ChildDied as death:
            self._replace(death)
            return False
        return True

    def _answer(self, kind: str) -> Any:
        deadline = time.monotonic() + self.timeout
        while (message := self._receive(max(0.0, deadline - time.monotonic()))) is not None:
            if message[0] == kind:
                return message[1]
        raise self.child.end(f"no answer within {self.timeout:g} s (startup_timeout)")

    def _receive(self, timeout: float | None) -> tuple[str, Any] | None:
        message = self.child.receive(timeout)
        if message is not None:
            self._keep(message)
        return message

    def _keep(self, message: tuple[str, Any]) -> None:
        kind, results = message
        if kind == "results":
            self._arrived.extend(results)
            self.outstanding.remove_answered(results)
            if any(isinstance(result, Completion) and result.finish_reason != "abort" for result in results):
                self._deaths = 0

    def _replace(self, death: ChildDied) -> None:
        """Start a new process and bring it to where the dead one should be; start another if it dies on the way.

        Raises:
            EngineError: One death in a row too many, or the weights in force are lost.
        """
        while True:
            for message in self.child.unread():
                self._keep(message)
            self._deaths += 1
            self._give_up_if_hopeless(death)
            log.warning(
                "%s; starting it again (restart %d of at most %d in a row), with %d requests to generate",
                *(death, self._deaths, self.max_restarts, len(self.outstanding)),
            )
            try:
                self.child.restart()
                self._bring_up_to_date()
                return
            except ChildDied as again:
                death = again

    def _give_up_if_hopeless(self, death: ChildDied) -> None:
        if self.max_restarts == 0:
            self.child.give_up(str(death))
        if self._deaths > self.max_restarts:
            self.child.give_up(f"{death}; it died {self._deaths} times in a row (max_restarts {self.max_restarts})")
        if self._weights_lost:
            self.child.give_up(f"{death}; it cannot be started again: {self._weights_lost}")

    def _bring_up_to_date(self) -> None:
        """Give a new process everything that the dead one had.

        Weights and pause come before the requests, so that no token is sampled with other weights or too early.
        """
        self.child.send("start", self._start)
        self.ready = self._answer("ready")
        if self.weights is not None:
            self.child.send("update", self.weights)
            self._answer("update")
        if self._paused:
            self.child.send("pause")
            self._answer("pause")
        self.child.send("submit", self.outstanding.requests)
        if aborted := self.outstanding.aborted:
            self.child.send("abort", aborted)
            self._answer("abort")

    def close(self) -> None:
        """End the process and leave no file; safe to call twice."""
        self.child.close()
