"""WeightedSum: several rewards as one."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Sequence

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.base.records import Prompt
from dppo_lightning.reward.base import RewardFunction, Sample, Score, unreadable


class WeightedSum(RewardFunction):
    """Weighted sum of other rewards; each is logged as a part under its name, its own parts as "<name>/<part>".

    Args:
        rewards: Rewards to add up, at least one.
        weights: Weight of each reward, finite; 0 only logs the reward, a negative one makes it a penalty.
        names: Name of each reward, all different, without "/"; None for the class names.

    Raises:
        ConfigError: The lists do not fit together, a weight is not finite, or a name is empty, has a "/" or is there
            twice.
    """

    def __init__(self, rewards: list[RewardFunction], weights: list[float], names: list[str] | None = None) -> None:
        if not rewards:
            raise ConfigError("rewards is empty: name at least one")
        names = [type(reward).__name__ for reward in rewards] if names is None else list(names)
        for argument, values in (("weights", weights), ("names", names)):
            if len(values) != len(rewards):
                raise ConfigError(f"{argument} has {len(values)} entries for {len(rewards)} rewards: give one for each")
        for name, weight in zip(names, weights, strict=True):
            if not math.isfinite(weight):
                raise ConfigError(f"weights must be finite, got {weight} for {name}")
            if not name or "/" in name:
                raise ConfigError(f"names must not be empty or have a '/', got {name!r}")
            if names.count(name) > 1:
                raise ConfigError(f"two rewards are named {name!r}: give different names")
        self.rewards = list(rewards)
        self.weights = [float(weight) for weight in weights]
        self.names = names
        self.whole_groups = any(reward.whole_groups for reward in rewards)

    @property
    def asynchronous(self) -> bool:
        return any(reward.asynchronous for reward in self.rewards)

    def prepare(self) -> None:
        for reward in self.rewards:
            reward.prepare()

    def runs(self, prompt: Prompt) -> bool:
        return any(reward.runs(prompt) for reward in self.rewards)

    def score(self, samples: Sequence[Sample]) -> list[Score] | Awaitable[list[Score]]:
        if self.asynchronous:
            return self._gathered(samples)
        return self._sums([reward(samples) for reward in self.rewards])

    async def _gathered(self, samples: Sequence[Sample]) -> list[Score]:
        return self._sums(await asyncio.gather(*(reward.awaited(samples) for reward in self.rewards)))

    def _sums(self, members: Sequence[Sequence[Score]]) -> list[Score]:
        return [self._sum(scores) for scores in zip(*members, strict=True)]

    def check(self, prompts: Sequence[Prompt]) -> dict[int, str]:
        problems: dict[int, list[str]] = {}
        for name, reward in zip(self.names, self.rewards, strict=True):
            for place, what in unreadable(prompts, reward).items():
                problems.setdefault(place, []).append(f"{what} ({name})")
        return {place: " and ".join(found) for place, found in problems.items()}

    def _sum(self, scores: Sequence[Score]) -> Score:
        value = sum(weight * score.value for weight, score in zip(self.weights, scores, strict=True))
        parts = {}
        for name, score in zip(self.names, scores, strict=True):
            parts[name] = score.value
            parts |= {f"{name}/{part}": number for part, number in score.parts.items()}
        return Score(value, parts)
