"""HeldOutEvaluation: how good the policy is on prompts that it is not trained on, before, during and after training."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from dppo_lightning.train.hooks import ends_step


class HeldOutEvaluation(pl.Callback):
    """Evaluate before the first optimizer step and then every ``data.evaluate_every_n_steps``.

    Lightning itself evaluates once more at the end of the epoch, which is the whole run.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0:
            run_validation(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = trainer.datamodule.evaluate_every_n_steps  # type: ignore[attr-defined]
        step = trainer.global_step
        if ends_step(trainer, batch_idx) and step % every == 0 and step < trainer.max_steps:
            run_validation(trainer)


def run_validation(trainer: pl.Trainer) -> None:
    """Run the trainer's validation loop between two training batches, as the fit loop itself does at its own times."""
    # The logger connector is private, and its ``_first_loop_iter`` says whether a hook runs inside a batch (a bool) or
    # between batches (None). The validation loop leaves None there. Lightning asserts a bool after each training batch:
    # without the old value the run ends in an AssertionError. Lightning's own fit loop puts it back in the same way.
    connector = trainer._logger_connector
    first_iteration = connector._first_loop_iter
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
    connector._first_loop_iter = first_iteration
