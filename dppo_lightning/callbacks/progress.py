"""RunProgressBar: where the run is, how it goes, and how long it will take."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from dppo_lightning.callbacks.base import RunCallback


class RunProgressBar(TQDMProgressBar, RunCallback):
    """Lightning's bar, counting the whole run, and showing how far generation is while it lasts."""

    @property
    def total_train_batches(self) -> int:
        return int(self.trainer.num_training_batches)

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {name: f"{value:.3g}" if isinstance(value, float) else value for name, value in metrics.items()}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self.train_progress_bar.set_description("training")

    def init_validation_tqdm(self) -> Tqdm:
        bar = super().init_validation_tqdm()
        bar.disable = True  # one batch, which is generated in one go
        return bar

    def on_generation_progress(self, trainer: pl.Trainer, done: int, total: int) -> None:
        if self.is_disabled or not trainer.training or not hasattr(self, "_train_progress_bar"):
            return
        text = "training" if done == total else f"generating {done}/{total}"
        if self._train_progress_bar is not None:
            self._train_progress_bar.set_description(text)
