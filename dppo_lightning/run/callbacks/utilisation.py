"""Utilisation: the model FLOPs of a training step, against the speed of a bare matrix product.

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

import lightning.pytorch as pl
import torch
from jaxtyping import Int
from torch import Tensor, nn

from dppo_lightning.base.batch import TrainingBatch
from dppo_lightning.train.head import HeadOutput
from dppo_lightning.train.hooks import RunCallback
from dppo_lightning.train.module import DPPOModule
from dppo_lightning.train.policy import Policy

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Names that transformers' configs have for the number of experts in a layer."""


class Utilisation(RunCallback):
    """Log ``perf/flops_utilisation``: model FLOPs over ``time/train``, over the speed of a matrix product.

    The product is timed once, when training starts, on this rank's device and in the dtype of training. Nothing is
    logged for a mixture of experts.
    """

    def __init__(self) -> None:
        self.work: ModelWork | None = None
        self.speed = 0.0
        self.counts: Tensor | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, DPPOModule)
        assert pl_module.policy is not None
        self.work = ModelWork.from_policy(pl_module.policy)
        with trainer.precision_plugin.forward_context():
            dtype = pl_module.policy.head.product_dtype
        self.speed = product_speed(dtype, pl_module.device)

    def on_tokens(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: TrainingBatch, output: HeadOutput
    ) -> None:
        assert isinstance(pl_module, DPPOModule)
        objective = pl_module.objective
        differentiated = output.keep & (batch.advantage != 0)  # the head computes no gradient of the others
        if objective.entropy_coefficient > 0 or (output.kl is not None and objective.kl.where == "loss"):
            differentiated = torch.ones_like(output.keep)
        pairs = attended_pairs(batch)
        counts = torch.stack(
            [pairs.new_tensor(batch.real_tokens), pairs, pairs.new_tensor(batch.tokens), differentiated.sum()]
        )
        self.counts = counts if self.counts is None else self.counts + counts

    def on_step_values(self, trainer: pl.Trainer, pl_module: pl.LightningModule, values: dict[str, float]) -> None:
        if self.work is not None and self.counts is not None:
            flops = self.work.flops(*self.counts.tolist())
            values["perf/flops_utilisation"] = flops / values["time/train"] / self.speed
        self.counts = None


@dataclass(frozen=True)
class ModelWork:
    """Floating-point operations of a model's forward and backward pass, by what goes through it.

    Attributes:
        token: Operations for each token forwarded, in the linear layers.
        pair: Operations for each pair of positions of which one sees the other, in the attention of all layers.
        generated: Operations for each generated token in the head, forward alone.
        gradient: Operations for each generated token in the head, for the gradients of hidden state and weight.
    """

    token: int
    pair: int
    generated: int
    gradient: int

    @classmethod
    def from_policy(cls, policy: Policy) -> ModelWork | None:
        """Read a policy's shapes; None for a mixture of experts, where a token meets only some of the parameters."""
        config = policy.model.config.get_text_config()
        if any((getattr(config, name, None) or 1) > 1 for name in EXPERT_COUNTS):
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
        """Floating-point operations of a step.

        Args:
            forwarded: Number of token ids that went through the model, without padding.
            pairs: Number of pairs of positions, see ``attended_pairs``.
            generated: Number of tokens that went through the head.
            differentiated: Number of these tokens that have a gradient.
        """
        return self.token * forwarded + self.pair * pairs + self.generated * generated + self.gradient * differentiated


def attended_pairs(batch: TrainingBatch) -> Int[Tensor, ""]:
    """Number of pairs (position, position that it sees, itself included) in a micro-batch, padding left out.

    A token at place p of its own sequence sees p + 1 positions, wherever in the row they lie.
    """
    if batch.position_ids is not None:
        return (batch.position_ids + 1).sum()
    rows, width = batch.input_ids.shape
    index = batch.predict_index
    lengths = index.new_zeros(rows).scatter_reduce(0, index // width, index % width + 1, "amax")
    return (lengths * (lengths + 1) // 2).sum()


def product_speed(dtype: torch.dtype, device: torch.device | str, seconds: float = 0.3) -> float:
    """Floating-point operations per second of a square matrix product, the median over ``seconds`` seconds."""
    device = torch.device(device)
    size = 1024 if device.type == "cpu" else 8192
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    result = torch.empty_like(left)
    durations: list[float] = []
    first = time.perf_counter()
    while len(durations) < 4 or time.perf_counter() - first < seconds:
        started = time.perf_counter()
        torch.mm(left, right, out=result)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        durations.append(time.perf_counter() - started)
    return 2 * size**3 / median(durations[1:])  # the first product also loads its kernel


def _shape(parameter: Tensor) -> torch.Size:
    """Shape of the whole parameter: under ZeRO-3 this rank holds a part of it, and DeepSpeed notes the whole shape."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _numel(parameter: Tensor) -> int:
    return _shape(parameter).numel()
