"""MetricsFile: metrics.csv, which a continued run goes on with."""

from __future__ import annotations

import csv
from pathlib import Path

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter


class MetricsFile(CSVLogger):
    """Lightning's CSVLogger, except that it keeps the rows that a directory holds already: Lightning deletes them."""

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is not None:
            return super().experiment
        path = Path(self.log_dir) / ExperimentWriter.NAME_METRICS_FILE
        earlier = path.read_text(encoding="utf-8") if path.is_file() else ""
        writer: ExperimentWriter = super().experiment
        if earlier:
            path.write_text(earlier, encoding="utf-8")
            writer.metrics_keys = next(csv.reader(earlier.splitlines()))
        return writer
