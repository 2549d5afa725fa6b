"""Combined: several regions at once."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.trust_region.base import Surrogate, TokenStats, TrustRegion, joint_needs, policy_gradient


class Combined(TrustRegion):
    """Combination that keeps a token iff every member does, and multiplies their weights, e.g. IcePop with BinaryTV.

    The importance ratio pi / mu enters once; a member's weight is its factor on its own ratio (1, or the part that a
    cap leaves). So IcePop with PPOClip(anchor="recomputed") weighs by (pi_old / mu) (pi / pi_old), as IcePop's paper
    does, and TruncatedIS with BinaryTV by min(r, C). The divergence is that of the first member that has one.

    Args:
        masks: Regions to combine, at least two, whose gradient is a constant weight times grad log pi.

    Raises:
        ConfigError: There are fewer than two members, one is differentiable in the ratio, or a full-vocabulary member
            is combined with one that needs a table too or whole sequences.
    """

    def __init__(self, masks: list[TrustRegion]) -> None:
        super().__init__()
        if len(masks) < 2:
            raise ConfigError(f"Combined: masks must name at least two regions, got {len(masks)}")
        for mask in masks:
            if not mask.composable:
                raise ConfigError(f"Combined: {type(mask).__name__} has no constant weight to multiply, use it alone")
        self.masks = nn.ModuleList(masks)
        self.needs = joint_needs(*masks)
        if {"topk", "full"} <= self.needs:
            raise ConfigError(
                "Combined: a Top-K and a full-vocabulary region cannot share one table, choose one of them"
            )
        self.scope = "sequence" if any(mask.scope == "sequence" for mask in masks) else "token"
        if self.scope == "sequence" and "full" in self.needs:
            raise ConfigError("Combined: a full-vocabulary region cannot be combined with one over sequences")
        widths = {mask.k for mask in masks if "topk" in mask.needs}
        if len(widths) > 1:
            raise ConfigError(f"Combined: all Top-K members must have the same k, got {sorted(widths)}")
        self.k = widths.pop() if widths else 0

    @property
    def members(self) -> list[TrustRegion]:
        """Combined regions, in order."""
        return [mask for mask in self.masks if isinstance(mask, TrustRegion)]

    def choose(self, tokens: TokenStats) -> Bool[Tensor, "N C"]:
        """Tokens that each member chooses, in columns."""
        chosen = [mask.choose(tokens) for mask in self.members if mask.choices]
        return torch.cat([one if one.ndim == 2 else one[:, None] for one in chosen], dim=1)

    @property
    def choices(self) -> int:
        return sum(mask.choices for mask in self.members)

    def _shared_out(self, tokens: TokenStats) -> list[TokenStats]:
        """Statistics for each member, with its own columns of ``chosen``."""
        given, place = [], 0
        for mask in self.members:
            mine = None
            if tokens.chosen is not None and mask.choices:
                mine = tokens.chosen[:, place : place + mask.choices]
                mine = mine if isinstance(mask, Combined) else mine.squeeze(1)
            given.append(replace(tokens, chosen=mine))
            place += mask.choices
        return given

    def forward(self, tokens: TokenStats) -> Surrogate:
        # forward, not a call: the statistics were checked for all members' needs already
        members = [mask.forward(mine) for mask, mine in zip(self.members, self._shared_out(tokens), strict=True)]
        log_ratio = tokens.logp.detach() - tokens.rollout_logp
        keep = torch.ones_like(log_ratio, dtype=torch.bool)
        weight = torch.ones_like(log_ratio)
        for mask, member in zip(self.members, members, strict=True):
            if member.weight is None:
                raise ConfigError(
                    f"Combined: {type(mask).__name__} returned no Surrogate.weight, use weighted_surrogate"
                )
            keep = keep & member.keep
            weight = weight * member.weight
        # in logs: a ratio that underflows meets a weight that overflows
        total = torch.where(weight == 1, log_ratio, log_ratio + weight.log()).exp()
        divergence = next((member.divergence for member in members if member.divergence is not None), None)
        return Surrogate(policy_gradient(tokens, total, keep), keep, divergence, weight)

    def describe(self) -> dict[str, str]:
        """Settings of each member under "<place>.<member>.<setting>", so that two of a kind stay apart."""
        names = [type(mask).__name__ for mask in self.members]
        described = {"region": f"Combined({', '.join(names)})"}
        for place, mask in enumerate(self.members, start=1):
            rows = {key: value for key, value in mask.describe().items() if key != "region"}
            described |= {f"{place}.{type(mask).__name__}.{key}": value for key, value in rows.items()}
        anchors = {anchor for mask in self.members for anchor in mask.describe()["anchor"].split(" and ")}
        return {**described, "anchor": " and ".join(name for name in ("rollout", "recomputed") if name in anchors)}
