"""Regions without a mask: losses, differentiable in the ratio, whose gradient fades or turns as a token moves away."""

from __future__ import annotations

from typing import ClassVar

import torch

from dppo_lightning.trust_region.base import (
    Anchor,
    Surrogate,
    TokenStats,
    TrustRegion,
    anchor_logp,
    check_positive,
)


class SmoothRegion(TrustRegion):
    """Base of the losses that are differentiable in the ratio: nothing is stopped, nothing can be combined."""

    composable: ClassVar[bool] = False

    def surrogate(self, tokens: TokenStats, loss: torch.Tensor, divergence: torch.Tensor | None = None) -> Surrogate:
        return Surrogate(loss, torch.ones_like(tokens.advantage, dtype=torch.bool), divergence)


class SPO(SmoothRegion):
    """Simple policy optimisation (arXiv 2401.16025): maximise r A - |A| (r - 1)^2 / (2 epsilon).

    The penalty cancels the gradient at |r - 1| = epsilon on the side that A pushes to, and turns it beyond.

    Args:
        epsilon: Distance |r - 1| at which the gradient is cancelled, > 0.

    Raises:
        ConfigError: ``epsilon`` is out of range.
    """

    def __init__(self, epsilon: float = 0.2) -> None:
        super().__init__()
        check_positive(self, epsilon=epsilon)
        self.epsilon = epsilon

    def forward(self, tokens: TokenStats) -> Surrogate:
        ratio = (tokens.logp - tokens.rollout_logp).exp()
        penalty = tokens.advantage.abs() * (ratio - 1) ** 2 / (2 * self.epsilon)
        return self.surrogate(tokens, penalty - ratio * tokens.advantage)


class DRPO(SmoothRegion):
    """Divergence-regularised loss (arXiv 2606.09821): -A r + |A| mu (r - 1)^2 / (2 delta), log r clamped to +-20.

    Its gradient is that of -A r times 1 - sign(A (r - 1)) |pi - mu| / delta: it fades as the token nears the binary-TV
    boundary of DPPO, and pulls back past it.

    Args:
        delta: Distance |pi - mu| at which the gradient is cancelled, > 0. 0.15 gives the geometry of DPPO; the paper's
            own 12.5 never reaches the boundary, as TV <= 1.

    Raises:
        ConfigError: ``delta`` is out of range.
    """

    max_log_ratio: ClassVar[float] = 20.0

    def __init__(self, delta: float = 0.15) -> None:
        super().__init__()
        check_positive(self, delta=delta)
        self.delta = delta

    def forward(self, tokens: TokenStats) -> Surrogate:
        log_ratio = (tokens.logp - tokens.rollout_logp).clamp(-self.max_log_ratio, self.max_log_ratio)
        ratio = log_ratio.exp()
        mu = tokens.rollout_logp.exp()
        penalty = tokens.advantage.abs() * mu * (ratio - 1) ** 2 / (2 * self.delta)
        divergence = (tokens.logp.detach().exp() - mu).abs()
        return self.surrogate(tokens, penalty - tokens.advantage * ratio, divergence)


class SAPO(SmoothRegion):
    """Soft adaptive policy optimisation (arXiv 2511.20347): maximise A sigma(tau (r - 1)) 4 / tau.

    The gate's slope is 1 at r = 1 and fades on both sides, faster for the larger tau.

    Args:
        tau_positive: Temperature of the gate for A > 0, > 0.
        tau_negative: Temperature of the gate for A <= 0, > 0; larger than the other one in the paper.
        anchor: Denominator of the ratio.

    Raises:
        ConfigError: A temperature is out of range.
    """

    def __init__(self, tau_positive: float = 1.0, tau_negative: float = 1.05, anchor: Anchor = "rollout") -> None:
        super().__init__(anchor)
        check_positive(self, tau_positive=tau_positive, tau_negative=tau_negative)
        self.tau_positive = tau_positive
        self.tau_negative = tau_negative

    def forward(self, tokens: TokenStats) -> Surrogate:
        ratio = (tokens.logp - anchor_logp(tokens, self.anchor)).exp()
        tau = torch.where(tokens.advantage > 0, torch.full_like(tokens.advantage, self.tau_positive), self.tau_negative)
        # not torch.sigmoid, whose last bit depends on where a token lies in its chunk; the exponent is at most tau
        gate = 4 / (tau * (1 + (tau * (1 - ratio)).exp()))
        return self.surrogate(tokens, -tokens.advantage * gate)
