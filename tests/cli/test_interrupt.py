"""Ctrl-C ends a run soon, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from .runs import changed, recipe


def children(pid: int) -> set[int]:
    """Process ids of all that ``pid`` started, and of what those started."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found |= {int(child)} | children(int(child))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("staleness", [0, 2])
def test_ctrl_c_ends_a_run_within_ten_seconds_with_no_process_left(
    staleness: int, tiny_policy_dir: str, tmp_path: Path
) -> None:
    config = changed(
        recipe(tmp_path, tiny_policy_dir),
        trainer__max_steps=100_000,
        data__engine={"class_path": "dppo_lightning.rollout.vllm_embedded.VLLMEmbedded"},
        data__streaming={"max_staleness": staleness},
        data__evaluate_every_n_steps=100_000,
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "dppo_lightning", "fit", "--config", "recipe.yaml"]
    with (tmp_path / "output").open("w") as output:
        run = subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + 120
            while not (tmp_path / "run" / "completions.jsonl").exists():
                assert run.poll() is None, (tmp_path / "output").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            started = children(run.pid)
            assert started  # the engine, at least
            run.send_signal(signal.SIGINT)
            run.wait(timeout=10)
        finally:
            if run.poll() is None:
                os.kill(run.pid, signal.SIGKILL)
                run.wait()
    time.sleep(1)
    assert not [pid for pid in started if alive(pid)]
    assert (tmp_path / "run" / "metrics.csv").exists()
    assert (tmp_path / "run" / "curves.png").exists()
