"""MetricsFile: the logger of ``metrics.csv``, which survives a kill and goes on where a run goes on."""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from dppo_lightning.run.whole_files import append_text, write_text

METRICS = "metrics.csv"
"""Name of the file of metrics."""


class MetricsFile(Logger):
    """Write a row of comma-separated values for each step and each evaluation.

    A row is appended, whole and at once. The file is written anew when a metric appears for the first time, beside the
    old one, which it replaces when it is whole.

    Args:
        run_dir: Run directory.

    Attributes:
        rows: Number of rows that are in the file.
    """

    def __init__(self, run_dir: str | Path) -> None:
        super().__init__()
        self.path = Path(run_dir) / METRICS
        self.rows = 0
        self._columns: list[str] | None = None  # None before the first row of this process

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        """Run directory; Lightning writes ``config.yaml`` there."""
        return str(self.path.parent)

    def log_hyperparams(self, params: Mapping[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the settings are in ``config.yaml``."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {**{name: float(value) for name, value in metrics.items() if name != "epoch"}, "step": int(step or 0)}
        if self._columns is None:
            earlier = read_rows(self.path)
            self.rows, self._columns = len(earlier), list(earlier[0]) if earlier else []
        new = [name for name in row if name not in self._columns]
        if new:
            earlier = read_rows(self.path)
            self._columns = ["step", *sorted({*self._columns, *row} - {"step"})]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, csv_text(self._columns, [*earlier, row], header=True))
        else:
            append_text(self.path, csv_text(self._columns, [row]))
        self.rows += 1


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read the whole rows of a ``metrics.csv``, also of one that a kill has torn; none where there is no file."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    rows = csv.DictReader(io.StringIO(whole))
    return [row for row in rows if None not in row and None not in row.values()]


def cut_rows(path: Path, rows: int) -> None:
    """Keep the first ``rows`` rows of a ``metrics.csv``; with none the file is removed."""
    kept = read_rows(path)[:rows]
    if kept:
        write_text(path, csv_text(list(kept[0]), kept, header=True))
    else:
        path.unlink(missing_ok=True)


def csv_text(columns: list[str], rows: list[dict[str, Any]], header: bool = False) -> str:
    """Write rows as comma-separated values, with the header or without."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
