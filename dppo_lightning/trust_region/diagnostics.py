"""Divergences that are measured beside any region, to see how tight the cheap ones are."""

from __future__ import annotations

from dppo_lightning.trust_region.base import TrustRegion
from dppo_lightning.trust_region.divergence import BinaryKL, BinaryTV, DivergenceMask
from dppo_lightning.trust_region.topk import FullKL, FullTV, TopKKL, TopKTV

DEFAULT_K = 20


def diagnostic_divergences(region: TrustRegion) -> dict[str, DivergenceMask]:
    """Name -> divergence: binary <= Top-K <= full on every token, for TV and for KL (arXiv 2602.04879, App. B).

    They only measure, their thresholds stop nothing.

    Args:
        region: The trust region of the run; its own k is used where it has one.
    """
    k = region.k if "topk" in region.needs else DEFAULT_K
    return {
        "binary_tv": BinaryTV(),
        "topk_tv": TopKTV(k=k),
        "full_tv": FullTV(),
        "binary_kl": BinaryKL(),
        "topk_kl": TopKKL(k=k),
        "full_kl": FullKL(),
    }
