"""Trust regions that make a number that is not finite, in one optimizer step of a run, and what to look for then."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
import torch

from dppo_lightning.trust_region import BinaryTV, Surrogate
from dppo_lightning.trust_region.base import TokenStats

Fault = Literal["loss", "gradient", "weights"]


class Faulty(BinaryTV):
    """BinaryTV whose loss is NaN with a finite gradient, or whose gradient is infinite with a finite loss.

    Args:
        fault: What goes wrong while ``armed``.
    """

    def __init__(self, fault: Fault) -> None:
        super().__init__(0.002)
        self.fault = fault
        self.armed = False

    def forward(self, tokens: TokenStats) -> Surrogate:
        found = super().forward(tokens)
        extra = torch.zeros_like(tokens.logp)
        if self.armed and self.fault == "loss":
            extra = extra + float("nan")
        if self.armed and self.fault == "gradient":
            extra = (tokens.logp - tokens.logp.detach()).sqrt()
        return Surrogate(found.loss + extra, found.keep, found.divergence)


class Arms(pl.Callback):
    """Makes the fault of a ``Faulty`` region, or of the weights, happen in some steps, on one rank.

    Args:
        steps: Numbers of the optimizer steps.
        rank: The rank on which it happens.
    """

    def __init__(self, steps: tuple[int, ...] = (1,), rank: int = 0) -> None:
        self.steps = steps
        self.rank = rank

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        now = trainer.global_step in self.steps and trainer.global_rank == self.rank
        pl_module.region.armed = now
        if now and pl_module.region.fault == "weights":
            parameter = next(pl_module.policy.model.parameters())
            part = getattr(parameter, "ds_tensor", parameter)
            part = part.to_local() if hasattr(part, "to_local") else part
            part.data.view(-1)[0] = float("nan")
