"""DPPO with a divergence over many tokens of the vocabulary: mu's top K, or all of them (arXiv 2602.04879)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.trust_region.base import Anchor, TokenStats, TrustRegion, check_choice
from dppo_lightning.trust_region.divergence import BinaryKL, BinaryTV, DivergenceMask

SampledToken = Literal["append", "replace"]

REST_FLOOR = 1e-12
"""Smallest probability of the rest."""


class TopKMask(DivergenceMask):
    """Base of the Top-K divergences: S = mu's K most likely ids and the sampled one, all others are one bucket.

    Args:
        delta: Threshold on the divergence, > 0.
        delta_low: Threshold for tokens with A < 0; ``delta`` when None.
        delta_high: Threshold for tokens with A > 0; ``delta`` when None.
        max_ratio: Cap C on the importance weight, > 0; None for no cap.
        anchor: Distribution to measure from, only "rollout": the engine records the top K of mu, and nobody that of
            pi_old.
        k: Number of ids that are asked of the rollout engine, >= 1.
        sampled_token: Treatment of a sampled token outside the top K: "append" it (K + 1 ids, the paper's set) or
            let it "replace" the K-th (the authors' code).

    Raises:
        ConfigError: A value is out of range, or the anchor is "recomputed".
    """

    needs: frozenset[str] = frozenset({"topk"})

    def __init__(
        self,
        delta: float,
        delta_low: float | None = None,
        delta_high: float | None = None,
        max_ratio: float | None = None,
        anchor: Anchor = "rollout",
        k: int = 20,
        sampled_token: SampledToken = "append",
    ) -> None:
        super().__init__(delta, delta_low, delta_high, max_ratio, anchor)
        refuse_recomputed(self)
        check_choice(self, "sampled_token", sampled_token, ("append", "replace"))
        if k < 1:
            raise ConfigError(f"{type(self).__name__}: k must be >= 1, got {k}")
        self.k = k
        self.sampled_token: SampledToken = sampled_token

    def slots(self, tokens: TokenStats) -> tuple[Float[Tensor, "N S"], Float[Tensor, "N S"]]:
        """Log pi and log mu over S and the rest."""
        return with_rest_bucket(*topk_slots(tokens, self.sampled_token))


class TopKTV(TopKMask):
    """Top-K total variation: half the sum over S and the rest of |mu_i - pi_i| (eq. 15). Arguments: ``TopKMask``."""

    def __init__(
        self,
        delta: float = 0.2,
        delta_low: float | None = None,
        delta_high: float | None = None,
        max_ratio: float | None = None,
        anchor: Anchor = "rollout",
        k: int = 20,
        sampled_token: SampledToken = "append",
    ) -> None:
        super().__init__(delta, delta_low, delta_high, max_ratio, anchor, k, sampled_token)

    def divergence(self, tokens: TokenStats) -> Float[Tensor, " N"]:
        return total_variation(*self.slots(tokens))


class TopKKL(TopKMask):
    """Top-K KL(mu || pi): the sum over S and the rest of mu_i log(mu_i / pi_i) (eq. 16). Arguments: ``TopKMask``."""

    def __init__(
        self,
        delta: float = 0.05,
        delta_low: float | None = None,
        delta_high: float | None = None,
        max_ratio: float | None = None,
        anchor: Anchor = "rollout",
        k: int = 20,
        sampled_token: SampledToken = "append",
    ) -> None:
        super().__init__(delta, delta_low, delta_high, max_ratio, anchor, k, sampled_token)

    def divergence(self, tokens: TokenStats) -> Float[Tensor, " N"]:
        return kl_divergence(*self.slots(tokens))


class FullMask(DivergenceMask):
    """Base of the divergences over the whole vocabulary: ``topk_logp`` has a column for every id, and no rest.

    mu is the trainer's own distribution when training on the rollout begins: it is rebuilt from the hidden states and
    the projection that were kept before the rollout's first step, in the trainer's precision. Where generation runs
    ahead (max_staleness > 0) it is not the policy that sampled: the region does not see that staleness. With a coarser
    engine (bf16 weights, fp32 trainer) this divergence shows how far training has moved the policy, not how far the
    engine was from the trainer; ratio and direction are still taken from the engine's own log mu of the sampled token.
    ``TopKTV`` and ``TopKKL`` compare with what the engine recorded.

    Args:
        delta: Threshold on the divergence, > 0.
        delta_low: Threshold for tokens with A < 0; ``delta`` when None.
        delta_high: Threshold for tokens with A > 0; ``delta`` when None.
        max_ratio: Cap C on the importance weight, > 0; None for no cap.
        anchor: Distribution to measure from, only "rollout".

    Raises:
        ConfigError: A threshold is not > 0, or the anchor is "recomputed".
    """

    needs: frozenset[str] = frozenset({"full"})

    def __init__(
        self,
        delta: float,
        delta_low: float | None = None,
        delta_high: float | None = None,
        max_ratio: float | None = None,
        anchor: Anchor = "rollout",
    ) -> None:
        super().__init__(delta, delta_low, delta_high, max_ratio, anchor)
        refuse_recomputed(self)


class FullTV(FullMask):
    """Total variation over the whole vocabulary: half the sum of |mu_i - pi_i|. Arguments: ``FullMask``."""

    def __init__(
        self,
        delta: float = 0.2,
        delta_low: float | None = None,
        delta_high: float | None = None,
        max_ratio: float | None = None,
        anchor: Anchor = "rollout",
    ) -> None:
        super().__init__(delta, delta_low, delta_high, max_ratio, anchor)

    def divergence(self, tokens: TokenStats) -> Float[Tensor, " N"]:
        return total_variation(*given_topk(tokens))


class FullKL(FullMask):
    """KL(mu || pi) over the whole vocabulary. Arguments: ``FullMask``."""

    def __init__(
        self,
        delta: float = 0.05,
        delta_low: float | None = None,
        delta_high: float | None = None,
        max_ratio: float | None = None,
        anchor: Anchor = "rollout",
    ) -> None:
        super().__init__(delta, delta_low, delta_high, max_ratio, anchor)

    def divergence(self, tokens: TokenStats) -> Float[Tensor, " N"]:
        return kl_divergence(*given_topk(tokens))


class PredictiveMask(TopKMask):
    """Predictive divergence mask (arXiv 2607.10848): stopped iff the step itself would increase the Top-K KL.

    M = 0 iff D > delta and A dot > 0, where dot = (pi_a - mu_a) + sum_S pi_i (mu_i - pi_i) is the derivative of
    KL(mu || pi) along the logit step that raises log pi_a. A common token can raise the divergence while its own
    probability moves back to mu, and the other way round: that is what the sampled token's A (r - 1) cannot see.

    Args:
        delta: Threshold on the Top-K KL, > 0.
        k: Number of ids that are asked of the rollout engine, >= 1.
        max_ratio: Cap C on the importance weight, > 0; None for no cap.

    Raises:
        ConfigError: A value is out of range.
    """

    def __init__(self, delta: float = 0.15, k: int = 20, max_ratio: float | None = 5.0) -> None:
        super().__init__(delta, max_ratio=max_ratio, k=k)

    def divergence(self, tokens: TokenStats) -> Float[Tensor, " N"]:
        return kl_divergence(*self.slots(tokens))

    def outward(self, tokens: TokenStats) -> Bool[Tensor, " N"]:
        pi, mu = (slots.exp() for slots in topk_slots(tokens, self.sampled_token))
        sampled = tokens.logp.exp() - tokens.rollout_logp.exp()
        return tokens.advantage.sign() * (sampled + (pi * (mu - pi)).sum(dim=-1)) > 0


def refuse_recomputed(region: DivergenceMask) -> None:
    """Raise ConfigError: only mu has a recorded distribution to compare with."""
    if region.anchor == "recomputed":
        raise ConfigError(
            f'{type(region).__name__}: anchor must be "rollout", only its distribution is recorded; '
            "use BinaryTV or BinaryKL to measure from the recomputed policy"
        )


def given_topk(tokens: TokenStats) -> tuple[Float[Tensor, "N S"], Float[Tensor, "N S"]]:
    """Log pi and log mu as they were given."""
    assert tokens.topk_logp is not None
    assert tokens.rollout_topk_logp is not None
    return tokens.topk_logp.detach(), tokens.rollout_topk_logp


def topk_slots(tokens: TokenStats, sampled_token: SampledToken) -> tuple[Float[Tensor, "N S"], Float[Tensor, "N S"]]:
    """Log pi and log mu over S, both -inf in a slot that is not used."""
    logp, rollout_logp = given_topk(tokens)
    used = rollout_logp > float("-inf")
    if sampled_token == "replace" and used.shape[1] > 1:
        dropped = torch.zeros_like(used)
        dropped[:, -2] = used[:, -1]
        used = used & ~dropped
    return logp.masked_fill(~used, float("-inf")), rollout_logp.masked_fill(~used, float("-inf"))


def with_rest_bucket(
    logp: Float[Tensor, "N S"], rollout_logp: Float[Tensor, "N S"]
) -> tuple[Float[Tensor, "N T"], Float[Tensor, "N T"]]:
    """Append the log of the probability that S leaves, at least 1e-12 on each side.

    A rest below 1e-7 is mostly the rounding of float32 log-probs, so a KL that depends on it is coarse.
    """

    def append(logs: Float[Tensor, "N S"]) -> Float[Tensor, "N T"]:
        # in float64: 1 - sum loses every digit of a small rest, while log-probs near 0 still have theirs
        rest = (1 - logs.double().exp().sum(dim=-1, keepdim=True)).clamp(min=REST_FLOOR)
        return torch.cat([logs, rest.log().to(logs.dtype)], dim=-1)

    return append(logp), append(rollout_logp)


def total_variation(logp: Float[Tensor, "N S"], rollout_logp: Float[Tensor, "N S"]) -> Float[Tensor, " N"]:
    """Half the sum of |mu_i - pi_i|."""
    return (rollout_logp.exp() - logp.exp()).abs().sum(dim=-1) / 2


def kl_divergence(logp: Float[Tensor, "N S"], rollout_logp: Float[Tensor, "N S"]) -> Float[Tensor, " N"]:
    """Sum of mu_i log(mu_i / pi_i), 0 where mu_i = 0; never below 0, where rounding could lead."""
    terms = rollout_logp.exp() * (rollout_logp - logp)
    return terms.masked_fill(torch.isneginf(rollout_logp), 0.0).sum(dim=-1).clamp(min=0)


DEFAULT_K = 20
"""Number of ids for a region that has no k of its own."""


def diagnostic_divergences(region: TrustRegion) -> dict[str, DivergenceMask]:
    """Divergences by name: binary <= Top-K <= full on every token, for TV and for KL (arXiv 2602.04879, App. B).

    They only measure, their thresholds stop nothing.

    Args:
        region: Trust region of the run; its own k is used where it has one.
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
