"""Model FLOP utilisation: what a training step must compute, against the speed of a bare matrix product.

Counted, with P the parameters of the backbone's linear layers (embeddings are looked up, not multiplied):

    linear layers   2 P a token forward, 2 P for the gradient of their input, 2 P for that of the weights that train
    attention       4 heads d a layer and a pair of positions of which one sees the other, three times that with the
                    backward pass
    head            2 V H a generated token forward, 4 V H with both gradients

which is the 6 N + 12 L H Q T a token of PaLM (arXiv 2204.02311, appendix B; Kaplan et al., arXiv 2001.08361, section
2.1), except that T is counted exactly: only positions that are seen, each shared prompt once. Norms, activations,
softmax, the optimizer, padding and what gradient checkpointing computes twice are not counted: they are no model FLOPs.
Every layer counts as full attention.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor, nn

if TYPE_CHECKING:
    from dppo_lightning.batch import TrainingBatch
    from dppo_lightning.policy import Policy

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class ModelWork:
    """Floating-point operations of a model's forward and backward pass, by what goes through it.

    Attributes:
        token: Operations of a token forwarded, in the linear layers.
        pair: Operations of a pair of positions of which one sees the other, in the attention of all layers.
        generated: Operations of a generated token in the head, forward alone.
        gradient: Operations of a generated token in the head, for the gradients of hidden state and weight.
    """

    token: int
    pair: int
    generated: int
    gradient: int

    @classmethod
    def of(cls, policy: Policy) -> ModelWork | None:
        """Read a policy's shapes; None for a mixture of experts, where a token meets only some of the parameters."""
        config = policy.model.config.get_text_config()
        if any((getattr(config, name, None) or 1) > 1 for name in _EXPERTS):
            return None
        looked_up = {id(module.weight) for module in policy.modules() if isinstance(module, nn.Embedding)}
        head = policy.head.weight
        linear = [p for p in policy.parameters() if len(_shape(p)) == 2 and id(p) not in looked_up and p is not head]
        wide = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        size = _numel(head)
        return cls(
            token=sum((6 if p.requires_grad else 4) * _numel(p) for p in linear),
            pair=3 * 4 * config.num_hidden_layers * config.num_attention_heads * wide,
            generated=2 * size,
            gradient=(4 if head.requires_grad else 2) * size,
        )

    def flops(self, forwarded: float, pairs: float, generated: float, differentiated: float) -> float:
        """Operations of a step.

        Args:
            forwarded: Token ids that went through the model, without padding.
            pairs: See ``attended_pairs``.
            generated: Tokens that went through the head.
            differentiated: Of these, tokens with a gradient.
        """
        return self.token * forwarded + self.pair * pairs + self.generated * generated + self.gradient * differentiated


def attended_pairs(batch: TrainingBatch) -> Int[Tensor, ""]:
    """Number of (position, position that it sees, itself included) in a micro-batch, padding left out.

    A token at place p of its own sequence sees p + 1 positions, wherever in the row they lie.
    """
    if batch.position_ids is not None:
        return (batch.position_ids + 1).sum()
    rows, width = batch.input_ids.shape
    index = batch.predict_index
    lengths = index.new_zeros(rows).scatter_reduce(0, index // width, index % width + 1, "amax")
    return (lengths * (lengths + 1) // 2).sum()


def product_speed(dtype: torch.dtype, device: torch.device | str, seconds: float = 0.3) -> float:
    """Floating-point operations per second of a square matrix product, the median over ``seconds``."""
    device = torch.device(device)
    size = 1024 if device.type == "cpu" else 8192
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    room = torch.empty_like(left)
    taken: list[float] = []
    begun = time.perf_counter()
    while len(taken) < 4 or time.perf_counter() - begun < seconds:
        started = time.perf_counter()
        torch.mm(left, right, out=room)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        taken.append(time.perf_counter() - started)
    return 2 * size**3 / median(taken[1:])  # the first one loads what it needs


def _shape(parameter: Tensor) -> torch.Size:
    """Of the whole parameter, where ZeRO-3 holds a part."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _numel(parameter: Tensor) -> int:
    return _shape(parameter).numel()
