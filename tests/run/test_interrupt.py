"""Ctrl-C and SIGTERM end a run, and leave no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.processes import PATIENCE, children, take_signals, wait_until, wait_until_gone
from tests.helpers.recipes import changed, recipe


def in_the_background() -> None:
    """What a shell that is not interactive does to ``command &``."""
    take_signals()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def a_run(folder: Path, policy: str, signals: Callable[[], None], **changes: Any) -> Iterator[subprocess.Popen[bytes]]:
    """``dppo fit`` without end, with vLLM, once its first rollout has come; afterwards nothing of it is left."""
    config = changed(
        recipe(folder, policy),
        trainer__max_steps=100_000,
        data__engine={"class_path": "dppo_lightning.generate.VLLMEmbedded"},
        data__evaluate_every_n_steps=100_000,
        **changes,
    )
    (folder / "recipe.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "dppo_lightning", "fit", "--config", "recipe.yaml"]
    temporary = folder / "temporary"
    temporary.mkdir()
    with (folder / "output").open("w") as output:
        run = subprocess.Popen(
            command,
            cwd=folder,
            stdout=output,
            stderr=output,
            env=os.environ | {"TMPDIR": str(temporary)},
            preexec_fn=signals,
        )
    try:
        wait_until(lambda: rollouts(folder) or run.poll() is not None, 120)
        assert run.poll() is None, (folder / "output").read_text()
        started = children(run.pid)
        assert started  # the engine, at least
        yield run
        run.wait(timeout=PATIENCE)
    finally:
        if run.poll() is None:
            os.kill(run.pid, signal.SIGKILL)
            run.wait()
    wait_until_gone(*started)
    wait_until(lambda: not list(temporary.iterdir()))


def rollouts(folder: Path) -> int:
    """Lines of the record of completions."""
    path = folder / "run" / "completions.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize("staleness", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_ctrl_c_ends_a_run_with_its_record_written_and_no_process_left(
    staleness: int, tiny_policy_dir: str, tmp_path: Path
) -> None:
    with a_run(tmp_path, tiny_policy_dir, take_signals, data__streaming={"max_staleness": staleness}) as run:
        run.send_signal(signal.SIGINT)
    assert run.returncode == 130
    assert (tmp_path / "run" / "metrics.csv").exists()
    assert (tmp_path / "run" / "curves.png").exists()
    assert "go on with: dppo fit --resume " in (tmp_path / "output").read_text()
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


def test_a_run_in_the_background_ignores_ctrl_c_as_its_shell_says_and_sigterm_ends_it(
    tiny_policy_dir: str, tmp_path: Path
) -> None:
    with a_run(tmp_path, tiny_policy_dir, in_the_background, data__streaming={"max_staleness": 2}) as run:
        run.send_signal(signal.SIGINT)
        before = rollouts(tmp_path)
        wait_until(lambda: rollouts(tmp_path) > before + 8)  # several steps later
        run.send_signal(signal.SIGTERM)
    assert run.returncode == 143
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    assert "Traceback" not in (tmp_path / "output").read_text()
