"""Regions that clip or mask by the ratio of the sampled token, and those that do not mask at all."""

from __future__ import annotations

import torch

from dppo_lightning.errors import ConfigError
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


class NoTrustRegion(TrustRegion):
    """Importance-weighted policy gradient (PG-IS): every token moves.

    Args:
        max_ratio: Cap on the importance weight, > 0; None for no cap.
    """

    def __init__(self, max_ratio: float | None = None) -> None:
        super().__init__()
        check_positive(self, max_ratio=max_ratio)
        self.max_ratio = max_ratio

    def forward(self, tokens: TokenStats) -> Surrogate:
        keep = torch.ones_like(tokens.logp, dtype=torch.bool)
        return Surrogate(policy_gradient(tokens, importance_ratio(tokens, self.max_ratio)), keep)


class PPOClip(TrustRegion):
    """PPO and GRPO clip (arXiv 1707.06347): A > 0 stops at r > 1 + epsilon_high, A < 0 at r < 1 - epsilon_low.

    Args:
        epsilon_low: In (0, 1).
        epsilon_high: > 0; 0.28 with epsilon_low 0.2 is "clip-higher" (arXiv 2503.14476).
        anchor: What the clipped ratio is measured from.
        max_ratio: Cap on the importance weight, > 0; None for no cap.

    Raises:
        ConfigError: A value is out of range.
    """

    def __init__(
        self,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        anchor: Anchor = "rollout",
        max_ratio: float | None = None,
    ) -> None:
        super().__init__(anchor)
        check_positive(self, epsilon_low=epsilon_low, epsilon_high=epsilon_high, max_ratio=max_ratio)
        if epsilon_low >= 1:
            raise ConfigError(f"PPOClip: epsilon_low must be below 1, got {epsilon_low}")
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.max_ratio = max_ratio

    def forward(self, tokens: TokenStats) -> Surrogate:
        anchor = anchor_logp(tokens, self.anchor)
        with torch.no_grad():
            ratio = (tokens.logp - anchor).exp()
            stop_up = (tokens.advantage > 0) & (ratio > 1 + self.epsilon_high)
            stop_down = (tokens.advantage < 0) & (ratio < 1 - self.epsilon_low)
            keep = ~(stop_up | stop_down)
            weight = ratio if self.max_ratio is None else ratio.clamp(max=self.max_ratio)
        return Surrogate(policy_gradient(tokens, weight, keep), keep)
