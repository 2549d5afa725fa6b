"""Keys in the environment and in the configuration of a run are found nowhere afterwards, and nowhere while it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import yaml

from dppo_lightning.generate.vllm.server import hold_port
from dppo_lightning.reward.base import Sample
from tests.helpers.places import ROOT
from tests.helpers.processes import children
from tests.helpers.recipes import changed, recipe, refused
from tests.helpers.rewards import ShareOf

ENVIRONMENT = {
    "DPPO_API_KEY": "canary-dppo-0123",
    "HF_TOKEN": "canary-hf-0123",
    "WANDB_API_KEY": "canary-wandb-0123",
    "MY_SECRET": "canary-mine-0123",
}


class Keyed(ShareOf):
    """Needs a key, and may say it when it fails."""

    def __init__(self, api_key: str, password: str | None = None, fails: bool = False) -> None:
        super().__init__()
        self.api_key = api_key
        self.fails = fails

    def score(self, samples: Sequence[Sample]) -> list[float]:
        if self.fails:
            raise ValueError(f"401 for the key {self.api_key} and {os.environ['HF_TOKEN']}")
        return super().score(samples)


class Looks(pl.Callback):
    """Writes down the command lines of this process's children while training is under way."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            lines = [Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0") for pid in children(os.getpid())]
            Path("children.json").write_text(json.dumps(lines))


def start(folder: Path, policy: str, *options: str, **changes: Any) -> subprocess.CompletedProcess[str]:
    (folder / "work").mkdir()
    keys = {"api_key": "canary-reward-0123", "password": "canary-word-0123"}
    settings = {
        "data__reward": {"class_path": f"{__name__}.Keyed", "init_args": keys},
        "trainer__callbacks": [{"class_path": f"{__name__}.Looks"}],
    }
    config = changed(recipe(folder, policy), **settings | changes)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "dppo_lightning", "fit", "--config", str(folder / "recipe.yaml"), *options]
    with hold_port() as port:  # where ranks meet; Lightning would take one that is free at the moment
        environment = os.environ | ENVIRONMENT
        environment |= {"PYTHONPATH": str(ROOT), "MASTER_PORT": str(port.getsockname()[1])}
        return subprocess.run(
            command, cwd=folder / "work", env=environment, text=True, capture_output=True, timeout=240, check=False
        )


def canaries_in(place: Path) -> list[str]:
    files = [path for path in place.rglob("*") if path.is_file()]
    assert files
    return [f"{path}: canary" for path in files if b"canary" in path.read_bytes()]


def test_a_run_leaves_no_key_anywhere(tiny_policy_dir: str, tmp_path: Path) -> None:
    run = start(tmp_path, tiny_policy_dir, trainer__devices=2, trainer__strategy="ddp")
    assert run.returncode == 0, run.stderr
    assert "canary" not in run.stdout + run.stderr
    assert canaries_in(tmp_path / "run") == []
    lines = json.loads((tmp_path / "work" / "children.json").read_text())
    assert any("fit" in line for line in lines)  # the other rank
    assert "canary" not in json.dumps(lines)
    reward = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["reward"]["init_args"]
    assert reward["api_key"] == "***"  # may not be null


def test_a_key_on_the_command_line_is_not_recorded(tiny_policy_dir: str, tmp_path: Path) -> None:
    run = start(tmp_path, tiny_policy_dir, "--data.reward.init_args.api_key=canary-line-0123")
    assert run.returncode == 0, run.stderr
    assert "canary" not in run.stdout + run.stderr
    assert "a secret on the command line is seen by all on this machine" in run.stdout
    assert canaries_in(tmp_path / "run") == []
    command = json.loads((tmp_path / "run" / "run.json").read_text())["sessions"][0]["command"]
    assert command[-1] == "--data.reward.init_args.api_key=***"


def test_an_error_does_not_say_a_key(tiny_policy_dir: str, tmp_path: Path) -> None:
    run = start(tmp_path, tiny_policy_dir, "--data.reward.init_args.fails=true", "--data.rewarding.isolation=none")
    assert run.returncode != 0
    assert "401 for the key *** and ***" in run.stderr
    assert "canary" not in run.stdout + run.stderr


def test_a_setting_that_is_refused_does_not_show_the_key_beside_it(
    tiny_policy_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = {"class_path": f"{__name__}.Keyed", "init_args": {"api_key": "canary-reward-0123", "fails": "perhaps"}}
    line = refused(capsys, "fit", changed(recipe(tmp_path, tiny_policy_dir), data__reward=reward), tmp_path)
    assert "perhaps" in line
    assert "canary" not in line
