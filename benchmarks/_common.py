"""What the benchmarks share: rounds in turn, medians, peak memory, a table and a last line of JSON.

Candidates run in turn (A B C, A B C, ...) and ratios are taken within a round, so a machine whose speed drifts changes
the seconds and hardly the ratios. ``--clock cpu --threads 1`` counts processor time instead of time on the wall, which
other processes on the machine cannot stretch.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

Seconds = dict[str, list[float]]


def arguments(description: str, rounds: int = 5) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(
        description=description.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=rounds, help="counted rounds, after one that is not")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="what is counted as time")
    return parser


def need_peers() -> None:
    """End here, in one line, when what we are measured against is not installed."""
    if importlib.util.find_spec("trl") is None:
        sys.exit("TRL is not installed: install the bench extra, pip install 'dppo-lightning[bench]'")


def in_turn(candidates: Mapping[str, Callable[[], object]], rounds: int, clock: str = "wall") -> Seconds:
    """Seconds of each candidate in each round; one round more is run first and not counted."""
    now = time.perf_counter if clock == "wall" else time.process_time
    seconds: Seconds = {name: [] for name in candidates}
    for round_index in range(rounds + 1):
        for name, run in candidates.items():
            gc.collect()
            started = now()
            run()
            if round_index:
                seconds[name].append(now() - started)
    return seconds


def median(seconds: Seconds, name: str) -> float:
    return statistics.median(seconds[name])


def ratio(seconds: Seconds, name: str, other: str) -> float:
    """Median over the rounds of the one's time by the other's."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[other], strict=True))


def peak_extra_mb(run: Callable[[], object]) -> float:
    """How far the process's memory rises above where it was before ``run``, in MB; on a GPU the allocator's figure."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1e6


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return float(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def machine() -> str:
    """One line that names the machine."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    card = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    load = os.getloadavg()[0]
    return (
        f"{model}, {os.cpu_count()} cores{card}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"load before {load:.1f}"
    )


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Columns aligned for reading, in Markdown for the docs."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")


def print_result(values: Mapping[str, object]) -> None:
    """The last line: JSON, numbers to three significant digits."""
    rounded = {k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in values.items()}
    print(json.dumps(rounded))
