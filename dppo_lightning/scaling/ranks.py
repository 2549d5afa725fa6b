"""Ranks and Controller: rank 0 decides, each rank gets its share, and an error on one is an error on all."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch.distributed as dist

from dppo_lightning.base.errors import ConfigError, RankError, Stopped
from dppo_lightning.scaling.heartbeat import INTERVAL, Heartbeat

T = TypeVar("T")

LONGEST_ROLLOUT = timedelta(days=30)
"""Longest time that a rank may wait for rank 0's rollout. A rank that has died is noticed by its heartbeat instead."""


class Ranks:
    """Ranks of a run, as torch.distributed has set them up; a single process needs no process group.

    Values are exchanged over a process group of their own, on the CPU, apart from training's. Each method is
    collective: every rank calls it, in the same order. Use it as a context manager, or call ``close``.

    Args:
        silence: Seconds without a sign of life after which a rank counts as dead. Every other rank then prints one line
            and ends at once, as the answer that it waits for will never come.
        interval: Seconds between two signs of life.
        clock: Clock that measures how long another rank has been silent, in seconds.

    Attributes:
        rank: Rank of this process, from 0; rank 0 is the controller.
        world_size: Number of ranks.
        local_rank: Rank of this process among those on its machine, from 0.
    """

    def __init__(
        self, silence: float = 45.0, interval: float = INTERVAL, clock: Callable[[], float] = time.monotonic
    ) -> None:
        joined = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if joined else 0
        self.world_size = dist.get_world_size() if joined else 1
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank)) if joined else 0
        self._error_is_known = False  # the error that ends this rank was raised on every rank
        self._group: Any = None
        self._heartbeat: Heartbeat | None = None
        if self.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=LONGEST_ROLLOUT)
            store, address = Heartbeat.listen(self.world_size) if self.is_controller else (None, None)
            address = self.from_controller(address)
            self._heartbeat = Heartbeat(self.rank, self.world_size, address, store, silence, interval, clock)

    @property
    def is_controller(self) -> bool:
        return self.rank == 0

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self.close(error)

    def hand_out(self, per_rank: list[T] | BaseException | None) -> T:
        """Give each rank its share.

        Args:
            per_rank: Picklable shares, one a rank, or the error that kept rank 0 from making them; None on other ranks.

        Raises:
            RankError: Rank 0 handed out its error; on every rank.
        """
        error = per_rank if isinstance(per_rank, BaseException) else None
        boxes: list[tuple[str | None, T | None]] | None = None
        if self.is_controller:
            shares = per_rank if isinstance(per_rank, list) else []
            if error is None and len(shares) != self.world_size:
                error = ValueError(f"{len(shares)} shares for {self.world_size} ranks")
            line = _rank_line(self.rank, error)
            boxes = [(line, share) for share in (shares if line is None else [None] * self.world_size)]
        line, mine = self._scatter(boxes)
        if line is not None:
            self._error_is_known = True
            raise RankError(line) from error
        return mine

    def _scatter(self, boxes: list[Any] | None) -> Any:
        if self.world_size == 1:
            assert boxes is not None
            return boxes[0]
        mine = [None]
        dist.scatter_object_list(mine, boxes, src=0, group=self._group)
        return mine[0]

    def from_controller(self, value: T | None) -> T:
        """Send rank 0's value to every rank; the values of the others are ignored."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]  # type: ignore[return-value]

    def collect(self, value: T) -> list[T] | None:
        """Gather every rank's value on rank 0, in the order of ranks; None on the others."""
        if self.world_size == 1:
            return [value]
        box: list[Any] | None = [None] * self.world_size if self.is_controller else None
        dist.gather_object(value, box, dst=0, group=self._group)
        return box

    def all_gather(self, value: T) -> list[T]:
        """Gather every rank's value on every rank, in the order of ranks."""
        if self.world_size == 1:
            return [value]
        box: list[Any] = [None] * self.world_size
        dist.all_gather_object(box, value, group=self._group)
        return box

    def all_ranks_ok(self, error: BaseException | None = None) -> None:
        """Go on only if no rank has an error.

        Args:
            error: Error of this rank, or None.

        Raises:
            RankError: On every rank the same line, which names the first rank with an error and the cause.
        """
        lines = self.all_gather(_rank_line(self.rank, error))
        line = next((line for line in lines if line is not None), None)
        if line is not None:
            self._error_is_known = True
            raise RankError(line) from error

    @contextmanager
    def together(self) -> Generator[None, None, None]:
        """Make what goes wrong inside on one rank go wrong on every rank; of a single rank it raises what it raises.

        Raises:
            RankError: Of several ranks, one has failed.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as failure:
            error = failure
        if self.world_size == 1 and error is not None:
            raise error
        self.all_ranks_ok(error)

    def agree(self, value: Any, what: str) -> None:
        """Make sure that every rank has the same value.

        Args:
            value: Value that can be pickled and compared; of mappings the first key that differs is named.
            what: Name of the value in the message, e.g. "configuration".

        Raises:
            ConfigError: On every rank, names the first rank that differs from rank 0.
        """
        values = self.all_gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                self._error_is_known = True
                raise ConfigError(
                    f"rank {rank} has another {what} than rank 0: {_difference(values[0], other)}; "
                    "start every rank with the same code, configuration and environment"
                )

    def close(self, error: BaseException | None = None) -> None:
        """Leave: all ranks together without an error; with one the others print it, and end.

        An error that has been raised on every rank is known to every rank, so each leaves on its own.

        Args:
            error: Error with which this rank leaves, or None.
        """
        heartbeat, self._heartbeat = self._heartbeat, None
        if heartbeat is None:
            return
        if error is None:
            dist.barrier(group=self._group)
            heartbeat.stop()
        else:
            known = self._error_is_known or (isinstance(error, Stopped) and error.on_every_rank)
            heartbeat.stop(None if known else _rank_line(self.rank, error))


def fingerprint(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Value that ``Ranks.agree`` compares between ranks: the settings, and a hash of this package's code."""
    code = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(path.read_bytes())
    return {"code": code.hexdigest(), **settings}


