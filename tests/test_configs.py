"""Every recipe in configs/, and every piece to combine with one, can be built; each of their keys says what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dppo_lightning.generate.engine import RolloutEngine
from dppo_lightning.run.cli import DPPOCommandLine
from dppo_lightning.train.datamodule import RolloutDataModule
from dppo_lightning.train.module import DPPOModule
from tests.helpers.places import ROOT

FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml"))
PIECES = [name for name in FILES if name.startswith("configs/scaling/")]
"""To add to a recipe; no recipes themselves."""
RECIPES = [name for name in FILES if name not in PIECES]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_can_be_built(recipe: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = yaml.safe_load((ROOT / recipe).read_text())
    below = (
        [] if "prompts" in given.get("data", {}) else ["--config", str(ROOT / "configs" / "quickstart.yaml")]
    )  # a piece of one
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DPPO_API_KEY", "of nobody")
    monkeypatch.setattr(DPPOCommandLine, "_run_subcommand", lambda self, name: None)
    cli = DPPOCommandLine(["fit", *below, "--config", str(ROOT / recipe), "--trainer.accelerator", "cpu"])
    assert isinstance(cli.model, DPPOModule)
    assert isinstance(cli.datamodule, RolloutDataModule)
    assert isinstance(cli.datamodule.engine, RolloutEngine)
    cli.datamodule.sampling.check_training()
    cli.datamodule.advantage.check(cli.datamodule.samples_per_prompt)
    assert below or cli.trainer.max_steps == given["trainer"]["max_steps"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("piece", PIECES)
def test_every_piece_can_be_added_to_a_recipe(piece: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = yaml.safe_load((ROOT / piece).read_text())["trainer"]["strategy"]
    monkeypatch.setattr(DPPOCommandLine, "_run_subcommand", lambda self, name: None)
    monkeypatch.chdir(ROOT)
    arguments = ["fit", "--config", "configs/quickstart.yaml", "--config", piece, "--trainer.accelerator", "cpu"]
    cli = DPPOCommandLine([*arguments, "--trainer.devices", "2"])
    kind = type(cli.trainer.strategy)
    assert f"{kind.__module__}.{kind.__name__}".endswith(given["class_path"].rpartition(".")[2])
    assert cli.trainer.world_size == 2
    assert cli.trainer.max_steps == 160


@pytest.mark.parametrize("recipe", FILES)
def test_every_value_of_a_recipe_has_a_comment(recipe: str) -> None:
    lines = (ROOT / recipe).read_text().splitlines()
    bare = [
        line
        for above, line in zip(["", *lines], lines, strict=False)
        if ":" in line and not line.strip().startswith("#") and "#" not in line
        if not line.rstrip().endswith(":") and "class_path" not in line and "#" not in above
    ]
    assert bare == []
