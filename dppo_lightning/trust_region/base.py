"""TrustRegion: decides which tokens may still move, and how strongly. A small object that is given tensors."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dppo_lightning.base.errors import ConfigError, DPPOError

Anchor = Literal["rollout", "recomputed"]
"""Distribution to measure from: mu as the engine recorded it, or pi_old, the trainer's as training on it begins."""
Scope = Literal["token", "sequence"]


class TokenStatsError(DPPOError, ValueError):
    """The statistics given to a region are missing, of different lengths, or not finite."""


@dataclass(frozen=True)
class TokenStats:
    """Statistics of N generated tokens, packed: no padding, no mask. All probabilities are float32 logs.

    Half-precision tensors are cast to float32 here, so that no region ever exponentiates in bf16, where the spacing of
    numbers near 0.7 is 0.004. The rounding that bf16 already did to a log-prob cannot be undone: compute them in fp32.

    Attributes:
        logp: Log pi of the sampled token; carries the gradient.
        rollout_logp: Log mu, recorded by the engine when it sampled the token.
        advantage: Advantage of the token; may differ from token to token of one sequence.
        recomputed_logp: Log pi_old, recomputed by the trainer when training on the rollout begins, with the weights
            before its first optimizer step; only on request. Where generation runs ahead (max_staleness > 0) that is
            not the policy that sampled: rollout_logp sees that staleness, recomputed_logp does not.
        topk_logp: Log pi at mu's K most likely ids, most likely first; the last column is the sampled token.
            For a region that needs "full": log pi at every id, in any order, without a column for the sampled token.
        rollout_topk_logp: Log mu at the same ids; -inf marks an unused slot (the sampled token's own, when it is
            among the K already). With "full" mu is the trainer's own, recomputed when training on the rollout begins.
        entropy: Entropy of pi, in nats.
        age: Optimizer steps between the weights that sampled the token and those that it is trained at, >= 0.
        sequence: Index of each token's sequence.
        position: Place of the token in its completion, from 0.
        chosen: Whether the token is among those that the region's ``choose`` named; [N, C] for ``Combined`` with C
            members that choose.
    """

    logp: Float[Tensor, " N"]
    rollout_logp: Float[Tensor, " N"]
    advantage: Float[Tensor, " N"]
    recomputed_logp: Float[Tensor, " N"] | None = None
    topk_logp: Float[Tensor, "N K"] | None = None
    rollout_topk_logp: Float[Tensor, "N K"] | None = None
    entropy: Float[Tensor, " N"] | None = None
    age: Int[Tensor, " N"] | None = None
    sequence: Int[Tensor, " N"] | None = None
    position: Int[Tensor, " N"] | None = None
    chosen: Bool[Tensor, "N ..."] | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value.dtype in (torch.bfloat16, torch.float16):
                object.__setattr__(self, field.name, value.float())


@dataclass(frozen=True)
class Surrogate:
    """Losses that a region makes of the tokens.

    Attributes:
        loss: Loss to minimise, before aggregation; differentiable in ``logp``.
        keep: Tokens that still move, False where the region stopped the update.
        divergence: The region's own measure of how far each token has moved, or None.
        weight: Constant factor on the importance ratio in the gradient (1 where nothing is capped), which ``Combined``
            multiplies. None for a loss that is differentiable in the ratio.
    """

    loss: Float[Tensor, " N"]
    keep: Bool[Tensor, " N"]
    divergence: Float[Tensor, " N"] | None = None
    weight: Float[Tensor, " N"] | None = None


