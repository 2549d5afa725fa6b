"""Controller: rank 0 directs; the other ranks do what it asks for, until they are handed their share of the result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from dppo_lightning.scaling.ranks import Ranks

T = TypeVar("T")
Work = Callable[[Any], Any]


class Controller:
    """What only rank 0 can do (it has the engine, the prompts and the rewards) while every rank's model is needed.

    Every rank calls ``direct`` with the same section, in the same order. Rank 0 runs it; within, ``everyone`` and
    ``beside`` have all ranks work. With a single rank it is a function call.

    Args:
        ranks: Of the run.
        work: What can be asked of every rank, by name: a function of its share.
    """

    def __init__(self, ranks: Ranks, work: Mapping[str, Work]) -> None:
        self.ranks = ranks
        self.work = dict(work)

    def direct(self, section: Callable[[], list[T]]) -> T:
        """Run ``section`` on rank 0, and give each rank its share of the list that it returns, one entry a rank.

        Raises:
            RankError: On the other ranks: ``section`` raised; on rank 0 what it raised.
        """
        if self.ranks.world_size == 1:
            return section()[0]
        if not self.ranks.is_controller:
            name: str | None
            while (name := self.ranks.from_controller(None)) is not None:
                self.ranks.collect(self.work[name](self.ranks.hand_out(None)))
            return self.ranks.hand_out(None)
        try:
            shares: list[T] = section()
        except Exception as error:
            self.ranks.from_controller(None)
            try:
                self.ranks.hand_out(error)
            finally:
                raise error
        self.ranks.from_controller(None)
        return self.ranks.hand_out(shares)

    def everyone(self, name: str, shares: list[Any]) -> list[Any]:
        """On rank 0, within a section: every rank does ``name`` with its share; what they return, by rank."""
        if self.ranks.world_size == 1:
            return [self.work[name](shares[0])]
        self.ranks.from_controller(name)
        results = self.ranks.collect(self.work[name](self.ranks.hand_out(shares)))
        assert results is not None
        return results

    def beside(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """On rank 0, within a section: iterate over ``items`` while every other rank does ``name``."""
        if self.ranks.world_size == 1:
            yield from items
            return
        self.ranks.from_controller(name)
        self.ranks.hand_out([None] * self.ranks.world_size)
        try:
            yield from items
        finally:
            self.ranks.collect(None)
