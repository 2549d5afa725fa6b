"""Files that a run reads and writes: rows of JSON, and the metrics as CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_jsonl(path: Path, rows: Iterable[Any]) -> str:
    """Write one line of JSON for each row, and return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_jsonl(path: Path) -> list[Any]:
    """Rows of a file with one line of JSON for each."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a file of comma-separated values, by column."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_metrics(path: Path) -> dict[str, list[float]]:
    """Columns of a run's metrics.csv, without their gaps."""
    rows = read_rows(path)
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}
