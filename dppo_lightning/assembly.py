"""From a rollout to optimizer steps: which groups a step trains on, and what of them each rank is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from dppo_lightning.batch import TrainingBatch, pack
from dppo_lightning.metrics import group_metrics
from dppo_lightning.packing import Layout, split_by_tokens
from dppo_lightning.records import Group, Sequence

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
    batches = [pack([sequences[i] for i in part], shares[part], layout) for part in parts]
    empty = not counts.sum()
    plans = [
        StepPlan([], batches[rank * micro_batches : (rank + 1) * micro_batches], ends_rollout, empty=empty)
        for rank in range(ranks)
    ]
    plans[0].groups, plans[0].metrics = groups, group_metrics(groups) | {"train/empty": float(empty)}
    return plans
