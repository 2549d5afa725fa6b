"""Regions that clip, cap or mask by the ratio of the sampled token, and those that do not mask at all."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.trust_region.base import (
    Anchor,
    Surrogate,
    TokenStats,
    TrustRegion,
    anchor_logp,
    check_choice,
    check_clip,
    check_positive,
    weighted_surrogate,
    within_bounds,
)


class NoTrustRegion(TrustRegion):
    """Importance-weighted policy gradient (PG-IS): every token moves, with weight r = pi / mu.

    Args:
        max_ratio: Cap on the importance weight, > 0; None for no cap.
    """

    def __init__(self, max_ratio: float | None = None) -> None:
        super().__init__()
        check_positive(self, max_ratio=max_ratio)
        self.max_ratio = max_ratio

    def forward(self, tokens: TokenStats) -> Surrogate:
        return weighted_surrogate(tokens, max_ratio=self.max_ratio)


class TruncatedIS(NoTrustRegion):
    """Truncated importance sampling (TIS; the DPPO paper's "CISPO" baseline, PG-TIS): weight min(r, C), no mask.

    Args:
        max_ratio: Cap C on the weight, > 0; 3 in the DPPO paper (arXiv 2602.04879), 2 in most other code.
    """

    def __init__(self, max_ratio: float = 3.0) -> None:
        super().__init__(max_ratio)


class PPOClip(TrustRegion):
    """PPO and GRPO clip (arXiv 1707.06347): A > 0 stops at r > 1 + epsilon_high, A < 0 at r < 1 - epsilon_low.

    One ratio is both clipped and used as the weight, as in the paper: r = pi / mu under the rollout anchor,
    r' = pi / pi_old under the recomputed one (``MiniRL`` masks by r' and weighs by r).

    Args:
        epsilon_low: Width of the clip below 1, in (0, 1).
        epsilon_high: Width of the clip above 1, > 0; 0.28 with epsilon_low 0.2 is "clip-higher" (arXiv 2503.14476).
        anchor: Denominator of the ratio.
        max_ratio: Cap on the weight, > 0; None for no cap.

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
        check_clip(self, epsilon_low, epsilon_high)
        check_positive(self, max_ratio=max_ratio)
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.max_ratio = max_ratio

    def forward(self, tokens: TokenStats) -> Surrogate:
        keep = within_bounds(tokens, self.anchor, 1 - self.epsilon_low, 1 + self.epsilon_high)
        return weighted_surrogate(tokens, keep, anchor=self.anchor, max_ratio=self.max_ratio)


class DualClip(TrustRegion):
    """PPO with a second clip for A < 0 (arXiv 1912.09729): max(-A r, -A clip(r)), and at most -A c when A < 0.

    The loss is the published value, differentiable in r; its gradient is zero wherever ``keep`` is False.

    Args:
        epsilon_low: Width of the clip below 1, in (0, 1).
        epsilon_high: Width of the clip above 1, > 0.
        dual: Bound c, > 1: a token with A < 0 stops at r > c as well. None leaves plain PPO.
        anchor: Denominator of the ratio.

    Raises:
        ConfigError: A value is out of range.
    """

    composable: ClassVar[bool] = False

    def __init__(
        self,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        dual: float | None = 3.0,
        anchor: Anchor = "rollout",
    ) -> None:
        super().__init__(anchor)
        check_clip(self, epsilon_low, epsilon_high)
        if dual is not None and not dual > 1:
            raise ConfigError(f"DualClip: dual must be > 1, got {dual}")
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.dual = dual

    def forward(self, tokens: TokenStats) -> Surrogate:
        ratio = (tokens.logp - anchor_logp(tokens, self.anchor)).exp()
        clipped = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        loss = torch.maximum(-tokens.advantage * ratio, -tokens.advantage * clipped)
        keep = within_bounds(tokens, self.anchor, 1 - self.epsilon_low, 1 + self.epsilon_high)
        if self.dual is not None:
            past_dual = (tokens.advantage < 0) & (ratio.detach() > self.dual)
            loss = torch.where(past_dual, -tokens.advantage * self.dual, loss)
            keep = keep & ~past_dual
        return Surrogate(loss, keep)


