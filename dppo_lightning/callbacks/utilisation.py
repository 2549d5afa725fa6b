"""Utilisation: how much of the machine's speed the training part of a step gets out of it."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor

from dppo_lightning.batch import TrainingBatch
from dppo_lightning.callbacks.base import RunCallback
from dppo_lightning.head import HeadOutput
from dppo_lightning.module import DPPOModule
from dppo_lightning.utilisation import ModelWork, attended_pairs, product_speed


class Utilisation(RunCallback):
    """Logs ``perf/flops_utilisation``: model FLOPs over ``time/train``, over the speed of a matrix product.

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
        self.work = ModelWork.of(pl_module.policy)
        with trainer.precision_plugin.forward_context():
            dtype = pl_module.policy.head.product_dtype
        self.speed = product_speed(dtype, pl_module.device)

    def on_tokens(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: TrainingBatch, output: HeadOutput
    ) -> None:
        assert isinstance(pl_module, DPPOModule)
        objective = pl_module.objective
        differentiated = output.keep & (batch.advantage != 0)  # the head leaves the others out
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
