"""A signal stops a run between two steps, saved; a second one at once; and the run goes on as if neither had been."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dppo_lightning.base.errors import Stopped
from dppo_lightning.run.callbacks.stop import StopOnSignal
from dppo_lightning.run.cli import main
from dppo_lightning.train.hooks import RunCallback
from tests.helpers.killing import assert_equal, what_it_made
from tests.helpers.recipes import changed, recipe, run
from tests.helpers.short_runs import shortened


class Signal(RunCallback):
    """Sends this process a signal in a step, or while a rollout is generated.

    Args:
        number: Number of the signal.
        moment: "backward" or "generation".
        step: Optimizer steps taken then.
        times: How often it is sent.
    """

    def __init__(self, number: int, moment: str, step: int, times: int = 1) -> None:
        self.number = number
        self.moment = moment
        self.step = step
        self.times = times

    def _send(self, moment: str, trainer: Any) -> None:
        if moment == self.moment and trainer.global_step == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
            self.times = 0

    def on_before_backward(self, trainer: Any, *_: Any) -> None:
        self._send("backward", trainer)

    def on_generation_progress(self, trainer: Any, done: int, total: int) -> None:
        self._send("generation", trainer)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The signals as an interactive shell leaves them, whatever started the tests."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "moment", "saved_after", "code"),
    [
        (signal.SIGINT, "backward", 2, 130),
        (signal.SIGTERM, "backward", 2, 143),
        (signal.SIGTERM, "generation", 1, 143),  # the rollout is not waited for
    ],
)
def test_a_run_that_is_told_to_stop_is_saved_and_goes_on(
    number: int,
    moment: str,
    saved_after: int,
    code: int,
    tiny_policy_dir: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = changed(recipe(tmp_path, tiny_policy_dir), trainer__max_steps=3)
    arguments = {"number": int(number), "moment": moment, "step": 1}
    sender = [{"class_path": f"{__name__}.Signal", "init_args": arguments}]
    with pytest.raises(SystemExit) as stop:
        run("fit", changed(config, trainer__callbacks=sender), tmp_path)
    assert stop.value.code == code
    folder = tmp_path / "run"
    said = capsys.readouterr().out
    assert f"{signal.Signals(number).name}: the run is saved after this step" in said
    saved = folder / "checkpoints" / f"step={saved_after}.ckpt"
    assert f"saved after step {saved_after} in {saved}; go on with: dppo fit --resume {folder}" in said
    with shortened():
        main(["fit", "--resume", str(folder), "--trainer.callbacks=null"])
    whole = tmp_path / "whole"
    whole.mkdir()
    run("fit", changed(config, run_dir=str(whole / "run")), whole)
    assert_equal(what_it_made(folder), what_it_made(whole / "run"))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_second_signal_ends_the_run_at_once(
    tiny_policy_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"number": int(signal.SIGINT), "moment": "backward", "step": 1, "times": 2}
    sender = [{"class_path": f"{__name__}.Signal", "init_args": arguments}]
    with pytest.raises(SystemExit) as stop:
        run("fit", changed(recipe(tmp_path, tiny_policy_dir), trainer__callbacks=sender), tmp_path)
    assert stop.value.code == 130
    assert "SIGINT again: ended at once, without the step that was running" in capsys.readouterr().out
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_before_training_a_signal_ends_the_run_at_once() -> None:
    listener = StopOnSignal()
    listener.listen()
    try:
        with pytest.raises(Stopped, match="SIGTERM: ended before training began, nothing was saved"):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        listener.forget()


def test_a_signal_that_the_shell_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    listener = StopOnSignal()
    listener.listen()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) == listener._on_signal
    listener.forget()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
