"""StepHooks: what DPPOModule does around an optimizer step, and what it optimises with unless it is told otherwise."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from dppo_lightning.scaling.sharding import StepNotTaken, as_sharding, gradient_norm, standing_still
from dppo_lightning.train.hooks import EvaluationHooks, ends_step
from dppo_lightning.train.metrics import StepLog
from dppo_lightning.train.nonfinite import NumberGuard


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """AdamW at a learning rate of 1e-6, without weight decay."""
    return torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0)


def constant(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """The optimizer's learning rate in every step."""
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)


class StepHooks(EvaluationHooks):
    """Optimizer, schedule, and the steps that are not taken.

    Args:
        optimizer: From parameters to an optimizer.
        lr_scheduler: From the optimizer to a schedule.
        guard: Sees to it that no step is taken with numbers that are not finite.

    Attributes:
        step_log: Time and values of the present optimizer step.
        policy: The policy that is trained.
    """

    policy: Any

    def __init__(self, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable, guard: NumberGuard) -> None:
        super().__init__()
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.guard = guard
        self.step_log = StepLog()
        self._as_loaded = True  # the policy has the weights of its folder
        self._last_micro_batch = False

    @property
    def data(self) -> Any:
        """The rollout data module of the run."""
        raise NotImplementedError

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer([p for p in self.policy.parameters() if p.requires_grad])
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_lr_scheduler(optimizer), "interval": "step"},
        }

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._as_loaded = False
        norm = gradient_norm(optimizer)
        self.step_log.values["train/grad_norm"] = norm
        self.step_log.values["train/learning_rate"] = optimizer.param_groups[0]["lr"]
        # DeepSpeed is asked for a step after every micro-batch, and takes one after the last
        if self._last_micro_batch and not self.guard.allows(self, norm):
            self.step_log.values["train/skipped"] = 1.0
            as_sharding(self.trainer.strategy).discard_step()

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """As Lightning's; a step without a token to train on leaves the weights where they are.

        Otherwise momentum and weight decay would move them by a gradient that is zero because there was nothing.
        """
        plan = self.data.plan
        assert plan is not None
        self._last_micro_batch = ends_step(self.trainer, batch_idx)
        try:
            with standing_still(optimizer) if plan.empty else nullcontext():
                super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        except StepNotTaken:
            return
        skipped = "train/skipped" in self.step_log.values
        if self._last_micro_batch and not skipped and as_sharding(self.trainer.strategy).step_was_dropped:
            self.step_log.values["train/skipped"] = 1.0
            self.guard.refuse(self, ["the norm of the gradient"])
