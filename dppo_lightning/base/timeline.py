"""Timeline: the pieces of work of a run as spans of time, which can be compared side by side."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Lane = Literal["generate", "reward", "wait", "train", "sync", "evaluate"]


@dataclass(frozen=True)
class Span:
    """One piece of work with its start and end.

    Attributes:
        lane: Verb that the work belongs to.
        start, end: Start and end, in seconds of ``time.perf_counter``.
        step: Optimizer step that the work is done for, or -1.
        version: Weight version in force when the work began, or -1.
    """

    lane: Lane
    start: float
    end: float
    step: int = -1
    version: int = -1


class Timeline:
    """Collection of spans, until they are taken."""

    def __init__(self) -> None:
        self._spans: list[Span] = []

    def add(self, span: Span) -> None:
        self._spans.append(span)

    @contextmanager
    def measure(self, lane: Lane, step: int = -1) -> Iterator[None]:
        """Measure a block of code and add its span."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(Span(lane, started, time.perf_counter(), step))

    def take(self) -> list[Span]:
        """Return the spans since the last call, and forget them."""
        spans = list(self._spans)
        del self._spans[: len(spans)]  # the reward's thread may have added one in between
        return spans
