"""HeldOutEvaluation: how good the policy is on prompts that it is not trained on, before, during and after training."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl


class HeldOutEvaluation(pl.Callback):
    """Evaluates before the first optimizer step and then every ``data.evaluate_every_n_steps``.

    Lightning itself evaluates once more at the end of the epoch, which is the whole run.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0:
            run_validation(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        every = trainer.datamodule.evaluate_every_n_steps  # type: ignore[attr-defined]
        if stepped and trainer.global_step % every == 0 and trainer.global_step < trainer.max_steps:
            run_validation(trainer)


def run_validation(trainer: pl.Trainer) -> None:
    """Run the trainer's validation loop between two training batches, as the fit loop itself does at its own times."""
    connector = trainer._logger_connector
    first_iteration = connector._first_loop_iter
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
    connector._first_loop_iter = first_iteration
