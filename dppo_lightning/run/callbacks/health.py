"""Health: says in words when a run goes wrong in one of the ways that are known, and what to try."""

from __future__ import annotations

import logging
import math
from collections import deque
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import Any

import lightning.pytorch as pl

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.train.hooks import RunCallback

log = logging.getLogger(__name__)

METRICS: dict[str, str] = {
    "mismatch": "train/mismatch_tv",
    "masked": "train/masked_share",
    "entropy": "train/entropy",
    "length": "train/length",
    "truncated": "train/truncated",
    "reward": "train/reward",
    "spread": "train/reward_std",
    "ratio": "train/ratio_max",
}
"""What is watched -> the metric."""

WARNINGS: dict[str, str] = {
    "mismatch": "mean |pi - mu| is {now:.3g} ({first:.3g} at first, band: up to {limit:.3g}): training moves away from "
    "what generates. Lower the learning rate or data.steps_per_rollout; if it was as high at first, engine and trainer "
    "differ: set data.rollout_dtype to the trainer's precision",
    "masked": "the trust region stops {now:.1%} of the tokens ({first:.1%} at first, band: up to {limit:.1%}): much of "
    "what is generated teaches nothing. Lower the learning rate or data.steps_per_rollout, or widen the region",
    "entropy_low": "the policy's entropy is {now:.3g} nats ({first:.3g} at first, band: from {limit:.3g}): its "
    "completions are becoming all the same. Lower the learning rate, set model.entropy_coefficient or model.kl, or use "
    "prompts that it does not solve yet",
    "entropy_high": "the policy's entropy is {now:.3g} nats ({first:.3g} at first, band: up to {limit:.3g}): its "
    "completions are becoming noise. Lower the learning rate, or model.entropy_coefficient where it is set",
    "length": "completions have {now:.3g} tokens ({first:.3g} at first, band: from {limit:.3g}): the policy ends "
    "early. Read completions.jsonl: does the reward pay for short answers?",
    "truncated": "{now:.1%} of the completions are cut by data.max_new_tokens ({first:.1%} at first, band: up to "
    "{limit:.1%}): an answer that comes too late is not rewarded. Raise data.max_new_tokens, or set "
    "data.selection.overlong",
    "reward": "the reward is {now:.3g} (best: {best:.3g}, band: from {limit:.3g}): the policy unlearns. Go back to an "
    "earlier checkpoint with a lower learning rate or a narrower trust region",
    "ratio": "the largest pi / mu of a step is {now:.3g} (median; {first:.3g} at first, band: up to {limit:.3g}): "
    "tokens that were unlikely when they were sampled carry the update. Set a cap on the ratio in model.trust_region, "
    "or lower data.steps_per_rollout",
}
"""What goes wrong -> what is said of it; values are over the last ``window`` optimizer steps."""


ERRORS = 8
"""Standard errors of a window's mean reward by which two windows of a long run may differ by chance."""


