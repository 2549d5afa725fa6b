"""Regions that mask by a divergence between the rollout policy and the current one (DPPO, arXiv 2602.04879)."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from dppo_lightning.trust_region.base import (
    Anchor,
    Surrogate,
    TokenStats,
    TrustRegion,
    anchor_logp,
    check_positive,
    importance_ratio,
    policy_gradient,
)


class DivergenceMask(TrustRegion):
    """DPPO: a token is stopped when it has left the region and the update would take it further out (eq. 12).

    M = 0 iff A (r - 1) > 0 and D > delta. Subclasses write only ``divergence``, in terms of ``tokens.logp`` and
    ``tokens.rollout_logp``; under the recomputed anchor the latter is given log pi_old in place of log mu.

    Args:
        delta: Threshold on the divergence, > 0.
        delta_low: Threshold for tokens with A < 0; ``delta`` when None.
        delta_high: Threshold for tokens with A > 0; ``delta`` when None.
        max_ratio: Cap C on the importance weight, > 0; None for no cap. Small caps bias against rare tokens.
        anchor: What the mask measures from. The weight in the loss is pi / mu either way.

    Raises:
        ConfigError: A threshold is not > 0.
    """

    def __init__(
        self,
        delta: float,
        delta_low: float | None = None,
        delta_high: float | None = None,
        max_ratio: float | None = None,
        anchor: Anchor = "rollout",
    ) -> None:
        super().__init__(anchor)
        check_positive(self, delta=delta, delta_low=delta_low, delta_high=delta_high, max_ratio=max_ratio)
        self.delta = delta
        self.delta_low = delta if delta_low is None else delta_low
        self.delta_high = delta if delta_high is None else delta_high
        self.max_ratio = max_ratio

    def divergence(self, tokens: TokenStats) -> Float[Tensor, " N"]:
        raise NotImplementedError

    def forward(self, tokens: TokenStats) -> Surrogate:
        with torch.no_grad():
            anchored = replace(tokens, rollout_logp=anchor_logp(tokens, self.anchor))
            divergence = self.divergence(anchored)
            moves_out = tokens.advantage * (tokens.logp - anchored.rollout_logp) > 0
            threshold = torch.where(tokens.advantage > 0, self.delta_high, self.delta_low)
            keep = ~(moves_out & (divergence > threshold))
        return Surrogate(policy_gradient(tokens, importance_ratio(tokens, self.max_ratio), keep), keep, divergence)


class BinaryTV(DivergenceMask):
    """Total variation of "this token or any other": |mu - pi| (eq. 13, without the factor 1/2). The paper's default."""

    def __init__(
        self,
        delta: float = 0.15,
        delta_low: float | None = None,
        delta_high: float | None = None,
        max_ratio: float | None = None,
        anchor: Anchor = "rollout",
    ) -> None:
        super().__init__(delta, delta_low, delta_high, max_ratio, anchor)

    def divergence(self, tokens: TokenStats) -> Float[Tensor, " N"]:
        return (tokens.rollout_logp.exp() - tokens.logp.exp()).abs()


class BinaryKL(DivergenceMask):
    """KL(mu || pi) of "this token or any other": mu log(mu/pi) + (1-mu) log((1-mu)/(1-pi)) (eq. 14)."""

    def __init__(
        self,
        delta: float = 0.05,
        delta_low: float | None = None,
        delta_high: float | None = None,
        max_ratio: float | None = None,
        anchor: Anchor = "rollout",
    ) -> None:
        super().__init__(delta, delta_low, delta_high, max_ratio, anchor)

    def divergence(self, tokens: TokenStats) -> Float[Tensor, " N"]:
        mu = tokens.rollout_logp.exp()
        taken = mu * (tokens.rollout_logp - tokens.logp)
        others = (1 - mu) * (log_complement(tokens.rollout_logp) - log_complement(tokens.logp))
        return (taken + others).clamp(min=0)


def log_complement(logp: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """log(1 - exp(logp)), finite for logp = 0: p is held one float32 step below 1."""
    return torch.log(-torch.expm1(logp.clamp(max=-(2.0**-24))))