class TrustRegion(nn.Module):
    """Base of every region.

    Override ``forward``, and declare as class attributes what it reads:

    - ``needs``: of {"topk", "recomputed_logp", "entropy", "full", "age", "chosen"}; what is not needed is not computed.
    - ``k``: for a region that needs "topk", how many ids are asked of the rollout engine.
    - ``scope``: "token" when each token is judged alone (evaluated chunk by chunk inside the head), "sequence" when a
      token's fate depends on others of its sequence; then ``sequence`` and ``position`` are given. Never use a mean or
      a rank over all tokens that ``forward`` is given: they are a part of the step, and how large a part depends on
      micro-batches and ranks. What depends on the whole step is for ``choose``.
    - ``composable``: False when the loss is not ``weighted_surrogate``, so that ``Combined`` refuses it.

    ``__init__`` has to call ``super().__init__()``. Calling a region checks its statistics first (``check_tokens``), on
    every call: one reduction and one synchronisation. In training ``forward`` is called instead, and whether the
    numbers are finite is asked once for the whole optimizer step, see train/nonfinite.py: what is not finite must not
    end up in a loss that is.

    Args:
        anchor: Distribution that the region measures from: "rollout" (mu, what the engine recorded) or
            "recomputed" (pi_old, the trainer's policy when training on the rollout begins; see ``TokenStats``).

    Raises:
        ConfigError: The anchor is unknown.
    """

    needs: frozenset[str] = frozenset()
    scope: Scope = "token"
    k: int = 0
    composable: ClassVar[bool] = True

    def __init__(self, anchor: Anchor = "rollout") -> None:
        super().__init__()
        check_choice(self, "anchor", anchor, ("rollout", "recomputed"))
        self.anchor: Anchor = anchor
        if anchor == "recomputed":
            self.needs = self.needs | {"recomputed_logp"}

    def __call__(self, tokens: TokenStats) -> Surrogate:
        check_tokens(self, tokens)
        surrogate: Surrogate = super().__call__(tokens)
        check_surrogate(self, surrogate, tokens)
        return surrogate

    def forward(self, tokens: TokenStats) -> Surrogate:
        raise NotImplementedError

    def choose(self, tokens: TokenStats) -> Bool[Tensor, "N ..."]:
        """Choose some of an optimizer step's tokens, if the region needs "chosen"; ``forward`` gets them as ``chosen``.

        Called once before each optimizer step, without gradient, with every token of the step from all ranks and
        micro-batches: log-probs under the step's first weights, ``sequence`` and ``position``, and ``recomputed_logp``
        where needed. The order of the tokens depends on how the step was split, so the choice must not depend on it.
        Costs a forward pass of the step.
        """
        raise NotImplementedError

    @property
    def choices(self) -> int:
        """Number of columns of ``chosen`` that the region reads."""
        return int("chosen" in self.needs)

    def describe(self) -> dict[str, str]:
        """Name, thresholds and anchor for the start table and the run record."""
        settings = {
            key: _as_text(value)
            for key, value in vars(self).items()
            if not key.startswith("_")
            and key not in ("training", "anchor", "scope")
            and (value is None or isinstance(value, (int, float, str)))
        }
        return {"region": type(self).__name__, **settings, "anchor": self.anchor}


def _as_text(value: float | str | None) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else f"{value:g}"


def joint_needs(*regions: TrustRegion) -> frozenset[str]:
    """What at least one of several regions reads, see ``TrustRegion``."""
    return frozenset().union(*(region.needs for region in regions))


def check_given(region: TrustRegion, tokens: TokenStats) -> dict[str, Tensor]:
    """Refuse statistics that are not all there; nothing waits for the device.

    Returns:
        Name of each statistic that the region needs, and the statistic.

    Raises:
        TokenStatsError: A statistic that the region needs is missing, or tensors differ in length.
    """
    required = ["logp", "rollout_logp", "advantage"]
    required += ["topk_logp", "rollout_topk_logp"] if region.needs & {"topk", "full"} else []
    required += [name for name in ("recomputed_logp", "entropy", "age", "chosen") if name in region.needs]
    required += ["sequence", "position"] if region.scope == "sequence" else []
    given = {name: getattr(tokens, name) for name in (field.name for field in fields(tokens))}
    given = {name: tensor for name, tensor in given.items() if tensor is not None}
    name_of_region = type(region).__name__

    missing = [name for name in required if name not in given]
    if missing:
        raise TokenStatsError(f"{name_of_region} needs {', '.join(missing)}, which TokenStats does not have")

    lengths = {name: tensor.shape[0] if tensor.ndim else None for name, tensor in given.items()}
    odd = {name: length for name, length in lengths.items() if length != lengths["logp"]}
    if odd:
        raise TokenStatsError(f"{name_of_region}: logp has {lengths['logp']} tokens, but {odd}")
    if tokens.topk_logp is not None and tokens.rollout_topk_logp is not None:
        shapes = tuple(tokens.topk_logp.shape), tuple(tokens.rollout_topk_logp.shape)
        if shapes[0] != shapes[1] or len(shapes[0]) != 2:
            raise TokenStatsError(f"{name_of_region}: topk_logp is {shapes[0]}, rollout_topk_logp {shapes[1]}")
    return {name: given[name] for name in required}


def check_tokens(region: TrustRegion, tokens: TokenStats) -> None:
    """Refuse statistics that the region would silently turn into a wrong update.

    Raises:
        TokenStatsError: As ``check_given``; or a log-prob is not finite (in the top-K tensors -inf is allowed: it marks
            an unused slot).
    """
    needed, name_of_region = check_given(region, tokens), type(region).__name__
    floating = {name: tensor.detach() for name, tensor in needed.items() if tensor.is_floating_point()}
    if not all(tensor.numel() for tensor in floating.values()):
        return
    # amax and amin propagate NaN, so two reductions find any non-finite number without a temporary of the tensor's size
    extremes = [x.amax() if name.endswith("topk_logp") else x.amax() - x.amin() for name, x in floating.items()]
    if bool(torch.stack([x.float() for x in extremes]).lt(float("inf")).all()):
        return
    for name, tensor in floating.items():
        allowed = torch.isneginf(tensor) if name.endswith("topk_logp") else torch.zeros_like(tensor, dtype=torch.bool)
        bad = int((~torch.isfinite(tensor) & ~allowed).sum())
        if bad:
            raise TokenStatsError(f"{name_of_region}: {name} has {bad} of {tensor.numel()} values that are not finite")


