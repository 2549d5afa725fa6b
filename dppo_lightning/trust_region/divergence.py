"""Regions that mask by a divergence between the rollout policy and the current one (DPPO, arXiv 2602.04879).

The theory that they rest on, with xi = max |R|, horizon T and gamma = 1:

    J(pi) - J(mu) >= L'_mu(pi) - 2 xi T (T-1) (max_s TV)^2        (7)
    J(pi) - J(mu) >= L'_mu(pi) - 4 xi sum_t E TV                  (8)

and E_mu |r - 1| / 2 = TV (11): PPO's |r - 1| <= epsilon bounds a one-sample estimate of 2 TV.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.trust_region.base import (
    Anchor,
    Surrogate,
    TokenStats,
    TrustRegion,
    anchor_logp,
    check_positive,
    moves_outward,
    weighted_surrogate,
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
        anchor: Distribution that the mask measures from. The weight in the loss is pi / mu either way.

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

    def outward(self, tokens: TokenStats) -> Bool[Tensor, " N"]:
        """Tokens that the update would take further out: A (r - 1) > 0, by the sampled token."""
        return moves_outward(tokens)

    def forward(self, tokens: TokenStats) -> Surrogate:
        with torch.no_grad():
            anchored = replace(tokens, rollout_logp=anchor_logp(tokens, self.anchor))
            divergence = self.divergence(anchored)
            threshold = torch.where(
                tokens.advantage > 0, torch.full_like(tokens.advantage, self.delta_high), self.delta_low
            )
            keep = ~(self.outward(anchored) & (divergence > threshold))
        return weighted_surrogate(tokens, keep, divergence, max_ratio=self.max_ratio)


class BinaryTV(DivergenceMask):
    """Total variation of "this token or any other": |mu - pi| (eq. 13, without the factor 1/2). The paper's default.

    Args:
        delta: Threshold on the divergence, > 0; 0.15 in the paper's stability study and with LoRA, 0.2 in its scaling
            runs.
        delta_low: Threshold for tokens with A < 0; ``delta`` when None.
        delta_high: Threshold for tokens with A > 0; ``delta`` when None.
        max_ratio: Cap C on the importance weight, > 0; None in the stability study, 5 in the scaling runs.
        anchor: Distribution that the mask measures from; "recomputed" is the paper's DPPO-recompute ablation.
    """

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
        return binary_tv(tokens.rollout_logp, tokens.logp)


class BinaryKL(DivergenceMask):
    """KL(mu || pi) of "this token or any other": mu log(mu/pi) + (1-mu) log((1-mu)/(1-pi)) (eq. 14).

    Args:
        delta: Threshold on the divergence, > 0; 0.05 in the paper.
        delta_low: Threshold for tokens with A < 0; ``delta`` when None.
        delta_high: Threshold for tokens with A > 0; ``delta`` when None.
        max_ratio: Cap C on the importance weight, > 0; None for no cap.
        anchor: Distribution that the mask measures from; "recomputed" is the paper's DPPO-recompute ablation.
    """

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
        return binary_kl(tokens.rollout_logp, tokens.logp)


class MinimalMask(TrustRegion):
    """Smallest mask that stabilises PG-IS in the paper (arXiv 2602.04879, section 5.3): A < 0 and mu - pi >= delta.

    Args:
        delta: Fall of the probability, mu - pi, from which on a token is stopped, in (0, 1].

    Raises:
        ConfigError: ``delta`` is out of range.
    """

    def __init__(self, delta: float = 0.5) -> None:
        super().__init__()
        if not 0 < delta <= 1:
            raise ConfigError(f"MinimalMask: delta must be in (0, 1], got {delta}")
        self.delta = delta

    def forward(self, tokens: TokenStats) -> Surrogate:
        fall = tokens.rollout_logp.exp() - tokens.logp.detach().exp()
        return weighted_surrogate(tokens, ~((tokens.advantage < 0) & (fall >= self.delta)), fall.abs())


def binary_tv(rollout_logp: Float[Tensor, " N"], logp: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Binary total variation |mu - pi| of the sampled token."""
    return (rollout_logp.exp() - logp.exp()).abs()


def binary_kl(rollout_logp: Float[Tensor, " N"], logp: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """KL(mu || pi) of the sampled token against all others, finite and >= 0 up to mu, pi = 1."""
    mu = rollout_logp.exp()
    taken = mu * (rollout_logp - logp)
    others = (1 - mu) * (log_complement(rollout_logp) - log_complement(logp))
    return (taken + others).clamp(min=0)


def binary_chi2(rollout_logp: Float[Tensor, " N"], logp: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """(pi - mu)^2 / (mu (1 - mu)) of the sampled token against all others; mu is held one float32 step below 1."""
    # as (r - 1) (pi - mu) / (1 - mu): the square of a rare token's probability underflows
    return torch.expm1(logp - rollout_logp) * (logp.exp() - rollout_logp.exp()) / log_complement(rollout_logp).exp()


def log_complement(logp: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """log(1 - exp(logp)), finite for logp = 0: p is held one float32 step below 1."""
    return torch.log(-torch.expm1(logp.clamp(max=-(2.0**-24))))
