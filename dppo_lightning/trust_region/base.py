"""TrustRegion: which tokens may still move, and how strongly. A small object that is given tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dppo_lightning.errors import ConfigError

Anchor = Literal["rollout", "recomputed"]
Scope = Literal["token", "sequence"]


@dataclass(frozen=True)
class TokenStats:
    """Statistics of N generated tokens, packed: no padding, no mask. All probabilities are float32 logs.

    Attributes:
        logp: log pi of the sampled token; carries the gradient.
        rollout_logp: log mu, recorded by the engine when it sampled the token.
        advantage: Advantage of the token's sequence.
        recomputed_logp: log pi_old, recomputed by the trainer with the weights of rollout time; only on request.
        topk_logp: log pi at mu's K most likely ids, most likely first; the last column is the sampled token.
        rollout_topk_logp: log mu at the same ids; -inf marks an unused slot (the sampled token's own, when it is
            among the K already).
        entropy: Entropy of pi, in nats.
        sequence: Index of each token's sequence.
        position: Place of the token in its completion, from 0.
    """

    logp: Float[Tensor, " N"]
    rollout_logp: Float[Tensor, " N"]
    advantage: Float[Tensor, " N"]
    recomputed_logp: Float[Tensor, " N"] | None = None
    topk_logp: Float[Tensor, "N K"] | None = None
    rollout_topk_logp: Float[Tensor, "N K"] | None = None
    entropy: Float[Tensor, " N"] | None = None
    sequence: Int[Tensor, " N"] | None = None
    position: Int[Tensor, " N"] | None = None


@dataclass(frozen=True)
class Surrogate:
    """What a region makes of the tokens.

    Attributes:
        loss: To minimise, before aggregation; differentiable in ``logp``.
        keep: False where the region stopped the update.
        divergence: The region's own measure of how far each token has moved, or None.
    """

    loss: Float[Tensor, " N"]
    keep: Bool[Tensor, " N"]
    divergence: Float[Tensor, " N"] | None = None


class TrustRegion(nn.Module):
    """Base of every region.

    Override ``forward``, and declare as class attributes what it reads:

    - ``needs``: of {"topk", "recomputed_logp", "entropy", "full"}; what is not needed is not computed.
    - ``scope``: "token" when each token is judged alone (evaluated chunk by chunk inside the head), "sequence" when a
      token's fate depends on others of its sequence or batch.

    Args:
        anchor: The distribution that the region measures from: "rollout" (mu) or "recomputed" (pi_old).

    Raises:
        ConfigError: Unknown anchor.
    """

    needs: frozenset[str] = frozenset()
    scope: ClassVar[Scope] = "token"

    def __init__(self, anchor: Anchor = "rollout") -> None:
        super().__init__()
        if anchor not in ("rollout", "recomputed"):
            raise ConfigError(f'{type(self).__name__}: anchor must be "rollout" or "recomputed", got {anchor!r}')
        self.anchor: Anchor = anchor
        if anchor == "recomputed":
            self.needs = self.needs | {"recomputed_logp"}

    def forward(self, tokens: TokenStats) -> Surrogate:
        raise NotImplementedError

    def describe(self) -> dict[str, str]:
        """Thresholds and anchor for the start table and the run record."""
        numbers = {key: value for key, value in vars(self).items() if isinstance(value, (int, float))}
        settings = {key: f"{value:g}" for key, value in numbers.items() if key != "training"}
        return {"region": type(self).__name__, **settings, "anchor": self.anchor}


def anchor_logp(tokens: TokenStats, anchor: Anchor) -> Float[Tensor, " N"]:
    """Log-probs of the anchor distribution.

    Raises:
        ConfigError: The recomputed anchor is asked for and was not given: never a silent fall-back to the other one.
    """
    if anchor == "rollout":
        return tokens.rollout_logp
    if tokens.recomputed_logp is None:
        raise ConfigError('anchor "recomputed" needs recomputed_logp, which was not given')
    return tokens.recomputed_logp


def policy_gradient(
    tokens: TokenStats, weight: Float[Tensor, " N"], keep: Bool[Tensor, " N"] | None = None
) -> Float[Tensor, " N"]:
    """Loss -A * w * keep, whose gradient is -A * w * keep * grad log pi with the weight held constant (DPPO eq. 23).

    ``weight`` is the (capped) ratio; A = 0 contributes an exact zero even where the weight overflows.
    """
    scale = torch.where(tokens.advantage == 0, 0.0, -tokens.advantage * weight.detach())
    if keep is not None:
        scale = torch.where(keep, scale, 0.0)
    return scale * (1 + tokens.logp - tokens.logp.detach())


def importance_ratio(tokens: TokenStats, max_ratio: float | None = None) -> Float[Tensor, " N"]:
    """Detached r = pi / mu, capped at ``max_ratio`` when given."""
    ratio = (tokens.logp.detach() - tokens.rollout_logp).exp()
    return ratio if max_ratio is None else ratio.clamp(max=max_ratio)


def check_positive(owner: TrustRegion, **values: float | None) -> None:
    """Raise ConfigError for a threshold that is given and not > 0."""
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ConfigError(f"{type(owner).__name__}: {name} must be > 0, got {value}")
