"""``--profile``: a trace of some optimizer steps in the run directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.run.callbacks.profile import Profile
from dppo_lightning.run.cli import DPPOCommandLine
from tests.helpers.places import ROOT
from tests.helpers.runs import fit

RECIPE = ROOT / "configs" / "quickstart.yaml"


def test_a_trace_holds_the_steps_after_two(tiny_policy_dir: str, tmp_path: Path) -> None:
    fit(
        tiny_policy_dir,
        callbacks=[Profile(2)],
        max_steps=5,
        accumulate_grad_batches=2,
        default_root_dir=str(tmp_path),
    )
    trace = json.loads((tmp_path / "profile.json").read_text())
    names = [event["name"] for event in trace["traceEvents"] if "name" in event]
    assert [f"ProfilerStep#{step}" for step in (2, 3)] == sorted({n for n in names if n.startswith("ProfilerStep#")})
    assert names.count("_GradientInForward") == 2 * 2  # forward passes of the head: two micro-batches a step
    assert any("Optimizer.step" in name for name in names)


def test_a_run_that_is_too_short_is_refused_before_it_begins(tiny_policy_dir: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"after 2 others, and 3 are left: set trainer\.max_steps to at least 4"):
        fit(tiny_policy_dir, callbacks=[Profile(2)], max_steps=3, default_root_dir=str(tmp_path))
    assert not (tmp_path / "profile.json").exists()


def test_a_run_that_fails_leaves_no_profiler_running(tiny_policy_dir: str, tmp_path: Path) -> None:
    profile = Profile(1)
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(tiny_policy_dir, callbacks=[profile, Failing()], max_steps=3, default_root_dir=str(tmp_path))
    assert profile.running is None
    with torch.profiler.profile():  # there can be one at a time
        torch.ones(1)


class Failing(Profile):
    """Fails in the third step."""

    def __init__(self) -> None:
        super().__init__(1)

    def on_train_start(self, trainer: object, pl_module: object) -> None: ...

    def on_train_batch_end(self, trainer: object, pl_module: object, outputs: object, batch: object, i: int) -> None:
        if i == 1:
            raise RuntimeError("on purpose")


@pytest.mark.parametrize("steps", ["0", "-1", "3"])
def test_the_command_line_takes_a_number_of_steps(steps: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DPPOCommandLine, "_run_subcommand", lambda self, name: None)
    arguments = ["fit", "--config", str(RECIPE), "--profile", steps]
    if steps == "-1":
        with pytest.raises(ConfigError, match="--profile must be a number of optimizer steps, at least 1, got -1"):
            DPPOCommandLine(arguments)
        return
    callbacks = DPPOCommandLine(arguments).trainer.callbacks
    assert [callback.steps for callback in callbacks if isinstance(callback, Profile)] == [3] * (steps == "3")