class RelaxedClip(TrustRegion):
    """PPO clip without a bound for rare tokens (an ablation of arXiv 2602.04879): epsilon = inf where mu < alpha.

    Args:
        epsilon_low: Width of the clip below 1, in (0, 1).
        epsilon_high: Width of the clip above 1, > 0.
        alpha: Probability mu below which the bound is lifted, in (0, 1].
        side: Bound that is lifted: "high" (for A > 0), "low" (for A < 0) or "both".

    Raises:
        ConfigError: A value is out of range.
    """

    def __init__(
        self,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        alpha: float = 0.1,
        side: Literal["high", "low", "both"] = "both",
    ) -> None:
        super().__init__()
        check_clip(self, epsilon_low, epsilon_high)
        check_choice(self, "side", side, ("high", "low", "both"))
        if not 0 < alpha <= 1:
            raise ConfigError(f"RelaxedClip: alpha must be in (0, 1], got {alpha}")
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.alpha = alpha
        self.side = side

    def forward(self, tokens: TokenStats) -> Surrogate:
        rare = tokens.rollout_logp.exp() < self.alpha
        low, high = (torch.full_like(tokens.rollout_logp, value) for value in (0.0, float("inf")))
        low = torch.where(rare & (self.side != "high"), low, 1 - self.epsilon_low)
        high = torch.where(rare & (self.side != "low"), high, 1 + self.epsilon_high)
        return weighted_surrogate(tokens, within_bounds(tokens, "rollout", low, high))


class MiniRL(TrustRegion):
    """MiniRL (arXiv 2512.01374): the PPO mask is taken on r' = pi / pi_old, the weight in the loss is r = pi / mu.

    The anchor is the recomputed policy by definition: the trainer's when training on the rollout begins.

    Args:
        epsilon_low: Width of the clip below 1, in (0, 1).
        epsilon_high: Width of the clip above 1, > 0.
        max_ratio: Cap on the weight pi / mu, > 0; None for no cap.

    Raises:
        ConfigError: A value is out of range.
    """

    def __init__(self, epsilon_low: float = 0.2, epsilon_high: float = 0.28, max_ratio: float | None = None) -> None:
        super().__init__("recomputed")
        check_clip(self, epsilon_low, epsilon_high)
        check_positive(self, max_ratio=max_ratio)
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.max_ratio = max_ratio

    def forward(self, tokens: TokenStats) -> Surrogate:
        keep = within_bounds(tokens, "recomputed", 1 - self.epsilon_low, 1 + self.epsilon_high)
        return weighted_surrogate(tokens, keep, max_ratio=self.max_ratio)


class CISPO(TrustRegion):
    """CISPO (MiniMax-M1, arXiv 2506.13585): no mask, the detached ratio is clipped: sg(min(r, 1 + epsilon_high)).

    Args:
        epsilon_low: Distance of the ratio's floor below 1, > 0; None, as in the paper's runs, for no floor.
        epsilon_high: Distance of the ratio's cap above 1, > 0; published values run from 0.28 to 5.
        anchor: Denominator of the ratio.

    Raises:
        ConfigError: A value is out of range.
    """

    def __init__(
        self, epsilon_low: float | None = None, epsilon_high: float = 0.28, anchor: Anchor = "rollout"
    ) -> None:
        super().__init__(anchor)
        check_positive(self, epsilon_low=epsilon_low, epsilon_high=epsilon_high)
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high

    def forward(self, tokens: TokenStats) -> Surrogate:
        floor = None if self.epsilon_low is None else 1 - self.epsilon_low
        return weighted_surrogate(tokens, anchor=self.anchor, min_ratio=floor, max_ratio=1 + self.epsilon_high)


class IcePop(TrustRegion):
    """IcePop (Ring-1T, arXiv 2510.18855): the mismatch weight k = pi_old / mu is kept inside [low, high], else 0.

    The loss is k r' with r' = pi / pi_old, that is pi / mu. Where generation runs ahead (max_staleness > 0) pi_old is
    not the policy that sampled, and k holds staleness too, not only the mismatch of trainer and engine. The sign of A
    plays no part: a token on which trainer and engine disagree is dropped in either direction. The region needs both
    anchors, so there is none to choose.

    Args:
        low: Smallest k that is kept, >= 0.
        high: Largest k that is kept, > low.

    Raises:
        ConfigError: ``low`` and ``high`` do not satisfy 0 <= low < high.
    """

    needs: frozenset[str] = frozenset({"recomputed_logp"})

    def __init__(self, low: float = 0.5, high: float = 5.0) -> None:
        super().__init__()
        if not 0 <= low < high:
            raise ConfigError(f"IcePop: low and high must satisfy 0 <= low < high, got {low} and {high}")
        self.low = low
        self.high = high

    def forward(self, tokens: TokenStats) -> Surrogate:
        mismatch = (anchor_logp(tokens, "recomputed") - tokens.rollout_logp).exp()
        return weighted_surrogate(tokens, (mismatch >= self.low) & (mismatch <= self.high))

    def describe(self) -> dict[str, str]:
        return {**super().describe(), "anchor": "rollout and recomputed"}
