"""BandPO: a ratio clip whose bounds come from a divergence, and so depend on how likely the token was."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dppo_lightning.trust_region.base import (
    Surrogate,
    TokenStats,
    TrustRegion,
    check_choice,
    check_positive,
    weighted_surrogate,
    within_bounds,
)


class BandPO(TrustRegion):
    """BandPO (arXiv 2603.04918): PPO's clip with the band of ratios that an f-divergence of delta allows at p = mu.

    All probability that the sampled token gains or loses is shared by the others in proportion, so that the divergence
    is the binary one: TV p |r - 1|; chi-squared p (r - 1)^2 / (1 - p); KL(mu || pi) of ``BinaryKL``. The band lies
    inside [0, 1/p]; a bound at the edge of the simplex stops nothing.

    Args:
        delta: Divergence allowed, > 0.
        divergence: "kl" (by root finding), "tv" or "chi2".

    Raises:
        ConfigError: A value is out of range.
    """

    def __init__(self, delta: float = 0.05, divergence: Literal["kl", "tv", "chi2"] = "kl") -> None:
        super().__init__()
        check_positive(self, delta=delta)
        check_choice(self, "divergence", divergence, ("kl", "tv", "chi2"))
        self.delta = delta
        self.divergence = divergence

    def forward(self, tokens: TokenStats) -> Surrogate:
        low, high = self.band(tokens.rollout_logp)
        # pi = 1 gives a ratio that rounding can put above 1/p
        at_edge = high.log() + tokens.rollout_logp >= -(2.0**-22)
        keep = within_bounds(tokens, "rollout", low, torch.where(at_edge, float("inf"), high))
        return weighted_surrogate(tokens, keep)

    def band(self, rollout_logp: Float[Tensor, " N"]) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """Least and greatest ratio at each token."""
        if self.divergence == "kl":
            return kl_band(rollout_logp, self.delta)
        p = rollout_logp.exp()
        reach = self.delta / p if self.divergence == "tv" else (self.delta * -torch.expm1(rollout_logp) / p).sqrt()
        return (1 - reach).clamp(min=0), torch.minimum(1 + reach, 1 / p)


def kl_band(
    rollout_logp: Float[Tensor, " N"], delta: float, steps: int = 60
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """The two ratios r at which KL(p || r p) of the sampled token against all others is ``delta``, by bisection.

    In float64, and for both bounds at once: ``inside`` starts at p, ``outside`` at 0 and 1, where the KL is infinite.
    """
    logp = rollout_logp.double().clamp(max=-(2.0**-24))
    p, log_others = logp.exp(), torch.log(-torch.expm1(logp))
    inside = torch.stack([p, p])
    outside = torch.stack([torch.zeros_like(p), torch.ones_like(p)])
    for _ in range(steps):
        middle = (inside + outside) / 2
        kl = p * (logp - middle.log()) + (1 - p) * (log_others - torch.log1p(-middle))
        inside, outside = torch.where(kl <= delta, middle, inside), torch.where(kl <= delta, outside, middle)
    low, high = (inside / p).to(rollout_logp.dtype)
    return low, high
