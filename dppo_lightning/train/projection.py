"""Projection: hidden states become logits, one chunk of tokens at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dppo_lightning.sync.named_weights import full_copy
from dppo_lightning.train.logits import (
    LogitTransform,
    Tables,
    gather,
    product_dtype_of,
    sums_in_float32,
    unrounded_product,
)


class Projection(nn.Module):
    """A language model's output projection, with everything between its product and the logits that are sampled from.

    It holds the projection's own parameters (the same objects, so tied embeddings stay tied), and every use goes
    through a module call: hooks that gather sharded parameters fire for it.

    Args:
        projection: The model's output projection, ``weight`` [V, H] and optional ``bias`` [V].
        transform: Transform from its product to the logits that are sampled from.
        logits_mib: Memory of one chunk of fp32 logits, in MiB; a chunk holds at least one token. Two such tables are
            alive at a time; with bf16 products half a table more.
    """

    def __init__(self, projection: nn.Module, transform: LogitTransform, logits_mib: int = 64) -> None:
        super().__init__()
        self.weight: nn.Parameter = projection.weight  # type: ignore[assignment]
        self.bias: nn.Parameter | None = getattr(projection, "bias", None)
        self.transform = transform
        self.logits_mib = logits_mib
        self.rollout_weight: Tensor | None = None
        self.rollout_bias: Tensor | None = None

    @property
    def product_dtype(self) -> torch.dtype:
        """Dtype of the head's matrix products here and now: autocast's where it is on, else the weight's."""
        return product_dtype_of(self.weight)

    def remember_rollout(self) -> None:
        """Keep a copy of the projection as it is now, for regions that compare whole distributions ("full").

        In the dtype of the products, [V, H]: another one would round mu otherwise than pi, and a policy that has not
        moved would have a divergence.
        """
        self.rollout_weight = full_copy(self.weight).to(self.product_dtype)
        self.rollout_bias = None if self.bias is None else full_copy(self.bias)

    def rollout_state(self) -> dict[str, Tensor | None]:
        """Return the copies that ``remember_rollout`` keeps, for a checkpoint within a rollout."""
        return {"weight": self.rollout_weight, "bias": self.rollout_bias}

    def restore_rollout(self, state: dict[str, Tensor | None]) -> None:
        """Take up copies that ``rollout_state`` returned."""
        device = self.weight.device
        self.rollout_weight, self.rollout_bias = (
            None if copy is None else copy.to(device) for copy in (state["weight"], state["bias"])
        )

    def logp(self, hidden: Float[Tensor, "N H"], targets: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Compute the float32 log-probs of the targets, without gradient."""
        logp = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        weight = self.weight.to(self.product_dtype)
        for rows in self.chunks(len(hidden)):
            logits = self.logits(hidden[rows], weight, self.bias)
            logits.sub_(logits.amax(dim=-1, keepdim=True))
            sampled = gather(logits, targets[rows])
            logp[rows] = sampled - logits.exp_().sum(dim=-1).log()
        return logp

    @property
    def most_tokens(self) -> int:
        """Largest number of tokens in a chunk."""
        return max(1, (self.logits_mib << 20) // (4 * self.weight.shape[0]))

    def chunks(self, tokens: int) -> Iterator[slice]:
        """Cut tokens into slices of equal size, at most what the memory budget allows; no token, no slice.

        Equal, because every chunk costs a pass over the gradient of the whole weight, however few tokens it has.
        """
        most = self.most_tokens
        size = math.ceil(tokens / max(math.ceil(tokens / most), 1))
        return (slice(start, min(start + size, tokens)) for start in range(0, tokens, max(size, 1)))

    def logits(
        self,
        hidden: Float[Tensor, "n H"],
        weight: Float[Tensor, "V H"],
        bias: Float[Tensor, " V"] | None,
        tables: Tables | None = None,
    ) -> Float[Tensor, "n V"]:
        """Compute float32 logits of tokens, in ``tables`` if given; products are in the weight's dtype or autocast's.

        On the CPU a bf16 product is not rounded to bf16: rounded logits put the entropy of a token off by 3e-3 nats.
        The bias is added to float32, whatever the product was rounded to.
        """
        dtype, n = product_dtype_of(weight), len(hidden)
        if sums_in_float32(dtype, hidden.device):
            logits = unrounded_product(hidden, weight, None if tables is None else tables.logits[:n])
        else:
            out = None if tables is None else tables.product[:n]
            product = torch.mm(hidden.to(dtype), weight.to(dtype).t(), out=out)
            logits = product.float() if tables is None else tables.logits[:n]
            if tables is not None and dtype != torch.float32:
                logits.copy_(product)
        if bias is not None:
            logits += bias
        return self.transform.apply_(logits)
