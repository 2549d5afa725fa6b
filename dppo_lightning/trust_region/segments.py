"""Sums, means and prefix sums within the sequences of a packed batch."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dppo_lightning.trust_region.base import TokenStats, TokenStatsError


class Segments:
    """Which packed token is at which place of which sequence, whatever the order in which the tokens were given.

    Reductions go through a padded [S, T] table: each sequence is summed on its own, in the order of its positions and
    without atomics, so the result does not depend on the order of the tokens and repeats bit for bit on a GPU.

    Args:
        tokens: With ``sequence`` and ``position``, N tokens of S sequences, the longest of T tokens.

    Raises:
        TokenStatsError: ``sequence`` or ``position`` is missing.
    """

    def __init__(self, tokens: TokenStats) -> None:
        if tokens.sequence is None or tokens.position is None:
            raise TokenStatsError("a region over sequences needs sequence and position")
        self.row: Int[Tensor, " N"]
        self.length: Int[Tensor, " S"]
        _, self.row, self.length = torch.unique(tokens.sequence, return_inverse=True, return_counts=True)
        by_position = torch.argsort(tokens.position, stable=True)
        order = by_position[torch.argsort(self.row[by_position], stable=True)]
        starts = self.length.cumsum(0) - self.length
        self.column: Int[Tensor, " N"] = torch.empty_like(order)
        self.column[order] = torch.arange(len(order), device=order.device) - starts[self.row[order]]

    def table(self, values: Float[Tensor, " N"]) -> Float[Tensor, "S T"]:
        """The values by sequence and place, 0 after a sequence's end."""
        width = int(self.length.max()) if len(self.length) else 0
        padded = values.new_zeros(len(self.length), width)
        return padded.index_put((self.row, self.column), values)

    def spread(self, per_sequence: Float[Tensor, " S"]) -> Float[Tensor, " N"]:
        """Gives every token the value of its sequence."""
        return per_sequence[self.row]

    def mean(self, values: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Mean over each token's sequence."""
        return self.spread(self.table(values).sum(dim=1) / self.length)

    def max(self, values: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Greatest value in each token's sequence, at least 0."""
        table = self.table(values)
        return self.spread(table.amax(dim=1)) if table.numel() else values

    def prefix_sum(self, values: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Sum over the tokens before each one in its sequence."""
        table = self.table(values)
        return (table.cumsum(dim=1) - table)[self.row, self.column]
