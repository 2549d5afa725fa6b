"""Calls of a reward: one completion at a time, each with a time limit, and what is caught of what it does."""

from __future__ import annotations

import asyncio
import random
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from types import FrameType

from dppo_lightning.base.errors import RewardError, one_line
from dppo_lightning.base.records import Failure
from dppo_lightning.reward.base import RewardFunction, Sample, Score

Unit = Sequence[Sample]
"""Completions that are scored in one call: one, or a whole group where the reward says so."""

Outcome = list[Score] | Failure

AGAIN = 0.05
"""Seconds after which a completion is interrupted once more: a scorer may catch and ignore anything."""


class OutOfTime(BaseException):
    """The completion's time is up; no Exception, so that few scorers catch it."""


_limited = False


def keep_time() -> None:
    """Let ``score_unit`` keep its time limit by a signal; for the main thread of a process that does nothing else."""
    global _limited
    signal.signal(signal.SIGALRM, _out_of_time)
    _limited = True


def score_unit(reward: RewardFunction, unit: Unit, timeout: float) -> Outcome:
    """Score in one call.

    Args:
        reward: Reward that is called.
        unit: Completions to score.
        timeout: Seconds for each; one that takes longer is interrupted where ``keep_time`` was called.

    Raises:
        RewardError: The reward returned something else than one finite number each, or cannot score such a prompt.
    """
    limit = timeout * len(unit)
    random.seed(0)  # a scorer that draws must not depend on what was scored before
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed(0)
    started = time.monotonic()
    try:
        try:
            if _limited:
                signal.setitimer(signal.ITIMER_REAL, limit, AGAIN)
            scores = reward(unit)
        finally:
            if _limited:
                signal.setitimer(signal.ITIMER_REAL, 0)
        return scores if time.monotonic() - started <= limit else too_late(timeout)
    except RewardError:
        raise
    except BaseException as error:  # whatever a completion makes a scorer raise, exit() included
        return failed(error, timeout)


async def score_units(
    reward: RewardFunction, units: Sequence[Unit], timeout: float, slots: asyncio.Semaphore
) -> list[Outcome]:
    """Score with an asynchronous reward.

    Args:
        reward: Reward that is awaited.
        units: Units to score.
        timeout: Seconds for each completion.
        slots: Limits the number of units that are scored at a time.

    Raises:
        RewardError: As ``score_unit``.
    """

    async def scored(unit: Unit) -> Outcome:
        async with slots:
            try:
                return await asyncio.wait_for(reward.awaited(unit), timeout * len(unit))
            except RewardError:
                raise
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
                return Failure("raised", "CancelledError")
            except BaseException as error:
                return failed(error, timeout)

    return list(await asyncio.gather(*(scored(unit) for unit in units)))


def failed(error: BaseException, timeout: float) -> Failure:
    """Failure that an error of a scorer is."""
    if isinstance(error, OutOfTime | TimeoutError) and not str(error):
        return too_late(timeout)
    if isinstance(error, MemoryError):
        return Failure("memory", "")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "dppo_lightning" not in frame.filename]
    place = f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""
    try:
        return Failure("raised", f"{place}{one_line(error, typed=True)[:300]}")
    except BaseException:  # its own message may fail too
        return Failure("raised", f"{place}{type(error).__name__}")


def too_late(timeout: float) -> Failure:
    return Failure("timeout", f"{timeout:g} s")


def _out_of_time(number: int, frame: FrameType | None) -> None:
    raise OutOfTime
