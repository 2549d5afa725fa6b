"""Scorer: passes over sequences without gradient, shared out over the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from dppo_lightning.base.batch import TrainingBatch, pack
from dppo_lightning.base.packing import split_by_tokens
from dppo_lightning.base.records import Group, Sequence
from dppo_lightning.scaling.ranks import Controller, Task
from dppo_lightning.scaling.sharding import scoring
from dppo_lightning.train.objective import ReferenceKL, kl_estimate
from dppo_lightning.train.policy import Policy, Unadapted
from dppo_lightning.trust_region.base import TokenStats, TokenStatsError, TrustRegion, concatenated

T = TypeVar("T")

Parts = list[list[Sequence]]
"""A rank's share: its micro-batches."""

Remembered = tuple[Tensor | None, np.ndarray | None]
"""Hidden states [T, H] and log-probs [T] of a sequence, each where it was asked for."""


class Scorer:
    """Maker of log-probs and hidden states of policy and reference, in the precision of training.

    Every rank makes one at the same point of the run. Methods but ``with_choice`` are called on rank 0, within a
    section of its controller; every rank then does a share of as many micro-batches, of the size of training's, since
    a model in shards needs all ranks in each.

    Args:
        policy: The policy that is trained.
        reference: The reference model, or None.
        strategy: Lightning's strategy, which knows precision, device and shards.
        controller: Controller that has every rank work.
        micro_batches: Most micro-batches that a rank's share of a rollout is cut into, >= 1.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Policy | Unadapted | None,
        strategy: Strategy,
        controller: Controller,
        micro_batches: int,
    ) -> None:
        self.policy = policy
        self.reference = reference
        self.strategy = strategy
        self.controller = controller
        self.micro_batches = micro_batches
        self._policy_task = controller.task(self.policy_share)
        self._reference_task = controller.task(self.reference_share)
        self._remember_tasks = {
            needs: controller.task(partial(self.remember_share, needs=needs))
            for needs in (
                frozenset({"full"}),
                frozenset({"recomputed_logp"}),
                frozenset({"full", "recomputed_logp"}),
            )
        }

    def policy_logp(self, sequences: list[Sequence]) -> list[np.ndarray]:
        """Log-probs [T] of each sequence's generated tokens under the policy as it is now."""
        return self._shared_out(self._policy_task, sequences)

    def reference_logp(self, sequences: list[Sequence]) -> list[np.ndarray]:
        """Log-probs [T] of each sequence's generated tokens under the reference model."""
        return self._shared_out(self._reference_task, sequences)

    def annotate(self, sequences: list[Sequence], needs: frozenset[str]) -> None:
        """Fill in, before a rollout's first step, what is needed of the policy as it is now, and of the reference.

        For "recomputed_logp" and "full" together one pass; what is not needed is not computed. At ``max_staleness`` 0
        that policy is the one that sampled; above 0 it is not, and "full" is refused.

        Args:
            sequences: Sequences of a rollout.
            needs: What the region and the diagnostics read.
        """
        remembered = needs & {"recomputed_logp", "full"}
        if remembered:
            self.remember(sequences, remembered)
        if self.reference is not None and sequences and sequences[0].reference_logp is None:
            for sequence, logp in zip(sequences, self.reference_logp(sequences), strict=True):
                sequence.reference_logp = logp

    def remember(self, sequences: list[Sequence], needs: frozenset[str]) -> None:
        """Keep in the sequences the policy as the first step on the rollout finds it; one pass for both.

        Args:
            sequences: Sequences of a rollout.
            needs: What to keep, of {"recomputed_logp", "full"}, not empty: log-probs [T]; hidden states [T, H], and
                the projection [V, H] in the head of every rank.
        """
        found = self._shared_out(self._remember_tasks[needs], sequences)
        for sequence, (hidden, logp) in zip(sequences, found, strict=True):
            sequence.rollout_hidden = hidden
            sequence.recomputed_logp = logp

    def penalty(self, groups: list[Group], kl: ReferenceKL) -> list[np.ndarray]:
        """Compute for each group [G] beta * the sum over a completion's tokens of the estimated KL to the reference."""
        rows = [group.sequences() for group in groups]
        scored = iter(self.reference_logp([sequence for mine in rows for sequence in mine]))
        costs = []
        for group, mine in zip(groups, rows, strict=True):
            group.reference_logp = [next(scored) for _ in mine]  # for the metrics of training, too
            totals = iter(
                float(kl_estimate(torch.from_numpy(row.rollout_logp), torch.from_numpy(logp), kl.kind).sum())
                for row, logp in zip(mine, group.reference_logp, strict=True)
            )
            costs.append(np.array([next(totals) if len(completion) else 0.0 for completion in group.completions]))
        return [kl.coefficient * cost for cost in costs]

    def with_choice(self, region: TrustRegion, batches: list[TrainingBatch]) -> list[TrainingBatch]:
        """Give a rank's micro-batches of a step what the region chooses among all tokens of the step; on every rank."""
        with self._without_gradient():
            mine = [statistics(batch, self.policy.logp(batch.to(self.strategy.root_device))) for batch in batches]
        ranks = self.controller.ranks
        step = ranks.all_gather(mine)
        chosen = iter(choose_over_step(region, [tokens for theirs in step for tokens in theirs]))
        mine_chosen = [[next(chosen) for _ in theirs] for theirs in step][ranks.rank]
        return [replace(batch, chosen=one) for batch, one in zip(batches, mine_chosen, strict=True)]

    def _shared_out(self, task: Task[Parts, list[T]], sequences: list[Sequence]) -> list[T]:
        """Have every rank run ``task`` on its part of the sequences; a result for each of them, in order."""
        ranks = self.controller.ranks.world_size
        each = min(self.micro_batches, max(1, -(-len(sequences) // ranks)))
        split = split_by_tokens(sequences, each * ranks, self.policy.layout)
        shares = [split[rank * each : (rank + 1) * each] for rank in range(ranks)]
        parts = [[[sequences[i] for i in part] for part in share] for share in shares]
        found: dict[int, T] = {}
        for share, results in zip(shares, self.controller.on_every_rank(task, parts), strict=True):
            found |= zip((i for part in share for i in part), results, strict=True)
        return [found[i] for i in range(len(sequences))]

    def policy_share(self, parts: Parts) -> list[np.ndarray]:
        """Compute a rank's share: log-probs under the policy of each sequence of its parts."""
        return self._logp(self.policy, parts)

    def reference_share(self, parts: Parts) -> list[np.ndarray]:
        """Compute a rank's share: log-probs under the reference of each sequence of its parts."""
        assert self.reference is not None
        return self._logp(self.reference, parts)

    def _logp(self, model: Policy | Unadapted, parts: Parts) -> list[np.ndarray]:
        model.to(self.strategy.root_device)
        found: list[np.ndarray] = []
        with self._without_gradient():
            for part, batch in self._packed(parts):
                pieces = model.logp(batch).cpu().split([sequence.tokens for sequence in part])
                found += [piece.numpy() for piece in pieces]
        return found

    def remember_share(self, parts: Parts, needs: frozenset[str]) -> list[Remembered]:
        """Compute a rank's share: hidden states and log-probs under the present weights, each where it is needed."""
        head = self.policy.head
        found: list[Remembered] = []
        with self._without_gradient():
            if "full" in needs:
                head.remember_rollout()
            for part, batch in self._packed(parts):
                hidden = self.policy.hidden_states(batch)
                counts = [sequence.tokens for sequence in part]
                states: list[Tensor | None] = [None] * len(part)
                logps: list[np.ndarray | None] = [None] * len(part)
                if "full" in needs:
                    # in the products' dtype, to which the head would round them anyway
                    whole = hidden.to(head.product_dtype).cpu()
                    # copies: a view is sent to rank 0 with all that it is a view of
                    states = [piece.clone() for piece in whole.split(counts)]
                if "recomputed_logp" in needs:
                    logps = [piece.numpy() for piece in head(hidden, batch).cpu().split(counts)]
                found += zip(states, logps, strict=True)
        return found

    def _packed(self, parts: Parts) -> Iterator[tuple[list[Sequence], TrainingBatch]]:
        for part in parts:
            batch = pack(part, np.zeros(len(part)), self.policy.layout)
            yield part, batch.to(self.strategy.root_device)

    @contextmanager
    def _without_gradient(self) -> Iterator[None]:
        """Context of a pass without gradient: the strategy's and the precision's."""
        with scoring(self.strategy), torch.no_grad(), self.strategy.precision_plugin.forward_context():
            yield


def statistics(batch: TrainingBatch, logp: Float[Tensor, " N"]) -> TokenStats:
    """Collect, on the CPU, ``logp`` and what is known of a micro-batch's tokens before the pass with a gradient."""
    tokens = TokenStats(
        logp=logp,
        rollout_logp=batch.rollout_logp,
        advantage=batch.advantage,
        recomputed_logp=batch.recomputed_logp,
        age=batch.age,
        sequence=batch.sequence,
        position=batch.position,
    )
    moved = {name: value.cpu() for name, value in vars(tokens).items() if value is not None}
    return replace(tokens, **moved)


def choose_over_step(region: TrustRegion, step: list[TokenStats]) -> list[Bool[Tensor, "N ..."]]:
    """Ask the region for its choice, for each of the step's micro-batches.

    Args:
        region: Region that needs "chosen".
        step: Statistics of every micro-batch of the step, on all ranks, in any order; some may be without tokens.

    Raises:
        TokenStatsError: The region's ``choose`` does not return a bool for each token.
    """
    sequences, numbered = 0, []
    for tokens in step:
        if len(tokens.logp):  # an empty micro-batch lacks the optional statistics too
            assert tokens.sequence is not None
            numbered.append(replace(tokens, sequence=tokens.sequence + sequences))
            sequences += int(tokens.sequence.max()) + 1
    counts = [len(tokens.logp) for tokens in step]
    if not numbered:
        return [torch.zeros(0, dtype=torch.bool) for _ in step]
    chosen = region.choose(concatenated(numbered))
    if chosen.dtype != torch.bool or len(chosen) != sum(counts):
        raise TokenStatsError(
            f"{type(region).__name__}.choose must return a bool for each of {sum(counts)} tokens, "
            f"got {tuple(chosen.shape)} of {chosen.dtype}"
        )
    return list(chosen.split(counts))
