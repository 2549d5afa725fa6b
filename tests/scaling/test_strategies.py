"""Strategies that would train wrongly are refused, however they are asked for, with the piece to use instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.scaling.sharding import FSDP2Strategy
from dppo_lightning.scaling.strategies import check_strategy
from dppo_lightning.scaling.zero import ZeroStrategy
from tests.helpers.places import ROOT
from tests.helpers.recipes import changed, recipe, refused
from tests.helpers.runs import QUIET, build

RIGHT = {"ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true", "single_device"}


class Mine(DDPStrategy):
    """Of one's own, and of the kin of an accepted one."""


class OneOfMine(SingleDeviceStrategy):
    """The same of another."""


class Foreign(Strategy):
    """Kin of none."""


Foreign.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]


def bare(kind: type) -> Any:
    """An object that was never built: some cannot be built without GPUs."""
    return kind.__new__(kind)


@pytest.mark.parametrize(
    "strategy",
    [None, "auto", *sorted(RIGHT), DDPStrategy(), DDPStrategy(find_unused_parameters=True), Mine(),
     SingleDeviceStrategy(), OneOfMine(), FSDP2Strategy(), ZeroStrategy(stage=3)],
    ids=lambda strategy: strategy if isinstance(strategy, str) else type(strategy).__name__,
)  # fmt: skip
def test_what_is_accepted(strategy: Any) -> None:
    check_strategy(strategy)


@pytest.mark.parametrize("name", sorted(set(StrategyRegistry) - RIGHT))
def test_every_other_name_of_lightnings_is_refused_with_a_piece_that_exists(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_strategy(name)
    said = str(caught.value)
    assert name in said
    assert "\n" not in said
    piece = said.partition("use ")[2].partition(",")[0]
    assert (ROOT / piece).is_file(), said


@pytest.mark.parametrize(
    ("strategy", "piece"),
    [
        ("deepspeed_stage_1", "zero1.yaml"),
        ("deepspeed_stage_2", "zero2.yaml"),
        ("deepspeed_stage_3_offload", "zero3.yaml"),
        ("deepspeed", "zero2.yaml"),
        ("fsdp", "fsdp2.yaml"),
        ("fsdp_cpu_offload", "fsdp2.yaml"),
        ("ddp_spawn", "ddp.yaml"),
        ("no_such_strategy", "ddp.yaml"),
        ("deepspeed_of_mine", "zero2.yaml"),
        (bare(DeepSpeedStrategy), "zero2.yaml"),
        (bare(FSDPStrategy), "fsdp2.yaml"),
        (ModelParallelStrategy(), "fsdp2.yaml"),
        (DDPStrategy(start_method="fork"), "ddp.yaml"),
        (bare(Foreign), "ddp.yaml"),
        (bare(type("OwnDeepSpeed", (DeepSpeedStrategy,), {})), "zero2.yaml"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_the_piece_that_is_named_does_what_was_wanted(strategy: Any, piece: str) -> None:
    with pytest.raises(ConfigError, match=rf"trainer\.strategy: .*configs/scaling/{piece}"):
        check_strategy(strategy)


class NoChildren(ModelParallelStrategy):
    """Lightning would start the other rank, this test run a second time, before it asks us."""

    def _configure_launcher(self) -> None:
        self._launcher = None


@pytest.mark.parametrize("do", ["fit", "validate", "test", "predict"])
def test_an_object_given_to_a_trainer_is_refused_before_anything_begins(tiny_policy_dir: str, do: str) -> None:
    module, data = build(tiny_policy_dir)
    trainer = pl.Trainer(**QUIET | {"devices": 2}, strategy=NoChildren())
    with pytest.raises(ConfigError, match=r"NoChildren trains its ranks apart .* configs/scaling/fsdp2"):
        getattr(trainer, do)(module, datamodule=data)
    assert module.policy is None
    assert data.stream is None


@pytest.mark.parametrize(
    "strategy",
    [
        "deepspeed_stage_2",
        "fsdp",
        "ddp_spawn",
        "no_such_strategy",
        {"class_path": "lightning.pytorch.strategies.DeepSpeedStrategy", "init_args": {"stage": 2}},
        {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"},
    ],
    ids=str,
)
def test_the_command_line_refuses_it_in_one_line(
    strategy: Any, tiny_policy_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = changed(recipe(tmp_path, tiny_policy_dir), trainer__strategy=strategy)
    line = refused(capsys, "fit", config, tmp_path)
    assert "trainer.strategy: " in line
    assert "use configs/scaling/" in line
    assert not (tmp_path / "run").exists()


def test_generate_refuses_it_too(tiny_policy_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = changed(recipe(tmp_path, tiny_policy_dir), trainer__strategy="fsdp")
    line = refused(capsys, "generate", config, tmp_path, "--output", str(tmp_path / "out.jsonl"))
    assert "use configs/scaling/fsdp2.yaml" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainer__accelerator": "gpu"}, "No supported gpu backend found"),
        ({"trainer__devices": 0}, "`Trainer(devices=0)` value is not a valid input"),
    ],
)
def test_what_lightning_says_of_other_things_gets_no_hint_about_strategies(
    change: dict[str, Any],
    message: str,
    tiny_policy_dir: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = refused(capsys, "fit", changed(recipe(tmp_path, tiny_policy_dir), **change), tmp_path)
    assert message in line
    assert "configs/scaling" not in line
