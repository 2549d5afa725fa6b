"""A run that is told to stop saves itself after its step, queues its job again, and goes on as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment

from dppo_lightning.run.slurm.job import Requeue, SlurmRun, started_again
from tests.helpers.recipes import changed, recipe, refused, run
from tests.helpers.run_files import read_rows
from tests.helpers.slurm_jobs import ONE_TASK

JOB = ONE_TASK | {
    "SLURM_JOB_ID": "77",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NODELIST": "n1",
}
STEPS = 4


class SignalDuringStep(pl.Callback):
    """Sends this process what SLURM sends, in the middle of the second step's first micro-batch."""

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        if trainer.global_step == 1 and "SLURM_RESTART_COUNT" not in os.environ:
            os.kill(os.getpid(), signal.SIGUSR1)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Environment of a job's only task; the file gets what scontrol is called with."""
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    called = tmp_path / "scontrol.called"
    fake = tmp_path / "scontrol"
    fake.write_text(f'#!/bin/sh\necho "$@" >> {called}\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    yield called
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def config(tmp_path: Path, tiny_policy_dir: str) -> dict[str, Any]:
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}
    callbacks = [{"class_path": f"{__name__}.SignalDuringStep"}]
    return changed(
        recipe(tmp_path, tiny_policy_dir),
        trainer__max_steps=STEPS,
        trainer__accumulate_grad_batches=2,
        trainer__callbacks=callbacks,
        model__optimizer=optimizer,
    )


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    (saved,) = (run_dir / "checkpoints").glob(f"step={STEPS}*.ckpt")
    return torch.load(saved, weights_only=False)["state_dict"]


def rows(path: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in read_rows(path)]


def test_the_run_goes_on_to_the_same_weights_and_the_same_record(
    config: dict[str, Any],
    tmp_path: Path,
    job: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run("fit", config, tmp_path)  # ends without SystemExit: exit code 0
    said = capsys.readouterr().out
    folder = tmp_path / "run"
    assert f"saved after step 2 in {folder / 'checkpoints' / 'step=2.ckpt'}; job 77 is queued again" in said
    assert "SLURM job 77: on SIGUSR1 the run is saved" in said
    assert job.read_text() == "requeue 77\n"
    assert [int(row["step"]) for row in rows(folder / "metrics.csv") if row["train/reward"]] == [0, 1]
    assert [path.name for path in (folder / "checkpoints").glob("step=*.ckpt")] == ["step=2.ckpt"]

    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run("fit", config, tmp_path)
    assert "the run goes on from" in capsys.readouterr().out

    whole = tmp_path / "whole"
    whole.mkdir()
    run("fit", changed(config, run_dir=str(whole)), tmp_path)
    expected = weights(whole)
    for name, weight in weights(folder).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0, msg=name)
    for name in ("completions.jsonl", "heldout.jsonl"):
        assert (folder / name).read_text() == (whole / name).read_text()
    assert rows(folder / "metrics.csv") == rows(whole / "metrics.csv")


def test_a_job_that_cannot_be_queued_again_says_so(
    config: dict[str, Any], tmp_path: Path, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho Requested operation is presently disabled >&2\nexit 1\n")
    line = refused(capsys, "fit", config, tmp_path)
    assert "step=2.ckpt" in line
    assert "`scontrol requeue 77` failed (Requested operation is presently disabled)" in line
    assert "#SBATCH --requeue" in line
    assert (tmp_path / "run" / "checkpoints" / "step=2.ckpt").is_file()


def test_a_second_job_does_not_continue_the_first_ones_run(
    config: dict[str, Any], tmp_path: Path, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("fit", config, tmp_path)
    assert "already holds a run" in refused(capsys, "fit", config, tmp_path)


def test_the_signal_leaves_processes_that_the_run_starts_alone(job: Path) -> None:
    callback = Requeue()
    callback.listen()
    assert not callback.requested()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.send_signal(signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        child.stdin.write(b"still here\n")
        child.stdin.close()
        assert child.stdout.read() == b"still here\n"
    assert callback.requested()
    assert callback.requested()


def test_a_job_that_slurm_starts_again_without_a_checkpoint_begins_anew(
    config: dict[str, Any],
    tmp_path: Path,
    job: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("left: behind\n")
    (folder / "completions.jsonl").write_text('{"torn')
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run("fit", changed(config, trainer__callbacks=None), tmp_path)
    assert f"the run begins anew; earlier files are in {folder / 'before' / '0'}" in capsys.readouterr().out
    assert (folder / "before" / "0" / "completions.jsonl").read_text() == '{"torn'
    assert len(rows(folder / "metrics.csv")) == STEPS + 2


def test_a_job_knows_that_it_was_started_before() -> None:
    assert started_again({"SLURM_RESTART_COUNT": "2"})
    assert not started_again({"SLURM_RESTART_COUNT": "0"})
    assert not started_again({})


def test_a_recipe_that_brings_its_own_wins(job: Path) -> None:
    slurm = SlurmRun(os.environ)
    assert slurm.callbacks([Requeue()]) == []
    mine = LightningEnvironment()
    assert slurm.plugins([mine]) == [mine]
    (added,) = slurm.plugins(None) or []
    assert isinstance(added, SLURMEnvironment)
    assert not added.auto_requeue
