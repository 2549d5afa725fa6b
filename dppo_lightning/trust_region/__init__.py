"""The trust regions, each a small class that can be named by ``class_path``."""

from dppo_lightning.trust_region.base import Anchor, Surrogate, TokenStats, TrustRegion
from dppo_lightning.trust_region.clip import NoTrustRegion, PPOClip
from dppo_lightning.trust_region.divergence import BinaryKL, BinaryTV, DivergenceMask

__all__ = [
    "Anchor",
    "BinaryKL",
    "BinaryTV",
    "DivergenceMask",
    "NoTrustRegion",
    "PPOClip",
    "Surrogate",
    "TokenStats",
    "TrustRegion",
]
