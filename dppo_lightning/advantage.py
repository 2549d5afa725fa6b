"""AdvantageEstimator: rewarded groups in, an advantage for every generated token out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.base.records import Group

NO_SIGNAL = 1e-6
"""Difference of a group's rewards below which they teach nothing: their advantages are all zero."""

ROUNDING = 1e-12
"""Share of a group's largest reward below which a difference from the mean is the rounding of the mean."""


class AdvantageEstimator(ABC):
    """Base of the estimators; subclasses write ``estimate``, or derive from ``GroupBaseline`` for a baseline per group.

    Attributes:
        minimum_samples: Smallest ``samples_per_prompt`` with which an advantage can differ from zero.
    """

    minimum_samples: int = 1

    @abstractmethod
    def estimate(self, rewards: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Compute advantages of one rollout: for each group its [G] rewards in, its [G] advantages out (float64)."""

    def per_token(self, groups: Sequence[Group], rewards: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        """Compute the advantages of one rollout token by token; override it where the tokens of a completion differ.

        Args:
            groups: Complete groups, with texts and rewards.
            rewards: Rewards of each group, [G] float64, less what is subtracted from them (KL in the reward).

        Returns:
            Advantages, for each group, for each of its completions [T] float64.

        Raises:
            ConfigError: ``estimate`` returned something else than a finite number for each completion.
        """
        advantages = self._checked(self.estimate(rewards), rewards)
        return [
            [np.full(len(completion), advantage) for completion, advantage in zip(group.completions, mine, strict=True)]
            for group, mine in zip(groups, advantages, strict=True)
        ]

    def _checked(self, advantages: Sequence[np.ndarray], rewards: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        name = type(self).__name__
        shapes, wanted = [[np.shape(group) for group in groups] for groups in (advantages, rewards)]
        if shapes != wanted:
            raise ConfigError(f"{name} returned advantages of shapes {shapes} for rewards of {wanted}: return the same")
        if not all(np.isfinite(group).all() for group in advantages):
            raise ConfigError(f"{name} returned an advantage that is not finite: mend its estimate")
        return advantages

    def check(self, samples_per_prompt: int) -> None:
        """Refuse a group size with which every advantage would be zero.

        Raises:
            ConfigError: ``samples_per_prompt`` is below ``minimum_samples``.
        """
        if samples_per_prompt < self.minimum_samples:
            raise ConfigError(
                f"{type(self).__name__} compares the completions of a prompt with each other: "
                f"set data.samples_per_prompt to at least {self.minimum_samples}, got {samples_per_prompt}"
            )


class GroupBaseline(AdvantageEstimator):
    """Base of the estimators that look at one group at a time; subclasses write ``of_group``.

    A group without signal gets exact zeros and never reaches ``of_group``: 6 rewards of 0.1 have a mean that is not
    0.1, and tokens with an advantage of 1e-17 would be counted, masked and differentiated.
    """

    minimum_samples = 2

    @abstractmethod
    def of_group(self, rewards: np.ndarray) -> np.ndarray:
        """Turn the [G] rewards of one group into [G] advantages."""

    def estimate(self, rewards: Sequence[np.ndarray]) -> list[np.ndarray]:
        groups = [np.asarray(group, np.float64) for group in rewards]
        return [np.zeros_like(group) if without_signal(group) else self.of_group(group) for group in groups]


def without_signal(rewards: np.ndarray) -> bool:
    """Tell whether a group's [G] rewards are all equal, up to ``NO_SIGNAL``."""
    return bool(np.ptp(rewards) < NO_SIGNAL)


def above_mean(rewards: np.ndarray) -> np.ndarray:
    """Rewards [G] minus their mean; exactly 0 for a reward that is the mean."""
    difference = rewards - rewards.mean()
    return np.where(np.abs(difference) <= ROUNDING * np.abs(rewards).max(), 0.0, difference)


class GroupMean(GroupBaseline):
    """Reward minus the group's mean, not divided by the standard deviation (DPPO; Dr.GRPO, arXiv 2503.20783)."""

    def of_group(self, rewards: np.ndarray) -> np.ndarray:
        return above_mean(rewards)


class GroupMeanStd(GroupBaseline):
    """Reward minus the group's mean, divided by its sample standard deviation (GRPO, arXiv 2402.03300).

    Args:
        tolerance: Largest standard deviation with which a group gets zero advantages, >= 0.
    """

    def __init__(self, tolerance: float = 1e-6) -> None:
        if not tolerance >= 0:
            raise ConfigError(f"GroupMeanStd: tolerance must be >= 0, got {tolerance}")
        self.tolerance = tolerance

    def of_group(self, rewards: np.ndarray) -> np.ndarray:
        deviation = rewards.std(ddof=1)
        return above_mean(rewards) / deviation if deviation > self.tolerance else np.zeros_like(rewards)


class LeaveOneOut(GroupBaseline):
    """Reward minus the mean of the group's other rewards (RLOO, arXiv 2402.14740)."""

    def of_group(self, rewards: np.ndarray) -> np.ndarray:
        count = len(rewards)
        return above_mean(rewards) * count / (count - 1)
