"""From a rollout to optimizer steps: which groups a step trains on, and what of them each rank is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import lightning.pytorch as pl
import numpy as np

from dppo_lightning.base.batch import TrainingBatch, pack
from dppo_lightning.base.errors import ConfigError
from dppo_lightning.base.packing import Layout, split_by_tokens
from dppo_lightning.base.records import Group, Prompt, Sequence
from dppo_lightning.base.saved import as_plain, from_plain, load_group, save_group
from dppo_lightning.generate.schedule import Window
from dppo_lightning.train.metrics import group_metrics

TokenWeights = Callable[[np.ndarray], np.ndarray]
"""The aggregation: from the tokens of each of a step's B sequences, [B] int64, to the share of one of its tokens in the
step's loss, [B] float64."""


class Learner(Protocol):
    """What the data module asks of the module that trains; ``DPPOModule`` is one."""

    policy_name: str

    @property
    def topk(self) -> int:
        """How many top log-probs of each token the engine is asked for."""

    @property
    def layout(self) -> Layout:
        """How micro-batches are laid out for the policy; known once it is loaded."""

    @property
    def steps_taken(self) -> int:
        """Optimizer steps that made the present weights."""

    @property
    def settings(self) -> dict[str, Any]:
        """Plain values that every rank must have alike."""

    @property
    def penalty(self) -> Callable[[list[Group]], list[np.ndarray]] | None:
        """For each group what is subtracted from its [G] rewards before the advantage, or None."""

    def check_staleness(self, ahead: int) -> None:
        """Refuse to train on tokens that are ``ahead`` optimizer steps old, where that would be wrong."""

    def configure_model(self) -> None:
        """Load the policy, unless it is loaded; every rank calls it."""

    def weights(self, counts: np.ndarray) -> np.ndarray:
        """See ``TokenWeights``."""

    def annotate(self, sequences: list[Sequence]) -> None:
        """On rank 0, before a rollout's first step: fill in what the region needs of policy and reference."""

    def choose(self, batches: list[TrainingBatch]) -> list[TrainingBatch]:
        """On every rank, before a step: its micro-batches with what the region chose among the step's tokens."""


@dataclass
class StepPlan:
    """One optimizer step: its micro-batches, and what is known of it before it is taken.

    Attributes:
        groups: The step's share of the rollout.
        batches: Exactly ``accumulate_grad_batches`` micro-batches.
        ends_rollout: Whether the engine gets new weights after this step.
        metrics: Logged with the step.
        empty: Whether no rank has a token to train on.
    """

    groups: list[Group]
    batches: list[TrainingBatch]
    ends_rollout: bool
    metrics: dict[str, float] = field(default_factory=dict)
    empty: bool = False


def plan_steps(
    groups: list[Group],
    sequences: list[list[Sequence]],
    first: int,
    steps: int,
    weights: TokenWeights,
    layout: Layout,
    ranks: int,
    micro_batches: int,
) -> list[list[StepPlan]]:
    """Lay out a rollout's optimizer steps.

    Args:
        groups: Groups of the rollout, in order; they are spread evenly over the steps, and each is told its step.
        sequences: What of each group is trained on.
        first: Number of the rollout's first optimizer step.
        steps: Number of its optimizer steps.
        weights: The aggregation.
        layout: Of micro-batches.
        ranks: Number of ranks.
        micro_batches: Of one step on one rank.

    Returns:
        For each step a plan for each rank; groups and metrics are rank 0's alone.
    """
    parts = np.array_split(np.arange(len(groups)), steps)
    for index, part in enumerate(parts):
        for i in part:
            groups[i].step = first + index
    return [
        plan_step(
            [groups[i] for i in part],
            [sequence for i in part for sequence in sequences[i]],
            first + index,
            index == steps - 1,
            weights,
            layout,
            ranks,
            micro_batches,
        )
        for index, part in enumerate(parts)
    ]


def plan_step(
    groups: list[Group],
    sequences: list[Sequence],
    step: int,
    ends_rollout: bool,
    weights: TokenWeights,
    layout: Layout,
    ranks: int,
    micro_batches: int,
) -> list[StepPlan]:
    """One optimizer step, for each rank: the sequences balanced over ranks and micro-batches by their tokens.

    Groups and metrics are rank 0's alone; other arguments are as of ``plan_steps``.
    """
    counts = np.array([sequence.tokens for sequence in sequences])
    shares = weights(counts)
    parts = split_by_tokens(sequences, ranks * micro_batches, layout)
    batches = [pack([sequences[i] for i in part], shares[part], layout, step) for part in parts]
    empty = not counts.sum()
    plans = [
        StepPlan([], batches[rank * micro_batches : (rank + 1) * micro_batches], ends_rollout, empty=empty)
        for rank in range(ranks)
    ]
    plans[0].groups, plans[0].metrics = groups, group_metrics(groups) | {"train/empty": float(empty)}
    return plans


