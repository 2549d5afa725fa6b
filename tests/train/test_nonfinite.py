"""A step whose loss, gradient or weights are not finite is not taken, and leaves what is needed to look."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from dppo_lightning.base.errors import ConfigError, NonFiniteError
from dppo_lightning.train.nonfinite import NumberGuard, statistics_of
from tests.helpers.faults import Arms, Fault, Faulty
from tests.helpers.runs import Run, fit

FAULTS = ("loss", "gradient", "weights")


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


class States(pl.Callback):
    """Copies of weights and optimizer state after each step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.states: list[Any] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.weights.append({name: p.detach().clone() for name, p in pl_module.policy.named_parameters()})
        self.states.append(copy.deepcopy(trainer.optimizers[0].state_dict()))


def same(one: Any, other: Any) -> bool:
    """Bit-equal; NaN equals NaN."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one.nan_to_num(7e7), other.nan_to_num(7e7)) and torch.equal(one.isnan(), other.isnan())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def run(policy: str, folder: Path, fault: Fault, states: States, steps: tuple[int, ...] = (1,), **settings: Any) -> Run:
    return fit(
        policy,
        {"trust_region": Faulty(fault), "optimizer": adamw, **settings},
        callbacks=[Arms(steps), states],
        max_steps=3,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        default_root_dir=folder,
    )


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_skipped_step_changes_no_weight_and_no_optimizer_state(
    fault: Fault, tiny_policy_dir: str, tmp_path: Path
) -> None:
    found = run(tiny_policy_dir, tmp_path, fault, states := States(), on_nonfinite="skip")
    before, skipped, after = (states.weights[i] for i in (1, 3, 5))
    assert same(before, skipped)
    assert same(states.states[1]["state"], states.states[3]["state"])
    assert not same(skipped, after)
    assert not same(states.states[3]["state"], states.states[5]["state"])
    assert found.metrics.of("train/skipped") == [1.0]
    assert [row.get("train/skipped") for row in found.metrics.rows] == [None, 1.0, None]
    assert all(tensor.isfinite().all() for tensor in after.values())


@pytest.mark.parametrize("fault", FAULTS)
def test_the_run_stops_before_the_step_with_one_line(fault: Fault, tiny_policy_dir: str, tmp_path: Path) -> None:
    states = States()
    with pytest.raises(NonFiniteError) as stopped:
        run(tiny_policy_dir, tmp_path, fault, states)
    line = str(stopped.value)
    assert "\n" not in line
    assert line.startswith("optimizer step 1 was not taken")
    assert fault in line
    assert str(tmp_path / "nonfinite" / "step-1") in line
    assert len(states.weights) == 3  # both micro-batches of step 0, and the first of step 1


@pytest.mark.parametrize("fault", FAULTS)
def test_what_was_seen_can_be_loaded_without_running_code(fault: Fault, tiny_policy_dir: str, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError):
        run(tiny_policy_dir, tmp_path, fault, States())
    seen = torch.load(tmp_path / "nonfinite" / "step-1" / "rank-0.pt", weights_only=True)
    assert (seen["format"], seen["step"], seen["rank"]) == (1, 1, 0)
    assert fault in seen["kinds"]
    assert len(seen["micro_batches"]) == 2
    for batch in seen["micro_batches"]:
        tokens = len(batch["targets"])
        assert tokens > 0
        assert batch["input_ids"].flatten()[batch["predict_index"]].shape == (tokens,)
        for name in ("logp", "rollout_logp", "advantage", "token_loss"):
            assert batch[name].shape == (tokens,)
        assert (batch["loss"].isfinite() == (fault == "gradient")) or fault == "weights"
    names = seen["gradients"].keys()
    assert names == seen["weights"].keys()
    bad = {what: [n for n in names if seen[what][n]["nan"] + seen[what][n]["inf"]] for what in ("gradients", "weights")}
    assert bool(bad["gradients"]) == (fault == "gradient") or fault == "weights"
    assert bool(bad["weights"]) == (fault == "weights")
    if fault == "weights":
        (name,) = bad["weights"]
        assert seen["weights"][name]["nan"] == 1
        assert f"weight {name}" in seen["found"]


def test_no_more_steps_in_a_row_are_skipped_than_allowed(tiny_policy_dir: str, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"optimizer step 2 .*max_skipped allows 2"):
        run(tiny_policy_dir, tmp_path, "loss", states := States(), (0, 1, 2), on_nonfinite="skip", max_skipped=2)
    assert len(states.weights) == 5
    assert same(states.weights[0], states.weights[-1])
    assert sorted(path.name for path in (tmp_path / "nonfinite").iterdir()) == ["step-0", "step-1", "step-2"]


def test_steps_that_are_taken_between_skipped_ones_start_the_count_again(tiny_policy_dir: str, tmp_path: Path) -> None:
    found = run(tiny_policy_dir, tmp_path, "loss", States(), (0, 2), on_nonfinite="skip", max_skipped=1)
    assert found.metrics.of("train/skipped") == [1.0, 1.0]


def test_a_disk_that_takes_nothing_does_not_hide_what_happened(tiny_policy_dir: str, tmp_path: Path) -> None:
    (tmp_path / "nonfinite").write_text("a file where the folder should be")
    with pytest.raises(NonFiniteError, match=r"step 1 was not taken, loss not finite: .*could not be written"):
        run(tiny_policy_dir, tmp_path, "loss", States())


def test_settings_that_are_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.max_skipped must be >= 1, got 0"):
        NumberGuard(max_skipped=0)
    with pytest.raises(ConfigError, match=r"model\.on_nonfinite"):
        NumberGuard("never")  # type: ignore[arg-type]


def test_statistics_leave_out_what_is_not_finite() -> None:
    found = statistics_of(torch.tensor([3.0, float("nan"), -4.0, float("inf"), float("-inf")]))
    assert found == {"elements": 5, "nan": 1, "inf": 2, "norm": 5.0, "largest": 4.0}
    assert statistics_of(torch.full((2,), float("nan"))) == {
        "elements": 2,
        "nan": 2,
        "inf": 0,
        "norm": 0.0,
        "largest": 0.0,
    }
    assert statistics_of(None) is None
