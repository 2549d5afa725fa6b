"""A run that is killed goes on by one command, and what it leaves is that of a run that was never interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dppo_lightning.base.errors import Stopped
from dppo_lightning.run.cli import main
from dppo_lightning.train.hooks import RunCallback
from tests.helpers.killing import assert_equal, in_a_process, what_it_made
from tests.helpers.recipes import changed, recipe, run
from tests.helpers.rewards import score_at_once
from tests.helpers.short_runs import shortened

STEPS = 6
ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}


def settings(folder: Path, policy: str, **changes: Any) -> dict[str, Any]:
    """Six steps, four on a rollout, so that the checkpoints after three steps are within one."""
    return changed(
        recipe(folder, policy),
        **{
            "trainer__max_steps": STEPS,
            "model__optimizer": ADAMW,
            "data__steps_per_rollout": 4,
            "data__evaluate_every_n_steps": 3,
            **changes,
        },
    )


@pytest.fixture(scope="module")
def whole(tiny_policy_dir: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the run makes when nobody kills it."""
    folder = tmp_path_factory.mktemp("whole")
    run("fit", settings(folder, tiny_policy_dir), folder)
    return what_it_made(folder / "run")


@pytest.mark.parametrize(
    ("moment", "step", "goes_on_from"),
    [
        ("generation", 0, None),
        ("optimizer", 1, None),  # before the first checkpoint
        ("checkpoint", 3, None),
        ("evaluation", 3, None),
        ("batch", 3, "step=3.ckpt"),  # between two steps of one rollout
        ("generation", 4, "step=3.ckpt"),
        ("optimizer", 4, "step=3.ckpt"),
        ("evaluation", 6, "step=3.ckpt"),
        ("end", 6, "step=3.ckpt"),  # the last step is done, and its checkpoint is not there
    ],
)
def test_a_killed_run_goes_on(
    moment: str, step: int, goes_on_from: str | None, whole: dict[str, Any], tiny_policy_dir: str, tmp_path: Path
) -> None:
    killer = [{"class_path": "tests.helpers.killing.KillAt", "init_args": {"moment": moment, "step": step}}]
    config = settings(tmp_path, tiny_policy_dir, trainer__callbacks=killer)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
    assert in_a_process(["fit", "--config", "recipe.yaml"], tmp_path) == -9
    with shortened():
        main(["fit", "--resume", str(tmp_path / "run"), "--trainer.callbacks", "null"])
    assert_equal(what_it_made(tmp_path / "run"), whole)
    sessions = json.loads((tmp_path / "run" / "run.json").read_text())["sessions"]
    assert sessions[-1]["from_checkpoint"] == goes_on_from
    assert not list((tmp_path / "run").rglob(".unfinished*"))


class Break(RunCallback):
    """Ends the run, unsaved, when a step has been taken."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == self.after:
            raise Stopped("broken off", 1)


class ScoreAtOnce(RunCallback):
    """No process decides when a score is there: generation ahead goes on for just as long in every run."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        score_at_once(trainer.datamodule.stream)


AT_ONCE = {"class_path": f"{__name__}.ScoreAtOnce"}
CURRICULUM = {"class_path": "dppo_lightning.prompts.sampler.PassRateCurriculum"}
SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}}
LORA = {"class_path": "dppo_lightning.train.lora.LoRA", "init_args": {"rank": 4}}


@pytest.mark.parametrize(
    "changes",
    [
        {"data__steps_per_rollout": 1},
        {"data__steps_per_rollout": 1, "data__streaming": {"max_staleness": 1}},
        {"data__streaming": {"max_staleness": 4}},
        {"data__streaming": {"max_staleness": 4, "late": "drop", "partial": "discard"}},
        {"data__selection": {"resampling": 1.0}, "data__sampler": CURRICULUM},
        {"data__selection": {"resampling": 1.0}, "data__streaming": {"max_staleness": 4}, "data__sampler": CURRICULUM},
        {"model__optimizer": SGD, "data__steps_per_rollout": 2},
        {"model__lora": {"rank": 4}},
        {"model__trust_region": {"class_path": "FullTV"}, "model__kl": {"coefficient": 0.1}},
    ],
    ids=lambda changes: "-".join(key.split("__")[1] for key in changes),
)
def test_two_halves_are_the_whole(
    changes: dict[str, Any], tiny_policy_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {}
    for name in ("whole", "halves"):
        folder = tmp_path / name
        folder.mkdir()
        config = settings(folder, tiny_policy_dir, data__rewarding={"isolation": "none"}, **changes)
        if name == "halves":
            breaks = [AT_ONCE, {"class_path": f"{__name__}.Break", "init_args": {"after": 5}}]
            with pytest.raises(SystemExit):
                run("fit", changed(config, trainer__callbacks=breaks), folder)
            with shortened():
                main(["fit", "--resume", str(folder / "run"), f"--trainer.callbacks={json.dumps([AT_ONCE])}"])
            assert "the run goes on from" in capsys.readouterr().out
        else:
            run("fit", changed(config, trainer__callbacks=[AT_ONCE]), folder)
        made[name] = what_it_made(folder / "run")
    assert_equal(made["halves"], made["whole"])
