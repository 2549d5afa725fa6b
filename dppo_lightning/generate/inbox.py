"""Inbox: the engine's one caller; gives every result to whoever asked for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from dppo_lightning.base.errors import EngineError
from dppo_lightning.base.records import Completion
from dppo_lightning.generate.engine import Failed, Request, RolloutEngine

Deliver = Callable[[Completion | Failed], None]
Progress = Callable[[int, int], None]
"""Called with (completions finished, completions asked for)."""


class Inbox:
    """Share of one engine among training rollouts, held-out evaluation and the parity probe.

    Args:
        engine: Engine that has been started.
    """

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine
        self._deliver: dict[str, Deliver] = {}
        self._unwanted: set[str] = set()  # those of them that were discarded

    @property
    def in_flight(self) -> int:
        """Number of requests whose result is still waited for."""
        return len(self._deliver) - len(self._unwanted)

    def submit(self, requests: Sequence[Request], deliver: Deliver) -> None:
        """Submit requests; ``deliver`` is called, in ``collect``, with the result of each."""
        for request in requests:
            if request.id in self._deliver:
                raise EngineError(f"request {request.id!r} is in flight already")
        self._deliver |= dict.fromkeys((request.id for request in requests), deliver)
        self.engine.submit(requests)

    def collect(self, timeout: float | None = None) -> None:
        """Deliver what has finished, waiting up to ``timeout`` seconds (None: without limit) for the first of it.

        Raises:
            EngineError: The engine died, lost a request, or delivered one that nobody waits for.
        """
        arrived = self.engine.poll(timeout)
        if not arrived and self._deliver and self.engine.health().in_flight == 0:
            arrived = self.engine.poll(0)  # what finished between the two calls
            if not arrived:
                raise EngineError(f"the engine lost {len(self._deliver)} requests, {min(self._deliver)!r} among them")
        for result in arrived:
            deliver = self._deliver.pop(result.request_id, None)
            if deliver is None:
                raise EngineError(f"the engine delivered {result.request_id!r}, which is not in flight")
            if result.request_id in self._unwanted:
                self._unwanted.remove(result.request_id)
            else:
                deliver(result)

    def discard(self, ids: Iterable[str]) -> None:
        """Abort requests; what the engine still says of them is ignored."""
        known = [name for name in ids if name in self._deliver]
        self._unwanted.update(known)
        if known:
            self.engine.abort(known)

    def fetch(self, requests: Sequence[Request], progress: Progress | None = None) -> dict[str, Completion | Failed]:
        """Submit requests, wait for all of them, and return the results by request id."""
        results: dict[str, Completion | Failed] = {}
        self.submit(requests, lambda result: results.__setitem__(result.request_id, result))
        while len(results) < len(requests):
            self.collect(timeout=1.0)
            if progress is not None:
                progress(len(results), len(requests))
        return results
