"""Curves: the picture of a run, drawn from its own metrics.csv."""

from __future__ import annotations

import logging
from pathlib import Path

import lightning.pytorch as pl

from dppo_lightning.base.errors import one_line
from dppo_lightning.run.metrics_file import read_rows

log = logging.getLogger(__name__)

PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("reward", ("train/reward", "heldout/reward")),
    ("masked share, by sign of advantage", ("train/masked_share_positive", "train/masked_share_negative")),
    ("mean |pi - mu|", ("train/mismatch_tv",)),
    ("entropy (nats)", ("train/entropy",)),
    ("completion length (tokens)", ("train/length", "heldout/length")),
    ("seconds per step", ("time/generate", "time/train", "time/sync")),
)
"""Title of each panel, and the metrics drawn in it."""


class Curves(pl.Callback):
    """Draw ``curves.png`` in the run directory when training ends, also after an interruption."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._draw(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        try:
            self._draw(trainer)
        except (OSError, ValueError) as error:  # a full disk, say: what ends the run is to be heard, not this
            log.warning(f"curves.png could not be drawn: {one_line(error)}")

    def _draw(self, trainer: pl.Trainer) -> None:
        run = Path(trainer.default_root_dir)
        if trainer.is_global_zero and (run / "metrics.csv").is_file():
            draw_curves(read_metrics(run / "metrics.csv"), run / "curves.png", title=run.name)


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Read a run's metrics.csv into {name: [(optimizer step, value), ...]}."""
    series: dict[str, list[tuple[int, float]]] = {}
    for row in read_rows(path):
        for name, value in row.items():
            if name != "step" and value:
                series.setdefault(name, []).append((int(row["step"]), float(value)))
    return series


def draw_curves(series: dict[str, list[tuple[int, float]]], path: Path, title: str) -> None:
    """Draw the panels into the PNG file ``path``, with ``title`` above them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(15, 7.5), constrained_layout=True)
    for axis, (name, metrics) in zip(axes.flat, PANELS, strict=True):
        for metric in metrics:
            points = series.get(metric, [])
            marker = "o" if metric.startswith("heldout/") else None
            axis.plot([x for x, _ in points], [y for _, y in points], label=metric, marker=marker)
        axis.set_title(name)
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
