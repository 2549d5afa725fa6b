"""RewardPool: worker processes in which rewards are called, and the call within this process.

What a completion can reach is lost with its worker: it may make a scorer write anything. So answers come back as JSON
that is checked here, and not as the pickles that process pools of other libraries send; nor do those let a worker start
with an environment, namespaces and limits of its own.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from typing import Protocol

import cloudpickle

from dppo_lightning.base.errors import ConfigError, one_line
from dppo_lightning.reward.base import RewardFunction
from dppo_lightning.reward.calling import Outcome, Unit, score_unit, score_units
from dppo_lightning.reward.cell_process import CellProcess
from dppo_lightning.reward.rewarding import Rewarding

log = logging.getLogger(__name__)


class Caller(Protocol):
    """What scores units for one thread."""

    def score(self, units: Sequence[Unit], together: bool) -> list[Outcome]:
        """Score each unit; the result depends on nothing but the unit.

        Args:
            units: Units to score, at least one.
            together: Whether they may share a process.

        Raises:
            RewardError: The reward itself is wrong.
        """
        ...

    def close(self) -> None:
        """End what was started."""
        ...


class InProcess:
    """Caller in this process, for rewards that are trusted.

    Args:
        reward: Reward that is called.
        settings: Settings of the calls.
    """

    def __init__(self, reward: RewardFunction, settings: Rewarding) -> None:
        self.reward = reward
        self.settings = settings
        self._runner = asyncio.Runner()  # one loop for all calls: clients of servers belong to one

    def score(self, units: Sequence[Unit], together: bool) -> list[Outcome]:
        timeout = self.settings.timeout
        if self.reward.asynchronous:
            return self._runner.run(self._score_all(units))
        return [score_unit(self.reward, unit, timeout) for unit in units]

    async def _score_all(self, units: Sequence[Unit]) -> list[Outcome]:
        slots = asyncio.Semaphore(self.settings.concurrency)
        return await score_units(self.reward, units, self.settings.timeout, slots)

    def close(self) -> None:
        self._runner.close()


class RewardPool:
    """Factory of the callers of a run's reward, one for each thread.

    Args:
        reward: Reward that is called.
        settings: Settings of the calls.

    Attributes:
        callers: Number of callers that may work at a time.

    Raises:
        ConfigError: The reward cannot be sent to another process.
    """

    def __init__(self, reward: RewardFunction, settings: Rewarding) -> None:
        self.reward = reward
        self.settings = settings
        self.callers = 1 if settings.isolation == "none" else settings.processes
        self._told = False
        self._cells: list[CellProcess] = []
        self._lock = threading.Lock()
        name = reward.label
        if settings.isolation == "none":
            log.warning(
                f"{name} is called in the trainer's process (data.rewarding.isolation: none): nothing limits what it "
                "does with what the model writes"
            )
            return
        try:
            self._pickled = cloudpickle.dumps(reward)
        except Exception as error:  # any object's own reduction may raise
            raise ConfigError(
                f"{name} cannot be sent to a worker process, {one_line(error, typed=True)}: make it in the function "
                "that scores, or trust it with data.rewarding.isolation: none"
            ) from error

    def caller(self) -> Caller:
        """Make a caller; its process starts with the first call."""
        if self.settings.isolation == "none":
            return InProcess(self.reward, self.settings)
        worker = CellProcess(self._pickled, self.reward.label, self.settings, self._tell)
        with self._lock:
            self._cells.append(worker)
        return worker

    def close(self) -> None:
        """End every process; calls that are under way raise."""
        with self._lock:
            cells, self._cells = self._cells, []
        for cell in cells:
            cell.stop()
        for cell in cells:
            cell.close()

    def _tell(self, missing: list[str]) -> None:
        """Say once what the machine does not permit."""
        with self._lock:
            told, self._told = self._told, True
        if missing and not told:
            log.warning(f"reward workers do without what this machine does not permit: {', '.join(missing)}")
