"""The order in which prompts are visited."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dppo_lightning.batch import Prompt


class PromptSampler:
    """Visits every prompt once per pass, in an order drawn anew for each pass from the seed.

    Args:
        prompts: At least one.
        seed: Of the order.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        self.prompts = prompts
        self.seed = seed
        self.drawn = 0

    def draw(self, count: int) -> list[Prompt]:
        """The next ``count`` prompts; begins another pass when one is through."""
        places = [divmod(self.drawn + offset, len(self.prompts)) for offset in range(count)]
        orders = {turn: np.random.default_rng((self.seed, turn)).permutation(len(self.prompts)) for turn, _ in places}
        self.drawn += count
        return [self.prompts[orders[turn][place]] for turn, place in places]

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]
