"""RunProgressBar: where the run is, how it goes, and how long it will take."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar

from dppo_lightning.callbacks.base import RunCallback


class RunProgressBar(TQDMProgressBar, RunCallback):
    """Lightning's bar, counting the whole run, and showing how far generation is while it lasts."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, int | str | float]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {name: f"{value:.3g}" if isinstance(value, float) else value for name, value in metrics.items()}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self.train_progress_bar.set_description("training")

    def on_generation_progress(self, trainer: pl.Trainer, done: int, total: int) -> None:
        if self.is_disabled or not trainer.training or not hasattr(self, "_train_progress_bar"):
            return
        text = "training" if done == total else f"generating {done}/{total}"
        if self._train_progress_bar is not None:
            self._train_progress_bar.set_description(text)
