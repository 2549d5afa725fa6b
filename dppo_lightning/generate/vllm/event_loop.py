"""EventLoop: an asyncio loop in a thread of its own, for callers that are not asynchronous."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

JOIN_SECONDS = 2.0
"""Seconds that a loop gets to end; one that is stuck for longer is left to end with the process."""


class EventLoop:
    """A loop that runs until ``stop``.

    Args:
        name: Name of its thread.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Have the loop do something, and return at once."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Have the loop do something, and wait until it has."""
        return self.begin(work).result()

    def call_soon(self, function: Callable[..., object], *arguments: Any) -> None:
        """Have the loop call a plain function, and return at once."""
        self._loop.call_soon_threadsafe(function, *arguments)

    def stop(self) -> None:
        """End the loop and its thread."""
        self.call_soon(self._loop.stop)
        self._thread.join(JOIN_SECONDS)
        if not self._thread.is_alive():
            self._loop.close()
