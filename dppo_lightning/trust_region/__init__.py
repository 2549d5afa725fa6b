"""Trust regions, each a small class that can be named by ``class_path``."""

from dppo_lightning.trust_region.band import BandPO
from dppo_lightning.trust_region.base import (
    Anchor,
    Surrogate,
    TokenStats,
    TokenStatsError,
    TrustRegion,
    check_tokens,
    weighted_surrogate,
)
from dppo_lightning.trust_region.clip import (
    CISPO,
    DualClip,
    IcePop,
    MiniRL,
    NoTrustRegion,
    PPOClip,
    RelaxedClip,
    TruncatedIS,
)
from dppo_lightning.trust_region.composition import Combined
from dppo_lightning.trust_region.covariance import CovarianceClip, CovarianceKL
from dppo_lightning.trust_region.divergence import BinaryKL, BinaryTV, DivergenceMask, MinimalMask
from dppo_lightning.trust_region.sequence import CPPO, GSPO, VACO, SequenceMask
from dppo_lightning.trust_region.smooth import DRPO, SAPO, SPO
from dppo_lightning.trust_region.topk import FullKL, FullTV, PredictiveMask, TopKKL, TopKTV

__all__ = [
    "CISPO",
    "CPPO",
    "DRPO",
    "GSPO",
    "SAPO",
    "SPO",
    "VACO",
    "Anchor",
    "BandPO",
    "BinaryKL",
    "BinaryTV",
    "Combined",
    "CovarianceClip",
    "CovarianceKL",
    "DivergenceMask",
    "DualClip",
    "FullKL",
    "FullTV",
    "IcePop",
    "MiniRL",
    "MinimalMask",
    "NoTrustRegion",
    "PPOClip",
    "PredictiveMask",
    "RelaxedClip",
    "SequenceMask",
    "Surrogate",
    "TokenStats",
    "TokenStatsError",
    "TopKKL",
    "TopKTV",
    "TruncatedIS",
    "TrustRegion",
    "check_tokens",
    "weighted_surrogate",
]