class Health(RunCallback):
    """Warn, once for each way of going wrong, when a metric leaves its band; docs/runs.md says what each warning means.

    A metric is judged by its mean over the last ``window`` steps that have it (``train/ratio_max`` by the median), and
    "at first" is the first such window. A warning is logged and appended to ``health.txt`` in the run directory.

    Args:
        window: Number of optimizer steps that are judged together, >= 1. Of a rollout's steps the first has fresh
            tokens and the last has old ones, so one step says little; 20 steps are some rollouts.
        mismatch: Largest mean |pi - mu|, > 0. In the measured runs of docs/runs.md those that learnt stayed below
            0.05, and those that collapsed were above 0.075 from their first quarter on; the same growth precedes the
            collapse in arXiv 2602.04879, section 5.
        masked: Largest share of tokens that the region stops, 0 to 1. Divergence regions and PPO's clip stop up to
            0.04 in the measured runs, GSPO 0.15 in its paper (arXiv 2507.18071); twice that is the band's end.
        entropy: Lowest and highest entropy, as multiples of that at first. The quickstart halves it while it learns.
        length: Shortest mean completion, as a multiple of that at first, 0 to 1. Growth is no fault: what reasons at
            length is often better.
        truncated: Largest share of completions that are cut, 0 to 1: at more than half the reward of most is unknown.
        reward: Largest fall of the mean reward from its best window, in standard deviations of a completion's reward at
            first, > 0; but at least eight standard errors of a window's mean, for the best of many windows of a few
            completions is far above what they mean, by chance alone.
        ratio: Largest median of ``train/ratio_max``, > 1. In the quickstart the median is 2, and the largest of all
            its steps 83.

    Raises:
        ConfigError: A band is out of range.
    """

    def __init__(
        self,
        window: int = 20,
        mismatch: float = 0.06,
        masked: float = 0.3,
        entropy: tuple[float, float] = (0.1, 3.0),
        length: float = 0.3,
        truncated: float = 0.5,
        reward: float = 0.5,
        ratio: float = 100.0,
    ) -> None:
        low, high = entropy
        for name, value, holds, must in (
            ("window", window, window >= 1, ">= 1"),
            ("mismatch", mismatch, mismatch > 0, "> 0"),
            ("masked", masked, 0 <= masked <= 1, "from 0 to 1"),
            ("entropy", entropy, 0 <= low < 1 < high, "a number below 1 and one above 1"),
            ("length", length, 0 <= length <= 1, "from 0 to 1"),
            ("truncated", truncated, 0 <= truncated <= 1, "from 0 to 1"),
            ("reward", reward, reward > 0, "> 0"),
            ("ratio", ratio, ratio > 1, "> 1"),
        ):
            if not holds:
                raise ConfigError(f"Health: {name} must be {must}, got {value}")
        self.window = window
        self.mismatch = mismatch
        self.masked = masked
        self.entropy = entropy
        self.length = length
        self.truncated = truncated
        self.reward = reward
        self.ratio = ratio
        self._recent: dict[str, deque[float]] = {what: deque(maxlen=window) for what in METRICS}
        self._first: dict[str, float] = {}
        self._best = -math.inf
        self._warned: list[str] = []

    def on_step_values(self, trainer: pl.Trainer, pl_module: pl.LightningModule, values: dict[str, float]) -> None:
        if not trainer.is_global_zero:
            return
        for what, text in self.judge(values):
            line = f"health, optimizer step {trainer.global_step - 1}, {what}: {text}"
            log.warning(line)
            path = Path(trainer.default_root_dir) / "health.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def judge(self, values: dict[str, float]) -> list[tuple[str, str]]:
        """Take in the metrics of an optimizer step; the warnings that are due now, each as its name and its text."""
        now: dict[str, float] = {}
        for what, metric in METRICS.items():
            value = values.get(metric, math.nan)
            if not math.isfinite(value):  # a step without a token, or one that was not taken, says nothing
                continue
            recent = self._recent[what]
            recent.append(value)
            if len(recent) == self.window:
                now[what] = median(recent) if what == "ratio" else fmean(recent)
                if what == "reward" and "error" not in self._first:
                    self._first["error"] = pstdev(recent) / math.sqrt(self.window)
                self._first.setdefault(what, now[what])
        self._best = max(self._best, now.get("reward", -math.inf))
        due = []
        for warning, (what, limit, above) in self._bands().items():
            if what not in now or warning in self._warned or not (now[what] > limit if above else now[what] < limit):
                continue
            self._warned.append(warning)
            numbers = {"now": now[what], "first": self._first[what], "best": self._best, "limit": limit}
            due.append((warning, WARNINGS[warning].format(**numbers)))
        return due

    def _bands(self) -> dict[str, tuple[str, float, bool]]:
        """Warning -> what is watched, its limit, and whether it must not be above (or below) that."""
        first = self._first
        low, high = self.entropy
        fall = max(self.reward * first.get("spread", math.inf), ERRORS * first.get("error", math.inf))
        return {
            "mismatch": ("mismatch", self.mismatch, True),
            "masked": ("masked", self.masked, True),
            "entropy_low": ("entropy", low * first.get("entropy", 0.0), False),
            "entropy_high": ("entropy", high * first.get("entropy", math.inf), True),
            "length": ("length", self.length * first.get("length", 0.0), False),
            "truncated": ("truncated", self.truncated, True),
            "reward": ("reward", self._best - fall if first.get("spread") else -math.inf, False),
            "ratio": ("ratio", self.ratio, True),
        }

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on must know of its beginning."""
        recent = {what: list(values) for what, values in self._recent.items()}
        return {"recent": recent, "first": dict(self._first), "best": self._best, "warned": list(self._warned)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._recent = {what: deque(values, maxlen=self.window) for what, values in state_dict["recent"].items()}
        self._first, self._best = dict(state_dict["first"]), state_dict["best"]
        self._warned = list(state_dict["warned"])
