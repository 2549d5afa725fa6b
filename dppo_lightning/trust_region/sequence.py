"""Regions in which a token's fate depends on the rest of its sequence. They need whole sequences at once."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.trust_region.base import (
    Anchor,
    Scope,
    Surrogate,
    TokenStats,
    TokenStatsError,
    TrustRegion,
    anchor_logp,
    check_choice,
    check_clip,
    check_positive,
    moves_outward,
    weighted_surrogate,
)
from dppo_lightning.trust_region.divergence import binary_kl


class GSPO(TrustRegion):
    """Group sequence policy optimisation (arXiv 2507.18071): PPO's clip on s = exp(mean_t(log pi - log anchor)).

    Every token of a sequence has the loss max(-A s, -A clip(s)), differentiable in s, so the gradient is spread evenly
    over the tokens; the mean over the sequence's tokens is the paper's sequence loss.

    Args:
        epsilon_low: Width of the clip below 1, in (0, 1); s is a geometric mean, so the bounds are three orders of
            magnitude below PPO's.
        epsilon_high: Width of the clip above 1, > 0.
        anchor: Denominator of the ratio.

    Raises:
        ConfigError: A value is out of range.
    """

    scope: Scope = "sequence"
    composable: ClassVar[bool] = False

    def __init__(self, epsilon_low: float = 3e-4, epsilon_high: float = 4e-4, anchor: Anchor = "rollout") -> None:
        super().__init__(anchor)
        check_clip(self, epsilon_low, epsilon_high)
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high

    def forward(self, tokens: TokenStats) -> Surrogate:
        ratio = SequenceSums(tokens).mean(tokens.logp - anchor_logp(tokens, self.anchor)).exp()
        clipped = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        loss = torch.maximum(-tokens.advantage * ratio, -tokens.advantage * clipped)
        stopped_up = (tokens.advantage > 0) & (ratio > 1 + self.epsilon_high)
        stopped_down = (tokens.advantage < 0) & (ratio < 1 - self.epsilon_low)
        return Surrogate(loss, ~(stopped_up | stopped_down))


class SequenceMask(TrustRegion):
    """Trust region masking (TRM, arXiv 2512.23075): a sequence whose KL is too large is dropped whole.

    The KL of a token is the binary KL(mu || pi), a lower bound of the one over the vocabulary (arXiv 2602.04879,
    App. B): what is dropped here is dropped by the exact criterion too.

    Args:
        delta: Threshold on the KL, > 0; 0.1 with "max", 0.002 with "mean".
        reduce: Reduction over the sequence's tokens: "max" drops when any token's KL exceeds delta, "mean" when the
            sequence's mean does.

    Raises:
        ConfigError: A value is out of range.
    """

    scope: Scope = "sequence"

    def __init__(self, delta: float = 0.1, reduce: Literal["max", "mean"] = "max") -> None:
        super().__init__()
        check_positive(self, delta=delta)
        check_choice(self, "reduce", reduce, ("max", "mean"))
        self.delta = delta
        self.reduce = reduce

    def forward(self, tokens: TokenStats) -> Surrogate:
        kl = binary_kl(tokens.rollout_logp, tokens.logp.detach())
        sums = SequenceSums(tokens)
        divergence = sums.max(kl) if self.reduce == "max" else sums.mean(kl)
        return weighted_surrogate(tokens, divergence <= self.delta, divergence)


class VACO(TrustRegion):
    """VACO's filter (arXiv 2603.01365): in a sequence with mean |r - 1| / 2 > delta, outward tokens are dropped.

    The mean estimates the sequence's total variation; outward is A sign(log pi - log mu) > 0. The paper's realigned
    advantages belong to its value function and are not part of the region.

    Args:
        delta: Threshold on the mean |r - 1| / 2 of a sequence, > 0.

    Raises:
        ConfigError: ``delta`` is out of range.
    """

    scope: Scope = "sequence"

    def __init__(self, delta: float) -> None:
        super().__init__()
        check_positive(self, delta=delta)
        self.delta = delta

    def forward(self, tokens: TokenStats) -> Surrogate:
        deviation = torch.expm1(tokens.logp.detach() - tokens.rollout_logp).abs() / 2
        divergence = SequenceSums(tokens).mean(deviation)
        return weighted_surrogate(tokens, ~((divergence > self.delta) & moves_outward(tokens)), divergence)


class CPPO(TrustRegion):
    """Cumulative prefix-divergence policy optimisation (arXiv 2606.10968): strict early, and on a budget.

    With D = |mu - pi|, w_t = 1 - (1 - w_min) (t - 1) / max(T - 1, 1) for t = 1..T, and Z = w D: a token that moves
    outward is kept iff Z_t <= min(delta, delta + budget W_{t-1} - S_{t-1}), where W and S are the sums of w and Z over
    the tokens before it, stopped or not.

    Args:
        delta: Threshold on one token's Z, > 0.
        w_min: Weight of the last token, in (0, 1].
        budget: Mean Z allowed to the prefix, > 0.

    Raises:
        ConfigError: A value is out of range.
    """

    scope: Scope = "sequence"

    def __init__(self, delta: float = 0.15, w_min: float = 0.8, budget: float = 0.02) -> None:
        super().__init__()
        check_positive(self, delta=delta, budget=budget)
        if not 0 < w_min <= 1:
            raise ConfigError(f"CPPO: w_min must be in (0, 1], got {w_min}")
        self.delta = delta
        self.w_min = w_min
        self.budget = budget

    def forward(self, tokens: TokenStats) -> Surrogate:
        sums = SequenceSums(tokens)
        steps = (sums.spread(sums.length) - 1).clamp(min=1)
        weight = 1 - (1 - self.w_min) * sums.column.to(tokens.rollout_logp.dtype) / steps
        weighted = weight * (tokens.rollout_logp.exp() - tokens.logp.detach().exp()).abs()
        spent = sums.prefix_sum(weighted)
        allowed = (self.delta + self.budget * sums.prefix_sum(weight) - spent).clamp(max=self.delta)
        return weighted_surrogate(tokens, ~(moves_outward(tokens) & (weighted > allowed)), weighted)


class SequenceSums:
    """Sums, means and maxima over the sequences of packed tokens, which may come in any order.

    Reductions go through a padded [S, T] table: each sequence is summed on its own, in the order of its positions and
    without atomics, so the result does not depend on the order of the tokens and repeats bit for bit on a GPU.

    Args:
        tokens: Statistics with ``sequence`` and ``position``: N tokens of S sequences, the longest of T tokens.

    Raises:
        TokenStatsError: ``sequence`` or ``position`` is missing.
    """

    def __init__(self, tokens: TokenStats) -> None:
        if tokens.sequence is None or tokens.position is None:
            raise TokenStatsError("a region over sequences needs sequence and position")
        self.row: Int[Tensor, " N"]
        self.length: Int[Tensor, " S"]
        _, self.row, self.length = torch.unique(tokens.sequence, return_inverse=True, return_counts=True)
        by_position = torch.argsort(tokens.position, stable=True)
        order = by_position[torch.argsort(self.row[by_position], stable=True)]
        starts = self.length.cumsum(0) - self.length
        self.column: Int[Tensor, " N"] = torch.empty_like(order)
        self.column[order] = torch.arange(len(order), device=order.device) - starts[self.row[order]]

    def table(self, values: Float[Tensor, " N"]) -> Float[Tensor, "S T"]:
        """Table of the values by sequence and place, 0 after a sequence's end."""
        width = int(self.length.max()) if len(self.length) else 0
        padded = values.new_zeros(len(self.length), width)
        return padded.index_put((self.row, self.column), values)

    def spread(self, per_sequence: Float[Tensor, " S"]) -> Float[Tensor, " N"]:
        """Give every token the value of its sequence."""
        return per_sequence[self.row]

    def mean(self, values: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Mean over each token's sequence."""
        return self.spread(self.table(values).sum(dim=1) / self.length)

    def max(self, values: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Greatest value in each token's sequence, at least 0."""
        table = self.table(values)
        return self.spread(table.amax(dim=1)) if table.numel() else values

    def prefix_sum(self, values: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Sum over the tokens before each one in its sequence."""
        table = self.table(values)
        return (table.cumsum(dim=1) - table)[self.row, self.column]
