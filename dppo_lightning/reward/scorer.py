"""Scorer: the process that reads completions, and writes a line of scores for each."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dppo_lightning.base.errors import RewardError
from dppo_lightning.reward.base import RewardFunction
from dppo_lightning.reward.calling import Unit, keep_time, score_unit, score_units
from dppo_lightning.reward.messages import encoded, refused

LONGEST = 1 << 16
"""Bytes that the scores of one unit may take."""

FLUSH = 0.1
"""Seconds between writes of a scorer that is in the middle of its units."""


@dataclass(frozen=True)
class Limits:
    """Settings of a worker.

    Attributes:
        timeout: Seconds for each completion.
        memory: Bytes beyond what the loaded reward takes.
        concurrency: Units that an asynchronous reward is given at a time.
    """

    timeout: float
    memory: int
    concurrency: int


def serve_scorer(reward: RewardFunction, limits: Limits) -> None:
    """Score what descriptor 4 asks for of the delivery in descriptor 5, and answer on 3, until there is no more."""
    keep_time()
    with os.fdopen(4, "rb") as asks:
        for line in asks:
            asked = json.loads(line)
            units = pickle.loads(os.pread(5, asked["bytes"], 0))
            write_lines(score_lines(reward, units, asked["places"], limits))


def write_lines(lines: Iterator[bytes]) -> None:
    """Write lines to descriptor 3, now and then: each write wakes the keeper."""
    waiting, written, scorer = bytearray(), time.monotonic(), os.getpid()
    for line in lines:
        if os.getpid() != scorer:  # a completion has forked, and this is the copy
            os._exit(0)
        waiting += line + b"\n"
        if time.monotonic() - written > FLUSH or len(waiting) > LONGEST:
            os.write(3, waiting)
            waiting, written = bytearray(), time.monotonic()
    os.write(3, waiting)


def score_lines(
    reward: RewardFunction, units: Sequence[Unit], places: Sequence[int], limits: Limits
) -> Iterator[bytes]:
    """Score units; a line for each, in order."""
    if reward.asynchronous:
        yield from asyncio.run(_score_all(reward, [units[place] for place in places], limits))
        return
    for place in places:
        try:
            yield encoded(score_unit(reward, units[place], limits.timeout))
        except RewardError as error:
            yield refused(error)


async def _score_all(reward: RewardFunction, units: Sequence[Unit], limits: Limits) -> list[bytes]:
    try:
        outcomes = await score_units(reward, units, limits.timeout, asyncio.Semaphore(limits.concurrency))
        return [encoded(outcome) for outcome in outcomes]
    except RewardError as error:
        return [refused(error)] * len(units)