@dataclass
class OpenRollout:
    """A rollout with steps that are not taken yet; a checkpoint within it has it, for its weights are gone.

    Attributes:
        window: Optimizer steps that it is for.
        groups: Groups, in order.
        sequences: What of each group is trained on, annotated.
    """

    window: Window
    groups: list[Group]
    sequences: list[list[Sequence]]

    def has_left(self, step: int) -> bool:
        """Whether ``step`` is one of its steps, and not the first."""
        return self.window.start < step < self.window.start + self.window.steps

    def state_dict(self) -> dict[str, Any]:
        """Return the groups, and of each sequence what it has beside them."""
        return {
            "start": self.window.start,
            "steps": self.window.steps,
            "prompts": self.window.prompts,
            "groups": [save_group(group) for group in self.groups],
            "noted": [[_noted(row) for row in rows] for rows in self.sequences],
        }

    @classmethod
    def from_state(
        cls,
        state: dict[str, Any],
        prompts: Mapping[str, Prompt],
        trained: Callable[[Group], list[Sequence]],
    ) -> OpenRollout:
        """Make the rollout whose ``state_dict`` this is.

        Args:
            state: The state.
            prompts: Training prompts by their ids.
            trained: Gives the sequences of a group that are trained on.
        """
        groups = [load_group(saved, prompts) for saved in state["groups"]]
        sequences = [trained(group) for group in groups]
        for rows, noted in zip(sequences, state["noted"], strict=True):
            for row, values in zip(rows, noted, strict=True):
                row.reference_logp = from_plain(values["reference_logp"])
                row.recomputed_logp = from_plain(values["recomputed_logp"])
                row.rollout_hidden = values["rollout_hidden"]
        return cls(Window(state["start"], state["steps"], state["prompts"]), groups, sequences)


def _noted(sequence: Sequence) -> dict[str, Any]:
    """What ``Learner.annotate`` has written on a sequence."""
    names = ("reference_logp", "recomputed_logp", "rollout_hidden")
    return {name: as_plain(getattr(sequence, name)) for name in names}


def empty_step(first: int, plans: list[StepPlan]) -> str | None:
    """What to say of the first of these steps that has no token to train on; None where each has some.

    Args:
        first: Number of the first optimizer step.
        plans: Rank 0's plan of each step.
    """
    for step, plan in enumerate(plans, first):
        if plan.empty:
            why = "all completions of its groups are left out" if plan.groups else "no group is left for it"
            return (
                f"optimizer step {step} has no token to train on ({why}) and leaves the weights as they are; "
                "train/empty is 1 for every such step"
            )
    return None


def check_micro_batches(completions: int, ranks: int, micro_batches: int) -> None:
    """Refuse micro-batches that are empty in every step: each costs a pass of every rank.

    Args:
        completions: Number of completions of an optimizer step.
        ranks: Number of ranks.
        micro_batches: Number of micro-batches of one step on one rank.

    Raises:
        ConfigError: There are fewer completions than micro-batches.
    """
    if completions < ranks:
        raise ConfigError(
            f"{ranks} ranks share {completions} completions a step: raise data.prompts_per_step "
            "or data.samples_per_prompt, or use fewer ranks"
        )
    if completions < ranks * micro_batches:
        raise ConfigError(
            f"{ranks} rank(s) with trainer.accumulate_grad_batches={micro_batches} make {ranks * micro_batches} "
            f"micro-batches of {completions} completions a step, so some are always empty: set it to "
            f"{completions // ranks} or less"
        )


class RolloutLoader:
    """Yields the micro-batches of every remaining optimizer step.

    It has a length, so that Lightning does not fetch a batch ahead: the rollout after the last step of one must be
    generated with the weights of that step.

    Args:
        trainer: Lightning's trainer of the run.
        micro_batches: Gives the micro-batches of the rollout that begins at an optimizer step, for this rank.
    """

    def __init__(self, trainer: pl.Trainer, micro_batches: Callable[[int], Iterator[TrainingBatch]]) -> None:
        self.trainer = trainer
        self.micro_batches = micro_batches

    def __len__(self) -> int:
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    def __iter__(self) -> Iterator[TrainingBatch]:
        while self.trainer.global_step < self.trainer.max_steps:
            yield from self.micro_batches(self.trainer.global_step)
