"""Clip-Cov and KL-Cov (arXiv 2505.22617): a few tokens drive the loss of entropy, and only those are held."""

from __future__ import annotations

from typing import ClassVar

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
    policy_gradient,
    weighted_surrogate,
)

TIE = 1e-4
"""Difference of two covariances, relative to the larger one, below which they tie."""


class CovarianceRegion(TrustRegion):
    """Base that picks the tokens with the largest (A - mean A) (log pi - mean log pi), means over the optimizer step.

    At least one token is picked, of those with A != 0 and a positive covariance: the others do not lower the entropy.
    Share, means and ranks are those of the whole step, on all ranks and under its first weights, so the choice does not
    depend on how the step was split. Tokens that tie with the last one are picked too: completions of one prompt often
    begin with the same tokens, whose log-probs differ by rounding alone, and the rounding depends on the split.

    Args:
        fraction: Share of the step's tokens that are picked, in (0, 1].
        anchor: Denominator of the ratio.

    Raises:
        ConfigError: ``fraction`` is out of range.
    """

    needs: frozenset[str] = frozenset({"chosen"})

    def __init__(self, fraction: float = 2e-4, anchor: Anchor = "rollout") -> None:
        super().__init__(anchor)
        if not 0 < fraction <= 1:
            raise ConfigError(f"{type(self).__name__}: fraction must be in (0, 1], got {fraction}")
        self.fraction = fraction

    def choose(self, tokens: TokenStats) -> Bool[Tensor, " N"]:
        covariance = self.covariance(tokens).masked_fill(tokens.advantage == 0, 0.0)
        if len(covariance) == 0:
            return torch.zeros_like(covariance, dtype=torch.bool)
        count = max(1, int(self.fraction * len(covariance)))
        return (covariance >= covariance.topk(count).values[-1] * (1 - TIE)) & (covariance > 0)

    def covariance(self, tokens: TokenStats) -> Float[Tensor, " N"]:
        # in float64: the order of the tokens moves a float32 mean, and with it the choice
        logp, advantage = tokens.logp.detach().double(), tokens.advantage.double()
        return (advantage - advantage.mean()) * (logp - logp.mean())


def chosen(tokens: TokenStats) -> Bool[Tensor, " N"]:
    """Tokens that were picked."""
    assert tokens.chosen is not None  # check_tokens
    return tokens.chosen


class CovarianceClip(CovarianceRegion):
    """Clip-Cov: the picked tokens have no loss; the others have the weight r, without PPO's clip.

    The authors' code draws the tokens at random from a band of covariances; here they are the largest, so that the same
    step gives the same update.
    """

    def forward(self, tokens: TokenStats) -> Surrogate:
        return weighted_surrogate(tokens, ~chosen(tokens), anchor=self.anchor)


class CovarianceKL(CovarianceRegion):
    """KL-Cov: the picked tokens pay beta |log pi - log anchor| on top of -A r; nothing is stopped.

    Args:
        fraction: Share of the step's tokens that are picked, in (0, 1].
        beta: Weight of the penalty, > 0.
        anchor: Denominator of the ratio.

    Raises:
        ConfigError: A value is out of range.
    """

    composable: ClassVar[bool] = False

    def __init__(self, fraction: float = 2e-4, beta: float = 1.0, anchor: Anchor = "rollout") -> None:
        super().__init__(fraction, anchor)
        check_positive(self, beta=beta)
        self.beta = beta

    def forward(self, tokens: TokenStats) -> Surrogate:
        log_ratio = tokens.logp - anchor_logp(tokens, self.anchor)
        penalty = torch.where(chosen(tokens), self.beta * log_ratio.abs(), 0.0)
        keep = torch.ones_like(penalty, dtype=torch.bool)
        return Surrogate(policy_gradient(tokens, log_ratio.detach().exp()) + penalty, keep)
