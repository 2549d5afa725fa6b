"""RewardFunction: completions in, one score each out; and the search for prompts that a reward cannot score."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dppo_lightning.base.errors import DataError, RewardError, one_line
from dppo_lightning.base.records import Prompt

log = logging.getLogger(__name__)

UnreadableAnswers = Literal["refuse", "drop"]

SHOWN = 5
"""Number of rows that a message names."""


@dataclass(frozen=True)
class Sample:
    """One completion as a reward sees it: plain data, nothing of the trainer.

    Attributes:
        prompt: Rendered text of the prompt.
        completion: Generated text, without the tokens that begin, end and pad a text; other special tokens, such
            as ``<think>``, are in it.
        answer: Reference answer, if the prompt has one.
        columns: Extra columns of the prompt's row.
        finished: Whether the model ended the completion itself (False: cut by the length limit).
        token_ids: Generated ids, the one that ended the completion included.
        raw_completion: Text of all these ids.
    """

    prompt: str
    completion: str
    answer: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    finished: bool = True
    token_ids: tuple[int, ...] = ()
    raw_completion: str = ""


@dataclass(frozen=True)
class Score:
    """Reward of a completion, and named parts of it; a part's mean is logged as ``train/part/<name>``.

    Attributes:
        value: The reward, finite.
        parts: Parts by name, each finite; held-out ones are logged as ``heldout/part/<name>``.
    """

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)


class RewardFunction(ABC):
    """Base of every reward; subclasses write ``score``, callers use ``__call__``, which checks what ``score`` returns.

    A reward is sent to worker processes and called there, with one completion at a time (see ``Rewarding``), so it must
    be picklable. A reward that reads answers or columns also writes ``check``, so that rows without them are found
    before a run.

    Attributes:
        whole_groups: Whether ``score`` must see all completions of a prompt in one call; they then succeed or fail
            together.
    """

    whole_groups: bool = False

    @abstractmethod
    def score(self, samples: Sequence[Sample]) -> Sequence[float | Score] | Awaitable[Sequence[float | Score]]:
        """Return one finite number (or Score) for each sample, in order; it may be ``async def``."""

    def runs(self, prompt: Prompt) -> bool:
        """Tell whether scoring an answer to ``prompt`` may execute it, as code or as an expression; here not.

        Each completion is then scored in a process of its own, so that none can change how the next is scored.
        """
        return False

    def prepare(self) -> None:  # noqa: B027  # few rewards need it
        """Import and build what scoring needs; called in a worker before it forks the processes that score."""

    @property
    def label(self) -> str:
        """Name in messages."""
        return type(self).__name__

    @property
    def asynchronous(self) -> bool:
        """Whether ``score`` is awaited: many completions are then scored at a time."""
        return inspect.iscoroutinefunction(self.score)

    def check(self, prompts: Sequence[Prompt]) -> Mapping[int, str]:
        """Find prompts that could not be scored; called before the engine starts, for training and held-out prompts.

        Args:
            prompts: All prompts that the run may ask, with ``answer`` and ``columns``.

        Returns:
            Problems, place in ``prompts`` -> phrase that says what is wrong ("has no answer"). Here none.
        """
        return {}

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        """Score completions and check the scores.

        Raises:
            RewardError: Wrong count, not a number, NaN or infinite; the message names the reward and the offender.
        """
        if self.asynchronous:
            return asyncio.run(self.awaited(samples))
        return self._all_checked(self.score(samples), samples)

    async def awaited(self, samples: Sequence[Sample]) -> list[Score]:
        """Score completions, and check the scores as ``__call__`` does; for a reward that may be asynchronous."""
        scores = self.score(samples)
        return self._all_checked(await scores if inspect.isawaitable(scores) else scores, samples)

    def _all_checked(self, scores: object, samples: Sequence[Sample]) -> list[Score]:
        name = self.label
        if not isinstance(scores, Iterable):
            raise RewardError(
                f"{name} returned a {type(scores).__name__}: return a sequence with one float or Score for each sample"
            )
        raw = list(scores)
        if len(raw) != len(samples):
            raise RewardError(f"{name} returned {len(raw)} rewards for {len(samples)} completions: return one for each")
        return [self._checked(value, index) for index, value in enumerate(raw)]

    def _checked(self, value: float | Score, index: int) -> Score:
        name = self.label
        try:
            score = value if isinstance(value, Score) else Score(float(value))
            numbers = {"reward": float(score.value), **{key: float(part) for key, part in score.parts.items()}}
        except (TypeError, ValueError):
            raise RewardError(f"{name} returned {value!r} for completion {index}: return a float or a Score") from None
        for key, number in numbers.items():
            if not math.isfinite(number):
                raise RewardError(f"{name} returned {key} = {number} for completion {index}: rewards must be finite")
        return score


def scorable(
    prompts: list[Prompt], reward: RewardFunction, choice: UnreadableAnswers, split: Literal["train", "heldout"]
) -> list[Prompt]:
    """Return the prompts that the reward can score.

    Args:
        prompts: Prompts of one split.
        reward: Reward whose ``check`` finds the others.
        choice: Treatment of the others: "refuse" any, or "drop" and count them.
        split: Name of the split, for messages.

    Raises:
        DataError: A prompt cannot be scored and is to be refused, or none of the training prompts can be.
        RewardError: The reward's check failed.
    """
    problems = unreadable(prompts, reward)
    if not problems:
        return prompts
    kind = "training" if split == "train" else "held-out"
    rows = [f"{prompts[i].where or 'prompt ' + prompts[i].id} {problems[i]}" for i in sorted(problems)]
    more = f"; and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    found = f"{len(rows)} of {len(prompts)} {kind} prompts cannot be scored by {type(reward).__name__}"
    listed = f"{'; '.join(rows[:SHOWN])}{more}"
    if choice == "refuse":
        raise DataError(f"{found}: {listed}: mend them, or leave them out with data.unreadable_answers: drop")
    if split == "train" and len(problems) == len(prompts):
        raise DataError(f"nothing is left to train on, {found}: {listed}: mend them, or choose another reward")
    log.warning(f"left out: {found}: {listed}")
    return [prompt for place, prompt in enumerate(prompts) if place not in problems]


def unreadable(prompts: Sequence[Prompt], reward: RewardFunction) -> Mapping[int, str]:
    """Problems that the reward's ``check`` finds, place in ``prompts`` -> what is wrong.

    Raises:
        RewardError: ``check`` raised, or returned something else.
    """
    name = type(reward).__name__
    try:
        problems = reward.check(prompts)
    except RewardError:
        raise
    except Exception as error:  # a reward of the user's may raise anything
        raise RewardError(f"{name}.check raised {one_line(error, typed=True)}") from error
    places = range(len(prompts))
    if not isinstance(problems, Mapping) or not all(
        isinstance(place, int) and place in places and isinstance(what, str) for place, what in problems.items()
    ):
        raise RewardError(
            f"{name}.check returned {str(problems)[:80]}: return a mapping from places in the prompts to what is wrong"
        )
    return problems
