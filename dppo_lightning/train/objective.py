"""The loss of a token (surrogate, KL to the reference, entropy bonus), and how token losses become one number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.trust_region.base import Surrogate, TokenStats, TrustRegion, check_given
from dppo_lightning.trust_region.divergence import DivergenceMask

KLKind = Literal["k1", "k2", "k3"]


@dataclass(frozen=True)
class ReferenceKL:
    """Pull towards the reference model (the policy as it was before training).

    Args:
        coefficient: beta >= 0; with 0 no reference model is loaded.
        kind: Estimator of KL(pi || ref) from the sampled token: "k1" = log pi - log ref, "k2" = half its square,
            "k3" = exp(-k1) - 1 + k1, which is never negative.
        where: "loss" adds beta * KL to the loss of every token; "reward" subtracts beta * the sum over the completion
            from its reward, before the advantage.

    Raises:
        ConfigError: The coefficient is negative.
    """

    coefficient: float = 0.0
    kind: KLKind = "k3"
    where: Literal["loss", "reward"] = "loss"

    def __post_init__(self) -> None:
        if not self.coefficient >= 0:
            raise ConfigError(f"model.kl.coefficient must be >= 0, got {self.coefficient}")


def kl_estimate(logp: Float[Tensor, " N"], reference_logp: Float[Tensor, " N"], kind: KLKind) -> Float[Tensor, " N"]:
    """Estimate KL(pi || ref) of each token, differentiable in ``logp``."""
    log_ratio = logp - reference_logp
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    # in float64, and not let below 0: near 0 the two terms cancel to less than float32 can tell
    exact = log_ratio.double()
    return (torch.expm1(-exact) + exact).clamp(min=0).to(log_ratio.dtype)


@dataclass(frozen=True)
class TokenLoss:
    """Loss of each token before aggregation, [N] differentiable in ``logp`` and ``entropy``, and what made it up."""

    loss: Float[Tensor, " N"]
    surrogate: Surrogate
    kl: Float[Tensor, " N"] | None


class Objective(nn.Module):
    """Per-token loss = surrogate + beta * KL to the reference - entropy_coefficient * entropy.

    Args:
        region: The trust region.
        kl: Pull towards the reference; its coefficient counts here only when ``kl.where`` is "loss".
        entropy_coefficient: Weight of the entropy bonus, >= 0.

    Raises:
        ConfigError: The entropy coefficient is negative, or the region asks for what cannot be given.
    """

    def __init__(self, region: TrustRegion, kl: ReferenceKL, entropy_coefficient: float = 0.0) -> None:
        super().__init__()
        if not entropy_coefficient >= 0:
            raise ConfigError(f"model.entropy_coefficient must be >= 0, got {entropy_coefficient}")
        check_needs(region)
        self.region = region
        self.kl = kl
        self.entropy_coefficient = entropy_coefficient

    def forward(self, tokens: TokenStats, reference_logp: Float[Tensor, " N"] | None) -> TokenLoss:
        check_given(self.region, tokens)
        surrogate = self.region.forward(tokens)  # not a call, which would wait for the device: see train/nonfinite.py
        loss = surrogate.loss
        kl = None
        if reference_logp is not None:
            kl = kl_estimate(tokens.logp, reference_logp, self.kl.kind)
            if self.kl.where == "loss":
                loss = loss + self.kl.coefficient * kl
        if self.entropy_coefficient > 0:
            if tokens.entropy is None:
                raise ConfigError("an entropy bonus needs the entropy of every token, which was not given")
            loss = loss - self.entropy_coefficient * tokens.entropy
        return TokenLoss(loss, surrogate, kl)


def check_needs(region: TrustRegion) -> None:
    """Refuse a region that is unfinished, or asks for what the head cannot give it.

    Raises:
        ConfigError: It is not initialised, or lacks ``forward`` or ``divergence``; it needs something unknown, "topk"
            without k, "topk" and "full" at once, "full" over sequences, or "chosen" without a ``choose``.
    """
    name, needs = type(region).__name__, region.needs
    if "anchor" not in vars(region):
        raise ConfigError(f"{name} is not initialised: its __init__ must begin with super().__init__()")
    known = {"topk", "recomputed_logp", "entropy", "full", "age", "chosen"}
    if needs - known:
        raise ConfigError(f"{name}: needs must be among {sorted(known)}, got {sorted(needs - known)}")
    if "topk" in needs and region.k < 1:
        raise ConfigError(f'{name} needs "topk": set k to how many ids are asked of the rollout engine, >= 1')
    if "chosen" in needs and type(region).choose is TrustRegion.choose:
        raise ConfigError(f'{name} needs "chosen": write its method choose, which names them among the step\'s tokens')
    if {"topk", "full"} <= needs:
        raise ConfigError(f'{name} needs "topk" and "full", which share one table: choose one of them')
    if "full" in needs and region.scope == "sequence":
        raise ConfigError(f'{name} needs "full", whose tables exist for one chunk at a time: its scope must be "token"')
    for method, unwritten in (("forward", TrustRegion.forward), ("divergence", DivergenceMask.divergence)):
        if getattr(type(region), method, None) is unwritten:
            raise ConfigError(f"{name} has no {method}: write the method, see docs/write-your-own.md")


def check_staleness(region: TrustRegion, needs: frozenset[str], ahead: int) -> None:
    """Refuse to compare whole distributions with that of a token's sampling where several weights sampled.

    Args:
        region: Trust region of the run.
        needs: What the region and the diagnostics read.
        ahead: Largest age of a token at a rollout's first step, in optimizer steps.

    Raises:
        ConfigError: The region or the diagnostics need "full", and ``ahead`` is above 0.
    """
    if not ahead or "full" not in needs:
        return
    kept = "the whole vocabulary's distribution is kept for the weights at a rollout's first step alone"
    if "full" in region.needs:
        raise ConfigError(
            f"{type(region).__name__} needs the weights that sampled each token, and {kept}: set "
            f"data.streaming.max_staleness to 0, got {ahead}, or use a Top-K region, whose log-probs the engine "
            "records"
        )
    raise ConfigError(
        f"model.divergence_diagnostics needs the weights that sampled each token, and {kept}: set it to false, or "
        f"data.streaming.max_staleness to 0, got {ahead}"
    )


Aggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-sum-constant"]


def sequence_weights(aggregation: Aggregation, tokens: np.ndarray, constant_length: int | None = None) -> np.ndarray:
    """Weight of each token of each sequence, so that the step's loss is the weighted sum over all its tokens.

    Args:
        aggregation: ``token-mean``: over the step's tokens. ``seq-mean-token-sum`` (the DPPO paper's objective): sum
            over tokens, mean over sequences. ``seq-mean-token-mean`` (GRPO): mean over tokens, then over sequences.
            ``seq-sum-constant`` (Dr.GRPO, arXiv 2503.20783): sum over tokens divided by ``constant_length``, mean
            over sequences.
        tokens: [S] generated tokens of each sequence of the whole step; sequences of none count in no mean.
        constant_length: For ``seq-sum-constant``, > 0.

    Returns:
        [S] float64; 0 for a sequence without tokens.
    """
    counted = tokens > 0
    sequences = max(int(counted.sum()), 1)
    if aggregation == "token-mean":
        weight = np.full(len(tokens), 1 / max(int(tokens.sum()), 1))
    elif aggregation == "seq-mean-token-sum":
        weight = np.full(len(tokens), 1 / sequences)
    elif aggregation == "seq-mean-token-mean":
        weight = 1 / (sequences * np.maximum(tokens, 1))
    else:
        if constant_length is None or constant_length <= 0:
            raise ConfigError("aggregation seq-sum-constant needs constant_length > 0: set model.constant_length")
        weight = np.full(len(tokens), 1 / (sequences * constant_length))
    return np.where(counted, weight, 0.0)
