"""Rewards that stand in for real ones: of a share of letters, of any function, and some that fail or wait."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from dppo_lightning.base.records import Group
from dppo_lightning.generate.stream import RolloutStream
from dppo_lightning.reward.base import RewardFunction, Sample, Score
from dppo_lightning.reward.rewarding import Rewarding
from dppo_lightning.reward.worker import _Job
from tests.helpers.processes import PATIENCE

IN_PROCESS = Rewarding(isolation="none")
"""For tests of something else, and for rewards that keep what they are shown."""


def score_at_once(stream: RolloutStream) -> RolloutStream:
    """Have a stream's groups scored when they are submitted, so that no thread decides when a score is there."""
    worker = stream.worker
    caller = worker.pool.caller()

    def submit(group: Group, overlong_penalty: float = 0.0) -> Future[float]:
        done: Future[float] = Future()
        worker._score(caller, [_Job(group, overlong_penalty, done)])
        return done

    worker.submit = submit  # type: ignore[method-assign]
    return stream


class ShareOf(RewardFunction):
    """Share of a completion's characters that are among some.

    Args:
        characters: Characters that count.
    """

    def __init__(self, characters: str = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklm") -> None:
        self.characters = characters

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return [share(sample.completion, self.characters) for sample in samples]


def share(text: str, characters: str) -> float:
    """Share of a text's characters that are among ``characters``; 0 of an empty text."""
    return sum(character in characters for character in text) / max(len(text), 1)


class Failing(ShareOf):
    """Raises an error, once it has been asked for more completions than it scores.

    Args:
        error: Error that is raised.
        after: Number of completions that are scored before.
    """

    def __init__(self, error: Exception, after: int = 0) -> None:
        super().__init__()
        self.error = error
        self.left = after

    def score(self, samples: Sequence[Sample]) -> list[float]:
        self.left -= len(samples)
        if self.left < 0:
            raise self.error
        return super().score(samples)


class Scored(RewardFunction):
    """Scores each completion with a function, and keeps what it was shown.

    Args:
        of: Score of a completion.
    """

    def __init__(self, of: Callable[[Sample], float | Score]) -> None:
        self.of = of
        self.seen: list[Sample] = []

    def score(self, samples: Sequence[Sample]) -> list[float | Score]:
        self.seen.extend(samples)
        return [self.of(sample) for sample in samples]


class Waiting(RewardFunction):
    """Scores nothing until an event has happened; then the number of a completion's characters.

    Args:
        event: Event that is waited for.
    """

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def score(self, samples: Sequence[Sample]) -> list[float]:
        assert self.event.wait(PATIENCE)
        return [float(len(sample.completion)) for sample in samples]
