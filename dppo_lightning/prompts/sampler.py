"""PromptSampler: the order in which prompts are asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.base.records import Prompt


class PromptSampler(ABC):
    """Base of the samplers; subclasses write ``draw``, and put what it remembers into ``state_dict``.

    Attributes:
        prompts: Training prompts, at least one.
        seed: Seed of the run.
    """

    prompts: Sequence[Prompt]
    seed: int

    def start(self, prompts: Sequence[Prompt], seed: int) -> None:
        """Get ready to draw; called before the first draw, and again by a second ``fit``, which goes on from the first.

        Args:
            prompts: Training prompts, at least one.
            seed: Seed of the run.
        """
        self.prompts = prompts
        self.seed = seed

    @abstractmethod
    def draw(self, count: int) -> list[Prompt]:
        """Return exactly ``count`` prompts, the next ones; when all were given it begins again."""

    def record(self, prompt: Prompt, pass_rate: float) -> None:  # noqa: B027  # most samplers need not know
        """Take note of a generated group; called for each.

        Args:
            prompt: Prompt of the group.
            pass_rate: Share of its completions that are solved, in [0, 1].
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """State from which drawing goes on as if there had been no interruption."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that ``state_dict`` returned."""


def draw(sampler: PromptSampler, count: int) -> list[Prompt]:
    """Return the next ``count`` prompts of a sampler.

    Raises:
        ConfigError: The sampler gives another number of prompts, or something else than prompts.
    """
    asked = f"{type(sampler).__name__}.draw({count})"
    try:
        prompts = sampler.draw(count)
    except StopIteration:
        prompts = []
    if not isinstance(prompts, list) or not all(isinstance(prompt, Prompt) for prompt in prompts):
        raise ConfigError(f"{asked} must return a list of prompts, got {_kind(prompts)}")
    if len(prompts) != count:
        raise ConfigError(
            f"{asked} gave {len(prompts)} prompts: a sampler gives as many as it is asked for, and begins again when "
            "it has given all"
        )
    return prompts


def _kind(value: object) -> str:
    if not isinstance(value, list):
        return type(value).__name__
    return "a list with " + next(type(item).__name__ for item in value if not isinstance(item, Prompt))


class Shuffled(PromptSampler):
    """Sampler that visits every prompt once per pass, in an order that each pass draws for itself from the seed."""

    def __init__(self) -> None:
        self.drawn = 0

    def start(self, prompts: Sequence[Prompt], seed: int) -> None:
        super().start(prompts, seed)
        self._orders: dict[int, np.ndarray] = {}  # of the passes that the last draw was from: each is drawn once

    def draw(self, count: int) -> list[Prompt]:
        """Return the next ``count`` prompts; begin another pass when one is through."""
        places = [divmod(self.drawn + offset, len(self.prompts)) for offset in range(count)]
        self._orders = {turn: self._order(turn) for turn in {turn for turn, _ in places}}
        self.drawn += count
        return [self.prompts[self._orders[turn][place]] for turn, place in places]

    def _order(self, turn: int) -> np.ndarray:
        if turn in self._orders:
            return self._orders[turn]
        return np.random.default_rng((self.seed, turn)).permutation(len(self.prompts))

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]


class PassRateCurriculum(PromptSampler):
    """Sampler that prefers prompts that the policy solves sometimes: all-right and all-wrong groups teach nothing.

    A prompt with pass rate p is drawn with weight max(floor, 4 p (1 - p)), which is the variance of its reward. The
    pass rate is a running mean of the recorded ones; prompts never asked count as ``prior``. One draw takes no prompt
    twice, unless it is larger than the number of prompts.

    Args:
        prior: Pass rate assumed of a prompt that was not asked yet, in [0, 1].
        memory: Weight of a prompt's older pass rate when a new one comes, in [0, 1); 0 keeps the newest only.
        floor: Least weight of any prompt, in (0, 1]; 1 draws uniformly.

    Raises:
        ConfigError: A value is out of range.
    """

    def __init__(self, prior: float = 0.5, memory: float = 0.5, floor: float = 0.05) -> None:
        if not 0 <= prior <= 1:
            raise ConfigError(f"PassRateCurriculum: prior must be in [0, 1], got {prior}")
        if not 0 <= memory < 1:
            raise ConfigError(f"PassRateCurriculum: memory must be in [0, 1), got {memory}")
        if not 0 < floor <= 1:
            raise ConfigError(f"PassRateCurriculum: floor must be in (0, 1], got {floor}")
        self.prior = prior
        self.memory = memory
        self.floor = floor
        self.draws = 0
        self.pass_rates: dict[str, float] = {}

    def draw(self, count: int) -> list[Prompt]:
        """Return prompts drawn without replacement by their weights."""
        rates = np.array([self.pass_rates.get(prompt.id, self.prior) for prompt in self.prompts])
        weights = np.maximum(self.floor, 4 * rates * (1 - rates))
        chosen: list[int] = []
        while len(chosen) < count:
            generator = np.random.default_rng((self.seed, self.draws))
            # the largest of log weight + Gumbel noise are a weighted sample without replacement
            keys = np.log(weights) + generator.gumbel(size=len(weights))
            chosen += np.argsort(-keys, kind="stable")[: count - len(chosen)].tolist()
            self.draws += 1
        return [self.prompts[index] for index in chosen]

    def record(self, prompt: Prompt, pass_rate: float) -> None:
        before = self.pass_rates.get(prompt.id)
        rate = pass_rate if before is None else self.memory * before + (1 - self.memory) * pass_rate
        self.pass_rates[prompt.id] = rate

    def state_dict(self) -> dict[str, Any]:
        return {"draws": self.draws, "pass_rates": dict(self.pass_rates)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.draws = state["draws"]
        self.pass_rates = dict(state["pass_rates"])