def check_surrogate(region: TrustRegion, surrogate: Surrogate, tokens: TokenStats) -> None:
    """Refuse what is no Surrogate with one value for each token.

    Raises:
        TokenStatsError: ``forward`` returned something else, or a tensor of another shape or kind.
    """
    name, wanted = type(region).__name__, tuple(tokens.logp.shape)
    if not isinstance(surrogate, Surrogate):
        kind = type(surrogate).__name__
        raise TokenStatsError(f"{name}.forward returned a {kind}: return a Surrogate, weighted_surrogate makes one")
    for field in fields(surrogate):
        value = getattr(surrogate, field.name)
        if value is not None and tuple(value.shape) != wanted:
            raise TokenStatsError(
                f"{name}: {field.name} has the shape {tuple(value.shape)}: it must have one value for each of "
                f"{wanted[0]} tokens"
            )
    if surrogate.keep.dtype != torch.bool:
        raise TokenStatsError(f"{name}: keep is {surrogate.keep.dtype}: it must be bool, True where a token moves")


def concatenated(pieces: list[TokenStats]) -> TokenStats:
    """Join the tokens of several pieces, at least one, which all have the same statistics."""
    columns = {item.name: [getattr(piece, item.name) for piece in pieces] for item in fields(TokenStats)}
    joined: dict[str, Any] = {
        name: None if values[0] is None else torch.cat(values) for name, values in columns.items()
    }
    return TokenStats(**joined)


def anchor_logp(tokens: TokenStats, anchor: Anchor) -> Float[Tensor, " N"]:
    """Log-probs of the anchor distribution.

    Raises:
        TokenStatsError: The recomputed anchor is asked for and was not given; the other never takes its place silently.
    """
    if anchor == "rollout":
        return tokens.rollout_logp
    if tokens.recomputed_logp is None:
        raise TokenStatsError('anchor "recomputed" needs recomputed_logp, which was not given')
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


def weighted_surrogate(
    tokens: TokenStats,
    keep: Bool[Tensor, " N"] | None = None,
    divergence: Float[Tensor, " N"] | None = None,
    *,
    anchor: Anchor = "rollout",
    min_ratio: float | None = None,
    max_ratio: float | None = None,
) -> Surrogate:
    """Surrogate whose gradient is -A * ratio * keep * grad log pi, the ratio held constant and clamped.

    Args:
        tokens: Statistics of N tokens.
        keep: Tokens that still move, False where the update is stopped; None keeps all.
        divergence: Divergence of each token, put into the surrogate as it is.
        anchor: Denominator of the ratio.
        min_ratio: Floor on the ratio; None for no floor.
        max_ratio: Cap on the ratio; None for no cap.
    """
    ratio = (tokens.logp.detach() - anchor_logp(tokens, anchor)).exp()
    clamped = ratio if min_ratio is None and max_ratio is None else ratio.clamp(min_ratio, max_ratio)
    if keep is None:
        keep = torch.ones_like(ratio, dtype=torch.bool)
    # exactly 1 where nothing is clamped, and finite where the ratio underflows
    weight = torch.where(clamped == ratio, 1.0, clamped / ratio.clamp(min=torch.finfo(ratio.dtype).tiny))
    return Surrogate(policy_gradient(tokens, clamped, keep), keep, divergence, weight)


def within_bounds(
    tokens: TokenStats,
    anchor: Anchor,
    low: Float[Tensor, " N"] | float,
    high: Float[Tensor, " N"] | float,
) -> Bool[Tensor, " N"]:
    """Tokens inside PPO's one-sided clip: False iff A > 0 and ratio > high, or A < 0 and ratio < low (both strict)."""
    ratio = (tokens.logp.detach() - anchor_logp(tokens, anchor)).exp()
    return ~(((tokens.advantage > 0) & (ratio > high)) | ((tokens.advantage < 0) & (ratio < low)))


def moves_outward(tokens: TokenStats) -> Bool[Tensor, " N"]:
    """Tokens with A (r - 1) > 0: the update would take their probability further away from ``rollout_logp``."""
    # sign() first: the product of a tiny advantage and a tiny log-ratio underflows to 0
    return tokens.advantage.sign() * (tokens.logp.detach() - tokens.rollout_logp) > 0


def check_positive(owner: TrustRegion, **values: float | None) -> None:
    """Raise ConfigError for a threshold that is given and not > 0."""
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ConfigError(f"{type(owner).__name__}: {name} must be > 0, got {value}")


def check_choice(owner: TrustRegion, name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ConfigError for a word that is not one of the choices."""
    if value not in choices:
        known = ", ".join(f'"{choice}"' for choice in choices[:-1]) + f' or "{choices[-1]}"'
        raise ConfigError(f"{type(owner).__name__}: {name} must be {known}, got {value!r}")


def check_clip(owner: TrustRegion, epsilon_low: float, epsilon_high: float) -> None:
    """Raise ConfigError unless 0 < epsilon_low < 1 and epsilon_high > 0."""
    check_positive(owner, epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    if epsilon_low >= 1:
        raise ConfigError(f"{type(owner).__name__}: epsilon_low must be below 1, got {epsilon_low}")
