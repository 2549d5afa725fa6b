"""Heartbeat: notices that a rank has died, although the others wait for it in an operation without a time limit."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import DistError, TCPStore

INTERVAL = 5.0
"""Seconds between two signs of life."""

LONGEST_READING = 10.0
"""Longest time, in seconds, that rank 0 waits for the others to read who has failed: its store ends with it."""


class Heartbeat:
    """Threads that show that this rank is alive, and watch whether the others are.

    Rank 0 keeps the signs of life in a store and watches every rank; the others watch rank 0, and read in the store who
    has failed. When a rank has failed, a thread prints one line and ends the process: the main thread cannot be woken
    from a collective operation. A rank that has written that it leaves is not missed.

    One thread asks the store and one looks at the clock: a question to a machine that is gone is never answered.

    Args:
        rank: Rank of this process.
        world_size: Number of ranks.
        address: Host and port of rank 0's store, as ``listen`` returned them there.
        store: Store that ``listen`` opened on rank 0; None on the others, which connect to ``address``.
        silence: Seconds without a sign of life after which a rank counts as dead.
        interval: Seconds between two signs of life.
        clock: Clock that measures how long another rank has been silent, in seconds.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        address: tuple[str, int],
        store: TCPStore | None = None,
        silence: float = 45.0,
        interval: float = INTERVAL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rank = rank
        self.silence = silence
        self.interval = min(interval, silence / 4)
        self._clock = clock
        self._watched = [other for other in (range(world_size) if rank == 0 else [0]) if other != rank]
        if store is None:
            host, port = address
            store = TCPStore(host, port, world_size, False, timedelta(seconds=silence), wait_for_workers=False)
        self._store = store
        self._stopped = threading.Event()
        self._counts: dict[int, int] = {}
        self._heard: dict[int, float] = {}
        self._left: set[int] = set()
        self._answered = clock()
        self._beaten = self._looked = clock()
        self._failure: str | None = None
        self._asking = threading.Thread(target=self._ask, name="heartbeat", daemon=True)
        self._watching = threading.Thread(target=self._watch, name="heartbeat watch", daemon=True)
        self._asking.start()
        self._watching.start()

    @staticmethod
    def listen(world_size: int) -> tuple[TCPStore, tuple[str, int]]:
        """Open the store on a free port; for rank 0.

        Returns:
            The store, for this rank's heartbeat, and its host and port, for those of the other ranks.
        """
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        store = TCPStore(host, 0, world_size, True, wait_for_workers=False)
        return store, (host, store.port)

    def stop(self, failure: str | None = None) -> None:
        """End the threads.

        Args:
            failure: Line that the other ranks print before they end; None where this rank leaves in good order.
        """
        if self._stopped.is_set():
            return
        self._stopped.set()
        self._watching.join()
        self._asking.join(self.silence)
        if self._asking.is_alive():  # still without an answer: rank 0 cannot be reached
            return
        try:
            if failure is not None:
                self._post(failure)
            self._store.add(f"left/{self.rank}", 1)
        except DistError:
            pass  # rank 0 has gone, and the store with it

    def _ask(self) -> None:
        while not self._stopped.wait(self.interval):
            try:
                self._failure = self._failure or self._beat()
                self._answered = self._clock()
            except DistError:
                pass  # rank 0 may have left in good order an instant ago, as this rank is about to

    def _watch(self) -> None:
        while not self._stopped.wait(self.interval):
            now = self._clock()
            if self._was_suspended(self._looked, now):
                self._answered = now
            self._looked = now
            silent = now - self._answered
            failure = self._failure
            if failure is None and silent > self.silence:
                failure = f"rank 0 has died (no answer for {self.silence:.0f} s)"
            if failure is not None and not self._stopped.is_set():
                print(f"error: {failure}: rank {self.rank} ends", file=sys.stderr, flush=True)
                os._exit(1)

    def _was_suspended(self, before: float, now: float) -> bool:
        """Tell whether this process itself stood still (a suspended job, a snapshot): then the silence was its own."""
        return now - before > self.silence / 2

    def _beat(self) -> str | None:
        """Show that this rank is alive and look at the others; return the line of a rank that has failed, if any."""
        self._store.add(f"beat/{self.rank}", 1)
        if self._store.add("failures", 0):
            failure = self._store.get("failure").decode()
            self._store.add(f"read/{self.rank}", 1)
            return failure
        now = self._clock()
        if self._was_suspended(self._beaten, now):
            self._heard = dict.fromkeys(self._heard, now)
        self._beaten = now
        for rank in self._watched:
            count = self._store.add(f"beat/{rank}", 0)
            if count != self._counts.get(rank) or rank not in self._heard:
                self._counts[rank], self._heard[rank] = count, now
            elif rank not in self._left and now - self._heard[rank] > self.silence:
                if self._store.add(f"left/{rank}", 0):
                    self._left.add(rank)
                    continue
                failure = f"rank {rank} has died (no sign of life for {self.silence:.0f} s)"
                self._post(failure, dead=rank)
                return failure
        return None

    def _post(self, failure: str, dead: int | None = None) -> None:
        """Write who has failed; rank 0 then waits until the others, except one that is ``dead``, have read it."""
        self._store.set("failure", failure)
        self._store.add("failures", 1)
        if self.rank == 0:
            deadline = time.monotonic() + LONGEST_READING
            waiting = [rank for rank in self._watched if rank != dead]
            while waiting and time.monotonic() < deadline:
                time.sleep(min(self.interval, 0.1))
                waiting = [rank for rank in waiting if not self._knows(rank)]

    def _knows(self, rank: int) -> bool:
        """Tell whether a rank has read of the failure, or has left."""
        return any(self._store.add(f"{what}/{rank}", 0) > 0 for what in ("read", "left"))
