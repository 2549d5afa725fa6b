"""TimelineLog: what ran when, as a trace that Perfetto and Chrome's tracing page show."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from dppo_lightning.callbacks.base import RunCallback
from dppo_lightning.timeline import Lane, Span

LANES: tuple[Lane, ...] = ("generate", "reward", "wait", "train", "sync", "evaluate")


class TimelineLog(RunCallback):
    """Writes ``timeline.json`` in the run directory: a span for every group, reward, wait, micro-batch and sync.

    The format is Chrome's trace events, one a line in a list that is never closed, which its readers accept: so a run
    that is killed leaves a trace, too. Times are microseconds since the start of training.
    """

    def __init__(self) -> None:
        self._zero = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._zero = time.perf_counter()
        names = [
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": number, "args": {"name": lane}}
            for number, lane in enumerate(LANES)
        ]
        self._write(trainer, names, first=True)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._flush(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._flush(trainer)

    def _flush(self, trainer: pl.Trainer) -> None:
        spans = trainer.datamodule.timeline.take()  # type: ignore[attr-defined]
        self._write(trainer, [self._event(span) for span in spans])

    def _event(self, span: Span) -> dict[str, Any]:
        return {
            "name": span.lane,
            "ph": "X",
            "pid": 0,
            "tid": LANES.index(span.lane),
            "ts": round((span.start - self._zero) * 1e6),
            "dur": round((span.end - span.start) * 1e6),
            "args": {"step": span.step, "version": span.version},
        }

    def _write(self, trainer: pl.Trainer, events: list[dict[str, Any]], first: bool = False) -> None:
        if not trainer.is_global_zero:
            return
        path = Path(trainer.default_root_dir) / "timeline.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        begins = first and not path.exists()
        with path.open("a", encoding="utf-8") as file:
            file.write("[\n" * begins + "".join(json.dumps(event) + ",\n" for event in events))


def read_timeline(path: Path) -> list[dict[str, Any]]:
    """The events of a ``timeline.json``, also of an unfinished one; the last line may have been cut."""
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    return [json.loads(line.rstrip(",")) for line in lines if line.endswith(",")]
