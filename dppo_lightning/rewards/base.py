"""RewardFunction: completions in, one score each out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dppo_lightning.errors import RewardError

if TYPE_CHECKING:
    from dppo_lightning.records import Prompt


@dataclass(frozen=True)
class Sample:
    """What a reward may see of one completion: plain data, nothing of the trainer.

    Attributes:
        prompt: The rendered prompt text.
        completion: The generated text, without the tokens that begin, end and pad a text; other special tokens, such
            as ``<think>``, are in it.
        answer: The reference answer, if the prompt has one.
        columns: Extra columns of the prompt's row.
        finished: Whether the model ended the completion itself (False: cut by the length limit).
        token_ids: The generated ids, the one that ended the completion included.
        raw_completion: The text of every one of them.
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
    """A completion's reward, and named parts of it that are logged as ``reward/<name>``."""

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)


class RewardFunction(ABC):
    """Subclass and write ``score``; callers use ``__call__``, which checks what ``score`` returns.

    A reward that reads answers or columns also writes ``check``, so that rows without them are found before a run.

    Attributes:
        main_thread: Whether it must be called on the main thread (a time limit that is kept by signals, say). Then
            generation goes on meanwhile, but training does not; other rewards run beside both.
    """

    main_thread: bool = False

    @abstractmethod
    def score(self, samples: Sequence[Sample]) -> Sequence[float | Score]:
        """Return one finite number (or Score) for each sample, in order."""

    def check(self, prompts: Sequence[Prompt]) -> Mapping[int, str]:
        """Find prompts that could not be scored; called before the engine starts, for training and held-out prompts.

        Args:
            prompts: Every one that the run may ask, with ``answer`` and ``columns``.

        Returns:
            Place in ``prompts`` -> what is wrong with it, as a phrase ("has no answer"). Here: nothing is.
        """
        return {}

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        """Score and check.

        Raises:
            RewardError: Wrong count, not a number, NaN or infinite; the message names the reward and the offender.
        """
        name = type(self).__name__
        raw = list(self.score(samples))
        if len(raw) != len(samples):
            raise RewardError(f"{name} returned {len(raw)} rewards for {len(samples)} completions: return one for each")
        return [self._checked(value, index) for index, value in enumerate(raw)]

    def _checked(self, value: float | Score, index: int) -> Score:
        name = type(self).__name__
        try:
            score = value if isinstance(value, Score) else Score(float(value))
            numbers = {"reward": float(score.value), **{key: float(part) for key, part in score.parts.items()}}
        except (TypeError, ValueError):
            raise RewardError(f"{name} returned {value!r} for completion {index}: return a float or a Score") from None
        for key, number in numbers.items():
            if not math.isfinite(number):
                raise RewardError(f"{name} returned {key} = {number} for completion {index}: rewards must be finite")
        return score
