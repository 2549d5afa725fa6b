"""Controller: rank 0 directs; the other ranks do what it asks for, until they are handed their share of the result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from dppo_lightning.scaling.ranks import Ranks

S = TypeVar("S")
T = TypeVar("T")


class Task(Generic[S, T]):
    """A function that rank 0 can have every rank run, see ``Controller.task``; ranks know it by its number."""

    def __init__(self, number: int, run: Callable[[S], T]) -> None:
        self.number = number
        self.run = run


class Controller:
    """What only rank 0 can do (it has the engine, the prompts and the rewards) while every rank's model is needed.

    Every rank makes the same tasks in the same order, and calls ``direct`` with the same section, in the same order.
    Rank 0 runs the section; within, ``on_every_rank`` and ``beside`` have all ranks work. With a single rank it is a
    function call.

    Args:
        ranks: Ranks of the run.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._tasks: list[Task[Any, Any]] = []

    def task(self, run: Callable[[S], T]) -> Task[S, T]:
        """Make a task of a function of a rank's share; its share and its result must be picklable."""
        self._tasks.append(Task(len(self._tasks), run))
        return self._tasks[-1]

    def direct(self, section: Callable[[], list[T]]) -> T:
        """Run ``section`` on rank 0, and give each rank its share of the list that it returns, one entry a rank.

        Raises:
            RankError: On the other ranks: ``section`` raised; on rank 0 what it raised.
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
                self.ranks.hand_out(error)  # raises RankError here too, and rank 0 is to raise the error itself
            finally:
                raise error
        self.ranks.from_controller(None)
        return self.ranks.hand_out(shares)

    def on_every_rank(self, task: Task[S, T], shares: list[S]) -> list[T]:
        """On rank 0, within a section: every rank runs ``task`` on its share; what they return, by rank."""
        if self.ranks.world_size == 1:
            return [task.run(shares[0])]
        self.ranks.from_controller(task.number)
        results = self.ranks.collect(task.run(self.ranks.hand_out(shares)))
        assert results is not None
        return results

    def beside(self, task: Task[None, Any], items: Iterable[T]) -> Iterator[T]:
        """On rank 0, within a section: iterate over ``items`` while every other rank runs ``task``."""
        if self.ranks.world_size == 1:
            yield from items
            return
        self.ranks.from_controller(task.number)
        self.ranks.hand_out([None] * self.ranks.world_size)
        try:
            yield from items
        finally:
            self.ranks.collect(None)
