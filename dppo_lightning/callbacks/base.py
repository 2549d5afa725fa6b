"""RunCallback: a Lightning callback that also sees rollouts and tokens."""

from __future__ import annotations

import lightning.pytorch as pl

from dppo_lightning.batch import TrainingBatch
from dppo_lightning.head import HeadOutput
from dppo_lightning.records import Group


class RunCallback(pl.Callback):
    """Override what you need, Lightning's own hooks included."""

    def on_generation_progress(self, trainer: pl.Trainer, done: int, total: int) -> None:
        """Called now and then while a rollout is generated: completions finished, and asked for."""

    def on_rollout(self, trainer: pl.Trainer, pl_module: pl.LightningModule, groups: list[Group]) -> None:
        """Called with every training rollout before its first optimizer step; groups have advantages and their step."""

    def on_tokens(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: TrainingBatch, output: HeadOutput
    ) -> None:
        """Called with every micro-batch, after its forward pass: N tokens and what the head found of them.

        It runs in the training loop: work on the tensors, without a loop over tokens.
        """

    def on_step_values(self, trainer: pl.Trainer, pl_module: pl.LightningModule, values: dict[str, float]) -> None:
        """Called when an optimizer step is over, with what is about to be logged of it: add what you have to say.

        A name must be in metrics.GLOSSARY.
        """

    def on_heldout(self, trainer: pl.Trainer, pl_module: pl.LightningModule, groups: list[Group]) -> None:
        """Called with the rewarded completions of every held-out evaluation."""
