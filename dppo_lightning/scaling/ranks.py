"""Ranks: one controller. Rank 0 decides, each rank is handed its share, and an error on one is an error on all."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from dppo_lightning.errors import ConfigError, RankError, Requeued
from dppo_lightning.scaling.heartbeat import INTERVAL, Heartbeat

T = TypeVar("T")

PATIENCE = timedelta(days=30)
"""A rank may wait this long for rank 0's rollout. A rank that has died is noticed by its heartbeat instead."""


class Ranks:
    """The ranks of a run, as torch.distributed has set them up; a single process needs no process group.

    Everything is exchanged over a group of its own, on the CPU, apart from training's. Each method is collective: every
    rank calls it, in the same order. Use it as a context manager, or call ``close``.

    Args:
        silence: Seconds without a sign of life after which a rank counts as dead. Every other rank then prints one line
            and ends at once, as what it waits for will never come.
        interval: Seconds between two signs of life.
        clock: Tells seconds, for how long another rank has been silent.

    Attributes:
        rank: Of this process, from 0; rank 0 is the controller.
        world_size: Number of ranks.
        local_rank: Of this process on its machine.
    """

    def __init__(
        self, silence: float = 45.0, interval: float = INTERVAL, clock: Callable[[], float] = time.monotonic
    ) -> None:
        joined = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if joined else 0
        self.world_size = dist.get_world_size() if joined else 1
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank)) if joined else 0
        self._told = False  # an error is known to every rank already
        self._group: Any = None
        self._heartbeat: Heartbeat | None = None
        if self.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
            address = self.from_controller(Heartbeat.listen(self.world_size) if self.is_controller else None)
            self._heartbeat = Heartbeat(self.rank, self.world_size, address, silence, interval, clock)

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
            per_rank: On rank 0 one picklable share for each rank, or the error that kept it from making them; elsewhere
                None.

        Raises:
            RankError: Rank 0 handed out its error; on every rank.
        """
        error = per_rank if isinstance(per_rank, BaseException) else None
        boxes: list[tuple[str | None, T | None]] | None = None
        if self.is_controller:
            shares = per_rank if isinstance(per_rank, list) else []
            if error is None and len(shares) != self.world_size:
                error = ValueError(f"{len(shares)} shares for {self.world_size} ranks")
            line = _line(self.rank, error)
            boxes = [(line, share) for share in (shares if line is None else [None] * self.world_size)]
        line, mine = self._scatter(boxes)
        if line is not None:
            self._told = True
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
        """Rank 0's value, on every rank; what the others give is ignored."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]  # type: ignore[return-value]

    def collect(self, value: T) -> list[T] | None:
        """Every rank's value in the order of ranks, on rank 0; None elsewhere."""
        if self.world_size == 1:
            return [value]
        box: list[Any] | None = [None] * self.world_size if self.is_controller else None
        dist.gather_object(value, box, dst=0, group=self._group)
        return box

    def everyone(self, value: T) -> list[T]:
        """Every rank's value in the order of ranks, on every rank."""
        if self.world_size == 1:
            return [value]
        box: list[Any] = [None] * self.world_size
        dist.all_gather_object(box, value, group=self._group)
        return box

    def all_ranks_ok(self, error: BaseException | None = None) -> None:
        """Go on only if no rank has an error.

        Args:
            error: What went wrong on this rank, or None.

        Raises:
            RankError: On every rank the same line, which names the first rank with an error and the cause.
        """
        lines = self.everyone(_line(self.rank, error))
        line = next((line for line in lines if line is not None), None)
        if line is not None:
            self._told = True
            raise RankError(line) from error

    def agree(self, value: Any, what: str) -> None:
        """Make sure that every rank has the same value.

        Args:
            value: Anything that can be pickled and compared; of mappings the first key that differs is named.
            what: Its name in the message, e.g. "configuration".

        Raises:
            ConfigError: On every rank, names the first rank that differs from rank 0.
        """
        values = self.everyone(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                self._told = True
                raise ConfigError(
                    f"rank {rank} has another {what} than rank 0: {_difference(values[0], other)}; "
                    "start every rank with the same code, configuration and environment"
                )

    def close(self, error: BaseException | None = None) -> None:
        """Leave. Without an error all ranks leave together; with one the others are told, and end.

        What has been raised on every rank is known to every rank, so each leaves on its own.
        """
        heartbeat, self._heartbeat = self._heartbeat, None
        if heartbeat is None:
            return
        if error is None:
            dist.barrier(group=self._group)
            heartbeat.stop()
        else:
            known = self._told or isinstance(error, Requeued)
            heartbeat.stop(None if known else _line(self.rank, error))


def fingerprint(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What every rank of a run must have alike, for ``Ranks.agree``: the settings, and the code of this package."""
    code = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(path.read_bytes())
    return {"code": code.hexdigest(), **settings}


def _line(rank: int, error: BaseException | None) -> str | None:
    """An error as one line that names the rank."""
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
