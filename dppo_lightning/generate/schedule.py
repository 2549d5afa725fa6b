"""Settings of the stream (how old data may be, which completions are trained on), and rollouts: when, and of what."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.base.records import Group, Sequence


@dataclass(frozen=True)
class Streaming:
    """How far generation may run ahead of training.

    Args:
        max_staleness: Age in optimizer steps, >= 0, that a token may have when the first step of its rollout is taken:
            the step's number minus the weight version that sampled the token. 0: generation and training take turns.
            n: generation goes on while the policy trains, up to n steps ahead. The later steps of one rollout
            (``steps_per_rollout`` above 1) add their distance from the first, at most ``steps_per_rollout - 1``.
        late: What happens to a group that is not complete when its step is due. "wait": the step waits for it, groups
            are trained on in the order of their prompts, nothing is thrown away. "drop": a step takes the groups that
            are complete first; a group that has become too old is aborted, counted, and generated again.
        partial: What happens to completions in flight when the weights change. "keep": they go on, and each token
            carries the version that sampled it. "discard": they begin again with the same seeds.

    Raises:
        ConfigError: ``max_staleness`` is negative.
    """

    max_staleness: int = 0
    late: Literal["wait", "drop"] = "wait"
    partial: Literal["keep", "discard"] = "keep"

    def __post_init__(self) -> None:
        if self.max_staleness < 0:
            raise ConfigError(f"data.streaming.max_staleness must be >= 0, got {self.max_staleness}")

    def check(self, steps_per_rollout: int) -> None:
        """Refuse a bound within which generation could never run ahead.

        Raises:
            ConfigError: It is above 0 and below ``steps_per_rollout``.
        """
        if 0 < self.max_staleness < steps_per_rollout:
            raise ConfigError(
                f"data.streaming.max_staleness={self.max_staleness} with data.steps_per_rollout={steps_per_rollout} "
                f"never lets generation run ahead: set it to 0, or to {steps_per_rollout} or more"
            )


@dataclass(frozen=True)
class Selection:
    """Which completions are trained on.

    Args:
        resampling: Dynamic sampling (DAPO): a group whose rewards are all equal teaches nothing and is replaced by a
            new prompt's, at most ``resampling`` times the rollout's number of prompts, >= 0; then the rollout goes on
            smaller. 0: such groups stay in.
        oversampling: Share of prompts, >= 0, asked beyond those that the rollout needs; it takes the groups that are
            complete first and aborts the others. It prefers short completions, and the choice depends on timing.
        overlong: What becomes of completions cut by ``max_new_tokens``: "keep" them, "mask" them (they count in their
            group's baseline and are not trained on), or "penalise" their reward.
        overlong_penalty: Subtracted from the reward by "penalise", >= 0.

    Raises:
        ConfigError: A value is out of range.
    """

    resampling: float = 0.0
    oversampling: float = 0.0
    overlong: Literal["keep", "mask", "penalise"] = "keep"
    overlong_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name in ("resampling", "oversampling", "overlong_penalty"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ConfigError(f"data.selection.{name} must be >= 0 and finite, got {value}")

    def trained(self, group: Group) -> list[Sequence]:
        """The sequences of a group that are trained on, in order."""
        return [sequence for sequence in group.sequences() if not (self.overlong == "mask" and sequence.truncated)]

    def check(self, samples_per_prompt: int) -> None:
        """Refuse resampling where no group can have a signal.

        Raises:
            ConfigError: One completion a prompt, whose rewards are always all equal.
        """
        if self.resampling > 0 and samples_per_prompt < 2:
            raise ConfigError(
                "data.selection.resampling needs data.samples_per_prompt >= 2: one reward is always equal"
            )


def check_repeatable(streaming: Streaming, selection: Selection) -> None:
    """Refuse what depends on how fast the engine and the machine are, and so differs from run to run.

    Raises:
        ConfigError: Generation runs ahead of training, or which groups are trained on depends on when they arrive.
    """
    if selection.oversampling > 0:
        raise ConfigError(
            "--deterministic: data.selection.oversampling takes the groups that are complete first, which differ from "
            f"run to run: set it to 0, got {selection.oversampling}"
        )
    if streaming.late == "drop":
        raise ConfigError(
            '--deterministic: data.streaming.late "drop" leaves out what arrives late, which differs from run to run: '
            'set it to "wait"'
        )
    if streaming.max_staleness > 0:
        raise ConfigError(
            "--deterministic: with data.streaming.max_staleness above 0 the weights that sample a token depend on when "
            f"it is sampled: set it to 0, got {streaming.max_staleness}"
        )


@dataclass(frozen=True)
class Window:
    """One rollout: its first optimizer step, how many steps are taken on it, and the prompts that it needs."""

    start: int
    steps: int
    prompts: int


@dataclass(frozen=True)
class Schedule:
    """Which rollout belongs to which optimizer steps.

    Args:
        prompts_per_step: Prompts of one optimizer step.
        steps_per_rollout: Steps taken on one rollout.
        max_steps: Of the run; the last rollout may be shorter.
    """

    prompts_per_step: int
    steps_per_rollout: int
    max_steps: int

    def upcoming(self, step: int) -> Iterator[Window]:
        """The rollouts from the one that begins at ``step`` to the run's last."""
        while step < self.max_steps:
            steps = min(self.steps_per_rollout - step % self.steps_per_rollout, self.max_steps - step)
            yield Window(step, steps, steps * self.prompts_per_step)
            step += steps


@dataclass
class Rollout:
    """One rollout's groups, in the order of their prompts, and what making them cost.

    Attributes:
        groups: Rewarded, with advantages.
        window: The optimizer steps that it is for.
        failed: Requests that the engine could not serve.
        seconds: "generate" (first request to last completion), "reward" and "wait" (that the trainer stood still).
        counts: Of the stream, see metrics.GLOSSARY.
    """

    groups: list[Group]
    window: Window
    failed: int
    seconds: dict[str, float]
    counts: dict[str, float] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Generated tokens."""
        return sum(len(completion) for group in self.groups for completion in group.completions)

    @property
    def metrics(self) -> dict[str, float]:
        """What making the rollout cost, see metrics.GLOSSARY."""
        return {
            "train/failed": float(self.failed),
            "time/wait": self.seconds["wait"],
            "time/generate": self.seconds["generate"],
            "time/reward": self.seconds["reward"],
            **self.counts,
            "perf/generated_tokens_per_s": self.tokens / max(self.seconds["generate"], 1e-9),
        }
