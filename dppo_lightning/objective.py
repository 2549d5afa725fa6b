"""The loss of a token: the trust region's surrogate, plus KL to the reference and an entropy bonus when asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dppo_lightning.errors import ConfigError
from dppo_lightning.trust_region.base import Surrogate, TokenStats, TrustRegion

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
    """Per-token estimate of KL(pi || ref), differentiable in ``logp``."""
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
        kl: Its coefficient counts here only when ``kl.where`` is "loss".
        entropy_coefficient: >= 0.

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
        surrogate = self.region(tokens)
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
    """Refuse a region that asks for what the head cannot give it.

    Raises:
        ConfigError: It needs something unknown, "topk" without k, "topk" and "full" at once, "full" over sequences, or
            "chosen" without a ``choose``.
    """
    name, needs = type(region).__name__, region.needs
    known = {"topk", "recomputed_logp", "entropy", "full", "chosen"}
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
