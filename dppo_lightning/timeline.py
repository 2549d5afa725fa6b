"""Timeline: what ran when, as spans that can be looked at side by side."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Lane = Literal["generate", "reward", "wait", "train", "sync", "evaluate"]


@dataclass(frozen=True)
class Span:
    """One piece of work: start and end in seconds of ``time.perf_counter``.

    Attributes:
        lane: Which verb it belongs to.
        start, end: Seconds.
        step: Optimizer step that it is done for, or -1.
        version: Weight version that was in force when it began, or -1.
    """

    lane: Lane
    start: float
    end: float
    step: int = -1
    version: int = -1


class Timeline:
    """Collects spans until they are taken."""

    def __init__(self) -> None:
        self._spans: list[Span] = []

    def add(self, span: Span) -> None:
        self._spans.append(span)

    @contextmanager
    def measure(self, lane: Lane, step: int = -1) -> Iterator[None]:
        """Add the span of a block."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(Span(lane, started, time.perf_counter(), step))

    def take(self) -> list[Span]:
        """The spans since the last call."""
        spans = list(self._spans)
        del self._spans[: len(spans)]  # the reward's thread may have added one meanwhile
        return spans