def _rank_line(rank: int, error: BaseException | None) -> str | None:
    """Write an error as one line that names the rank.

    The message is kept whole, unlike in ``one_line``: the other ranks print nothing else of the error.
    """
    if error is None:
        return None
    text = " ".join(str(error).split())
    return f"rank {rank}: {type(error).__name__}: {text}" if text else f"rank {rank}: {type(error).__name__}"


def _difference(first: Any, other: Any) -> str:
    if isinstance(first, Mapping) and isinstance(other, Mapping):
        missing = object()
        for key in [*first, *(key for key in other if key not in first)]:
            ours, theirs = first.get(key, missing), other.get(key, missing)
            if ours is missing or theirs is missing or ours != theirs:
                return f"{key} is {_shown(theirs, missing)}, not {_shown(ours, missing)}"
    return f"{_shown(other)}, not {_shown(first)}"


def _shown(value: Any, missing: Any = None) -> str:
    if missing is not None and value is missing:
        return "not set"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


S = TypeVar("S")


class Task(Generic[S, T]):
    """Function that rank 0 can have every rank run, see ``Controller.task``; ranks know it by its number."""

    def __init__(self, number: int, run: Callable[[S], T]) -> None:
        self.number = number
        self.run = run


class Controller:
    """Director of work that only rank 0 can do (it has engine, prompts and rewards) but that needs every rank's model.

    Every rank makes the same tasks in the same order, and calls ``direct`` with the same section, in the same order.
    Rank 0 runs the section; in it, ``on_every_rank`` and ``while_others_run`` have all ranks work. With a single rank
    ``direct`` is a function call.

    Args:
        ranks: Ranks of the run.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._tasks: list[Task[Any, Any]] = []

    def task(self, run: Callable[[S], T]) -> Task[S, T]:
        """Make a task of a function of a rank's share; share and result must be picklable."""
        self._tasks.append(Task(len(self._tasks), run))
        return self._tasks[-1]

    def direct(self, section: Callable[[], list[T]]) -> T:
        """Run ``section`` on rank 0, and give each rank its share of the list that it returns, one entry a rank.

        Raises:
            RankError: ``section`` raised; on the other ranks. Rank 0 raises the error of ``section`` itself.
        """
        if self.ranks.world_size == 1:
            return section()[0]
        if not self.ranks.is_controller:
            number: int | None
            while (number := self.ranks.from_controller(None)) is not None:
                self.ranks.collect(self._tasks[number].run(self.ranks.hand_out(None)))
            return self.ranks.hand_out(None)
        try:
            shares: list[T] = section()
        except Exception as error:
            self.ranks.from_controller(None)
            try:
                self.ranks.hand_out(error)
            finally:
                # On purpose in place of the RankError that hand_out raises on rank 0 too: the caller there is to see
                # the error's own type (a ConfigError, an EngineError), and its traceback leads to the section.
                raise error
        self.ranks.from_controller(None)
        return self.ranks.hand_out(shares)

    def on_every_rank(self, task: Task[S, T], shares: list[S]) -> list[T]:
        """Have every rank run ``task`` on its share, and return their results by rank; for rank 0, in a section."""
        if self.ranks.world_size == 1:
            return [task.run(shares[0])]
        self.ranks.from_controller(task.number)
        results = self.ranks.collect(task.run(self.ranks.hand_out(shares)))
        assert results is not None
        return results

    def while_others_run(self, task: Task[None, Any], items: Iterable[T]) -> Iterator[T]:
        """Iterate over ``items`` while every other rank runs ``task``; for rank 0, in a section."""
        if self.ranks.world_size == 1:
            yield from items
            return
        self.ranks.from_controller(task.number)
        self.ranks.hand_out([None] * self.ranks.world_size)
        try:
            yield from items
        finally:
            self.ranks.collect(None)
