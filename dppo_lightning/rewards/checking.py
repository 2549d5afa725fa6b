"""Prompts that a reward cannot score are found before anything starts: refused with their rows, or left out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Literal

from dppo_lightning.errors import DataError, RewardError, reason
from dppo_lightning.records import Prompt
from dppo_lightning.rewards.base import RewardFunction

log = logging.getLogger(__name__)

UnreadableAnswers = Literal["refuse", "drop"]

SHOWN = 5
"""Rows that a message names."""


def scorable(
    prompts: list[Prompt], reward: RewardFunction, choice: UnreadableAnswers, split: Literal["train", "heldout"]
) -> list[Prompt]:
    """The prompts that the reward can score.

    Args:
        prompts: Of one split.
        reward: Asked for those that it cannot.
        choice: "refuse" any, or "drop" and count them.
        split: For messages.

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
    """What the reward's check found: place -> what is wrong.

    Raises:
        RewardError: It raised, or returned something else.
    """
    name = type(reward).__name__
    try:
        problems = reward.check(prompts)
    except RewardError:
        raise
    except Exception as error:  # whatever a reward of the user's own raises
        raise RewardError(f"{name}.check raised {type(error).__name__}: {reason(error)}") from error
    places = range(len(prompts))
    if not isinstance(problems, Mapping) or not all(
        isinstance(place, int) and place in places and isinstance(what, str) for place, what in problems.items()
    ):
        raise RewardError(
            f"{name}.check returned {str(problems)[:80]}: return a mapping from places in the prompts to what is wrong"
        )
    return problems
