"""Two training runs, each in a process of its own, that take their steps in turn.

A child reports every optimizer step on standard output, as a line that begins with ``STEP``, and waits for a line on
standard input before it begins the next. So neither disturbs the other's memory or threads, and a machine whose speed
drifts changes both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import DummyLogger

ROOT = Path(__file__).parents[1]
MARK = "STEP "


class Gate:
    """The child's side."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()

    def step_over(self, values: Mapping[str, float]) -> None:
        """Report a step, with the seconds since the one before was let go, and wait."""
        record = {"total": time.perf_counter() - self.begun, **values}
        print(MARK + json.dumps(record), flush=True)
        sys.stdin.readline()
        self.begun = time.perf_counter()


class GateLogger(DummyLogger):
    """A gate for ``dppo fit``: a step's metrics are logged when all of it is over, the weight update included."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:  # type: ignore[override]
        if "time/train" not in metrics:
            return
        names = {"generate": "time/generate", "reward": "time/reward", "train": "time/train", "sync": "time/sync"}
        values = {name: metrics.get(metric, 0.0) for name, metric in names.items()}
        self.gate.step_over(values | {"tokens": metrics["train/tokens"]})


class Gated:
    """The parent's side of one child."""

    def __init__(self, name: str, command: Sequence[str], threads: int, environment: Mapping[str, str] = {}) -> None:
        self.name = name
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed with the child
        own = {
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": str(threads),
        }
        self.child = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | own | dict(environment),
        )

    def report(self) -> dict[str, Any]:
        """The step that has just been taken.

        Raises:
            RuntimeError: The child ended without one.
        """
        assert self.child.stdout is not None
        for line in self.child.stdout:
            if line.startswith(MARK):
                return json.loads(line[len(MARK) :])
        self.errors.seek(0)
        raise RuntimeError(f"{self.name} ended with code {self.child.wait()}:\n{self.errors.read()[-3000:]}")

    def go(self) -> None:
        """Let it take the next step."""
        assert self.child.stdin is not None
        print("go", file=self.child.stdin, flush=True)

    def close(self) -> None:
        """End the child; after its last step it ends by itself."""
        if self.child.poll() is None:
            try:
                self.child.communicate("go\n", timeout=60)
            except subprocess.TimeoutExpired:
                self.child.kill()
        self.child.wait()
        self.errors.close()


def steps_in_turn(children: Sequence[Gated], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Each child's reports of ``rounds`` steps; one step more is taken first and not counted."""
    reports: dict[str, list[dict[str, Any]]] = {child.name: [] for child in children}
    for child in children:
        child.report()
    for _ in range(rounds):
        for child in children:
            child.go()
            reports[child.name].append(child.report())
    return reports
