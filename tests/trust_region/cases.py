"""Every public region, each next to its reference: the one list that the shared tests run over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from dppo_lightning.trust_region import (
    CISPO,
    CPPO,
    DRPO,
    GSPO,
    SAPO,
    SPO,
    VACO,
    BandPO,
    BinaryKL,
    BinaryTV,
    Combined,
    CovarianceClip,
    CovarianceKL,
    DualClip,
    FullKL,
    FullTV,
    IcePop,
    MinimalMask,
    MiniRL,
    NoTrustRegion,
    PPOClip,
    PredictiveMask,
    RelaxedClip,
    SequenceMask,
    TokenStats,
    TopKKL,
    TopKTV,
    TruncatedIS,
    TrustRegion,
)
from tests.trust_region import reference as ref
from tests.trust_region.batches import Token, stats


@dataclass(frozen=True)
class Case:
    """A region, and its reference as a function of (tokens, lps)."""

    region: TrustRegion
    reference: Callable[..., ref.Result]
    name: str = field(default="")

    def stats(self, tokens: list[Token], **kwargs) -> TokenStats:
        return self.choosing(stats(tokens, k=self.region.k or 5, full="full" in self.region.needs, **kwargs))

    def choosing(self, step: TokenStats) -> TokenStats:
        """The same with what the region chooses, when these are all tokens of a step."""
        return replace(step, chosen=self.region.choose(step)) if "chosen" in self.region.needs else step

    def __str__(self) -> str:
        return self.name or type(self.region).__name__


def topk_tv(k, how="append"):
    return partial(ref.partition_tv, k=k, sampled_token=how)


def topk_kl(k, how="append"):
    return partial(ref.partition_kl, k=k, sampled_token=how)


RECOMPUTED = "recomputed"

DEFAULTS = [
    Case(NoTrustRegion(), ref.no_region),
    Case(TruncatedIS(), partial(ref.no_region, cap=3.0)),
    Case(PPOClip(), ref.ppo),
    Case(DualClip(), ref.dual_clip),
    Case(RelaxedClip(), ref.relaxed_clip),
    Case(MiniRL(), ref.mini_rl),
    Case(CISPO(), ref.cispo),
    Case(MinimalMask(), ref.minimal_mask),
    Case(IcePop(), ref.ice_pop),
    Case(BinaryTV(), partial(ref.dppo, divergence=ref.binary_tv, delta=0.15)),
    Case(BinaryKL(), partial(ref.dppo, divergence=ref.binary_kl, delta=0.05)),
    Case(TopKTV(), partial(ref.dppo, divergence=topk_tv(20), delta=0.2)),
    Case(TopKKL(), partial(ref.dppo, divergence=topk_kl(20), delta=0.05)),
    Case(FullTV(), partial(ref.dppo, divergence=topk_tv(None), delta=0.2)),
    Case(FullKL(), partial(ref.dppo, divergence=topk_kl(None), delta=0.05)),
    Case(PredictiveMask(), ref.predictive),
    Case(SPO(), ref.spo),
    Case(DRPO(), ref.drpo),
    Case(SAPO(), ref.sapo),
    Case(GSPO(), ref.gspo),
    Case(SequenceMask(), ref.sequence_mask),
    Case(VACO(delta=0.1), partial(ref.vaco, delta=0.1)),
    Case(CPPO(), ref.cppo),
    Case(BandPO(), ref.band_po),
    Case(CovarianceClip(), ref.covariance_clip),
    Case(CovarianceKL(), ref.covariance_kl),
    Case(
        Combined([IcePop(), BinaryTV()]),
        partial(ref.combined, members=[ref.ice_pop, partial(ref.dppo, divergence=ref.binary_tv, delta=0.15)]),
    ),
]

VARIANTS = [
    Case(NoTrustRegion(max_ratio=1.5), partial(ref.no_region, cap=1.5), "NoTrustRegion-capped"),
    Case(PPOClip(0.1, 0.28), partial(ref.ppo, low=0.1, high=0.28), "PPOClip-higher"),
    Case(PPOClip(anchor=RECOMPUTED), partial(ref.ppo, anchor=RECOMPUTED), "PPOClip-recomputed"),
    Case(PPOClip(max_ratio=1.1), partial(ref.ppo, cap=1.1), "PPOClip-capped"),
    Case(DualClip(dual=None), partial(ref.dual_clip, dual=float("inf")), "DualClip-none"),
    Case(DualClip(dual=1.3, anchor=RECOMPUTED), partial(ref.dual_clip, dual=1.3, anchor=RECOMPUTED), "DualClip-re"),
    Case(RelaxedClip(side="high"), partial(ref.relaxed_clip, side="high"), "RelaxedClip-high"),
    Case(RelaxedClip(side="low", alpha=0.4), partial(ref.relaxed_clip, side="low", alpha=0.4), "RelaxedClip-low"),
    Case(MiniRL(max_ratio=1.2), partial(ref.mini_rl, cap=1.2), "MiniRL-capped"),
    Case(CISPO(0.3, 2.0), partial(ref.cispo, low=0.3, high=2.0), "CISPO-floor"),
    Case(CISPO(anchor=RECOMPUTED), partial(ref.cispo, anchor=RECOMPUTED), "CISPO-recomputed"),
    Case(MinimalMask(0.2), partial(ref.minimal_mask, delta=0.2), "MinimalMask-0.2"),
    Case(IcePop(0.9, 1.1), partial(ref.ice_pop, low=0.9, high=1.1), "IcePop-narrow"),
    Case(
        BinaryTV(0.1, delta_low=0.02, delta_high=0.3, max_ratio=1.5),
        partial(ref.dppo, divergence=ref.binary_tv, low=0.02, high=0.3, delta=0.1, cap=1.5),
        "BinaryTV-by-sign",
    ),
    Case(
        BinaryTV(anchor=RECOMPUTED),
        partial(ref.dppo, divergence=partial(ref.binary_tv, anchor=RECOMPUTED), delta=0.15, anchor=RECOMPUTED),
        "BinaryTV-recomputed",
    ),
    Case(
        BinaryKL(0.01, anchor=RECOMPUTED),
        partial(ref.dppo, divergence=partial(ref.binary_kl, anchor=RECOMPUTED), delta=0.01, anchor=RECOMPUTED),
        "BinaryKL-recomputed",
    ),
    Case(TopKTV(0.1, k=3), partial(ref.dppo, divergence=topk_tv(3), delta=0.1), "TopKTV-3"),
    Case(TopKKL(0.03, k=3), partial(ref.dppo, divergence=topk_kl(3), delta=0.03), "TopKKL-3"),
    Case(
        TopKTV(0.1, k=3, sampled_token="replace"),
        partial(ref.dppo, divergence=topk_tv(3, "replace"), delta=0.1),
        "TopKTV-replace",
    ),
    Case(
        TopKKL(0.03, k=3, sampled_token="replace"),
        partial(ref.dppo, divergence=topk_kl(3, "replace"), delta=0.03),
        "TopKKL-replace",
    ),
    Case(PredictiveMask(0.02, k=3), partial(ref.predictive, delta=0.02, k=3), "PredictiveMask-3"),
    Case(DRPO(12.5), partial(ref.drpo, delta=12.5), "DRPO-paper"),
    Case(SAPO(2.0, 0.5, RECOMPUTED), partial(ref.sapo, positive=2.0, negative=0.5, anchor=RECOMPUTED), "SAPO-re"),
    Case(GSPO(0.2, 0.2), partial(ref.gspo, low=0.2, high=0.2), "GSPO-wide"),
    Case(GSPO(0.1, 0.1, RECOMPUTED), partial(ref.gspo, low=0.1, high=0.1, anchor=RECOMPUTED), "GSPO-recomputed"),
    Case(SequenceMask(0.02, "mean"), partial(ref.sequence_mask, delta=0.02, reduce="mean"), "SequenceMask-mean"),
    Case(CPPO(0.3, 0.5, 0.001), partial(ref.cppo, delta=0.3, w_min=0.5, budget=0.001), "CPPO-tight-budget"),
    Case(BandPO(divergence="tv"), partial(ref.band_po, divergence="tv"), "BandPO-tv"),
    Case(BandPO(divergence="chi2"), partial(ref.band_po, divergence="chi2"), "BandPO-chi2"),
    Case(CovarianceClip(0.2), partial(ref.covariance_clip, fraction=0.2), "CovarianceClip-fifth"),
    Case(
        CovarianceKL(0.2, 0.5, RECOMPUTED),
        partial(ref.covariance_kl, fraction=0.2, beta=0.5, anchor=RECOMPUTED),
        "CovarianceKL-fifth",
    ),
    Case(
        Combined([TruncatedIS(1.5), PPOClip(anchor=RECOMPUTED), VACO(0.1)]),
        partial(ref.combined, members=[partial(ref.ppo, anchor=RECOMPUTED), partial(ref.vaco, delta=0.1)], cap=1.5),
        "Combined-three",
    ),
    Case(
        Combined([CovarianceClip(0.1), Combined([BinaryTV(), CovarianceClip(0.2)]), VACO(0.1)]),
        partial(
            ref.combined,
            members=[
                partial(ref.covariance_clip, fraction=0.2),
                partial(ref.dppo, divergence=ref.binary_tv, delta=0.15),
                partial(ref.vaco, delta=0.1),
            ],
        ),
        "Combined-choosing",
    ),
]

CASES = DEFAULTS + VARIANTS
TOKEN_SCOPE = [case for case in CASES if case.region.scope == "token"]
