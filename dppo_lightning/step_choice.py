"""What a region chooses among all tokens of an optimizer step, whatever ranks and micro-batches they lie in."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dppo_lightning.batch import TrainingBatch
from dppo_lightning.trust_region.base import TokenStats, TokenStatsError, TrustRegion, concatenated


def statistics(batch: TrainingBatch, logp: Float[Tensor, " N"]) -> TokenStats:
    """What of a micro-batch's tokens is known before their forward pass with a gradient, and ``logp``, on the CPU."""
    tokens = TokenStats(
        logp=logp,
        rollout_logp=batch.rollout_logp,
        advantage=batch.advantage,
        recomputed_logp=batch.recomputed_logp,
        sequence=batch.sequence,
        position=batch.position,
    )
    moved = {name: value.cpu() for name, value in vars(tokens).items() if value is not None}
    return replace(tokens, **moved)


def choose_over_step(region: TrustRegion, step: list[TokenStats]) -> list[Bool[Tensor, "N ..."]]:
    """The region's choice, for each of the step's micro-batches.

    Args:
        region: Needs "chosen".
        step: Of every micro-batch of the step, on all ranks, in any order; some may be without tokens.

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
