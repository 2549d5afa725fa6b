"""The precisions that train, those that are refused, and those in which a policy is evaluated."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, FSDPPrecision, HalfPrecision, MixedPrecision
from transformers import AutoModelForCausalLM

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.scaling.zero import ZeroStrategy
from dppo_lightning.train.policy import check_precision
from tests.helpers.runs import QUIET, Letters, SyncSeen, build, fit, sgd

ZERO = ZeroStrategy.__new__(ZeroStrategy)


def test_mixed_precision_trains_float32_weights(tiny_policy_dir: str) -> None:
    run = fit(tiny_policy_dir, {"optimizer": sgd(1e-3)}, precision="bf16-mixed", max_steps=2)
    assert {weight.dtype for weight in run.weights.values()} == {torch.float32}
    before = AutoModelForCausalLM.from_pretrained(tiny_policy_dir, dtype=torch.float32).named_parameters()
    moved = {name: (run.weights[name] - weight).abs().max().item() for name, weight in before}
    assert min(moved.values()) > 0
    # Smaller than half the distance between neighbours in bfloat16: without float32 weights it would be lost.
    assert min(moved.values()) < np.ldexp(1.0, -9) * max(w.abs().max() for w in run.weights.values()).item()


def trainer(precision: str, fn: str = "fit", strategy: Any = None) -> Any:
    """A trainer, as far as the check sees it."""
    return SimpleNamespace(precision=precision, strategy=strategy, state=SimpleNamespace(fn=fn))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "16-true", "bf16-true"])
def test_an_evaluation_may_run_in_any_precision(precision: str) -> None:
    for fn in ("validate", "test", "predict"):
        check_precision(trainer(precision, fn))


@pytest.mark.parametrize(
    ("precision", "strategy", "trains"),
    [
        ("32-true", None, True),
        ("bf16-mixed", None, True),
        ("bf16-true", None, False),
        ("bf16-true", ZERO, True),  # keeps float32 weights itself
        ("16-mixed", None, False),
        ("16-mixed", ZERO, False),
        ("16-true", None, False),
        ("16-true", ZERO, False),
    ],
)
def test_what_trains(precision: str, strategy: Any, trains: bool) -> None:
    if trains:
        check_precision(trainer(precision, strategy=strategy))
        return
    with pytest.raises(ConfigError, match=rf"{precision}.*bf16-mixed") as caught:
        check_precision(trainer(precision, strategy=strategy))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "16-true"},
        {"precision": "bf16-true"},
        {"plugins": [MixedPrecision("16-mixed", "cpu")]},
        {"plugins": [HalfPrecision("16-true")]},
        {"plugins": [HalfPrecision("bf16-true")]},
        {"plugins": [FSDPPrecision("16-mixed")]},
        {"plugins": [DeepSpeedPrecision("16-mixed")]},
        {"plugins": [DeepSpeedPrecision("16-true")]},
    ],
)
def test_a_run_is_refused_however_its_precision_was_set(settings: dict[str, Any], tiny_policy_dir: str) -> None:
    with pytest.raises(ConfigError, match=r"16-(mixed|true).*set bf16-mixed") as caught:
        fit(tiny_policy_dir, **settings)
    assert "\n" not in str(caught.value)


class AutocastInFloat16(MixedPrecision):
    """A plugin of one's own, whose name says nothing of what it does."""

    def __init__(self) -> None:
        super().__init__("bf16-mixed", "cpu")

    def autocast_context_manager(self) -> torch.autocast:
        return torch.autocast("cpu", torch.float16)


def test_float16_by_another_name_is_refused_by_the_head(tiny_policy_dir: str) -> None:
    with pytest.raises(ConfigError, match=r"float16.*bf16-mixed"):
        fit(tiny_policy_dir, plugins=[AutocastInFloat16()])


def test_a_policy_that_was_evaluated_in_16_bits_is_not_trained_in_them(tiny_policy_dir: str) -> None:
    module, data = build(tiny_policy_dir, {}, {"prompts": Letters(4, heldout=2), "rollout_dtype": "bfloat16"})
    run = pl.Trainer(**QUIET | {"precision": "bf16-true", "max_steps": 1})
    run.validate(module, datamodule=data, verbose=False)
    with pytest.raises(ConfigError, match=r"bf16-true.*bf16-mixed"):
        run.fit(module, datamodule=data)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-true"])
def test_a_policy_is_evaluated_and_asked_in_every_precision(precision: str, tiny_policy_dir: str) -> None:
    data = {"prompts": Letters(4, heldout=2), "rollout_dtype": "bfloat16"}
    module, source = build(tiny_policy_dir, {}, data)
    seen = SyncSeen()
    trainer = pl.Trainer(**QUIET | {"precision": precision}, callbacks=[seen])
    (values,) = trainer.validate(module, datamodule=source, verbose=False)
    assert np.isfinite(values["heldout/reward"])
    report = seen.sync.report
    assert report is not None
    assert 0 < report.parity.largest < 0.1
    module, source = build(tiny_policy_dir, {}, data)
    found = pl.Trainer(**QUIET | {"precision": precision}).predict(module, datamodule=source)
    assert [len(records) for records in found] == [2]
