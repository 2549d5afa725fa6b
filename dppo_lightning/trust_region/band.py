"""BandPO: a ratio clip whose bounds come from a divergence, and so depend on how likely the token was."""

from __future__ import annotations

from typing import Literal

import torch

from dppo_lightning.trust_region.base import (
    Surrogate,
    TokenStats,
    TrustRegion,
    check_choice,
    check_positive,
    moves_outward,
    weighted_surrogate,
)
from dppo_lightning.trust_region.divergence import binary_chi2, binary_kl, binary_tv

DIVERGENCES = {"kl": binary_kl, "tv": binary_tv, "chi2": binary_chi2}


class BandPO(TrustRegion):
    """BandPO (arXiv 2603.04918): PPO's clip with the band of ratios that an f-divergence of delta allows at p = mu.

    All probability that the sampled token gains or loses is shared by the others in proportion, so that the divergence
    is the binary one: TV |mu - pi|; chi-squared (mu - pi)^2 / (mu (1 - mu)); KL(mu || pi) of ``BinaryKL``. Each grows
    with the distance of r from 1 on either side, so r has left the band where the divergence exceeds delta: the bounds
    themselves are not computed. With "tv" this is ``BinaryTV``, with "kl" ``BinaryKL``.

    Args:
        delta: Threshold on the divergence, > 0.
        divergence: Name of the divergence, "kl", "tv" or "chi2".

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
        with torch.no_grad():
            divergence = DIVERGENCES[self.divergence](tokens.rollout_logp, tokens.logp)
            keep = ~(moves_outward(tokens) & (divergence > self.delta))
        return weighted_surrogate(tokens, keep, divergence)
