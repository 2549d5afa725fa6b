"""Rollouts as Lightning's source of batches: what is generated with which weights, and what is refused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor

from dppo_lightning.base.errors import ConfigError, DataError, EngineError, RewardError, SyncError
from dppo_lightning.base.records import Completion
from dppo_lightning.generate.engine import Failed, Request, RolloutEngine, UpdateStats
from dppo_lightning.generate.schedule import Selection
from dppo_lightning.generate.scripted import ScriptedEngine
from dppo_lightning.generate.transformers_engine import TransformersEngine
from dppo_lightning.prompts import Example, PromptSets, PromptSource
from dppo_lightning.reward import ExactMatch
from dppo_lightning.run.callbacks.heldout import HeldOutEvaluation
from dppo_lightning.train.datamodule import RolloutDataModule
from dppo_lightning.train.metrics import group_metrics
from tests.helpers.records import make_group
from tests.helpers.rewards import Failing, ShareOf
from tests.helpers.runs import QUIET, Letters, Memory, build, fit, sgd
from tests.sync.test_weight_sync import Stale


class Watched(TransformersEngine):
    """Writes down when it is given weights and requests, and whether it was closed."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []
        self.closed = False

    def submit(self, requests: Sequence[Request]) -> None:
        kind = requests[0].id.split("/")[0]
        if kind == "train" and self.log[-1] != kind:
            self.log.append(kind)
        super().submit(requests)

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> UpdateStats:
        self.log.append(f"weights {version}")
        return super().update_weights(named_tensors, version)

    def close(self) -> None:
        self.closed = True
        super().close()


@pytest.mark.parametrize(
    ("steps_per_rollout", "versions", "staleness", "log"),
    [
        (
            1,
            [0, 1, 2],
            [0, 0, 0],
            ["weights 0", "train", "weights 1", "train", "weights 2", "train", "weights 3"],
        ),
        (2, [0, 2], [0, 1, 0], ["weights 0", "train", "weights 2", "train", "weights 3"]),
        (3, [0], [0, 1, 2], ["weights 0", "train", "weights 3"]),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_engine_gets_new_weights_after_each_rollout(
    steps_per_rollout: int,
    versions: list[int],
    staleness: list[int],
    log: list[str],
    accumulate: int,
    tiny_policy_dir: str,
) -> None:
    engine = Watched()
    data = {"steps_per_rollout": steps_per_rollout, "engine": engine}
    run = fit(tiny_policy_dir, data=data, max_steps=3, accumulate_grad_batches=accumulate)
    assert engine.log == log
    found = [{v for g in groups for c in g.completions for v in c.versions.tolist()} for groups in run.record.rollouts]
    assert found == [{version} for version in versions]
    assert run.metrics.of("train/staleness") == staleness
    fresh = [mismatch for mismatch, age in zip(run.metrics.of("train/mismatch_tv"), staleness, strict=True) if age == 0]
    stale = [mismatch for mismatch, age in zip(run.metrics.of("train/mismatch_tv"), staleness, strict=True) if age > 0]
    assert max(fresh) < 1e-4
    assert not stale or min(stale) > 1e-3
    assert max(run.metrics.of("sync/parity_error")) < 1e-4
    asked = [len(groups) for groups in run.record.rollouts]
    assert asked == [3 * steps_per_rollout] * (3 // steps_per_rollout) + [3] * (3 % steps_per_rollout)
    assert engine.closed


def test_each_completion_is_trained_on_once(tiny_policy_dir: str) -> None:
    data = {"steps_per_rollout": 2}
    run = fit(tiny_policy_dir, data=data, max_steps=4, accumulate_grad_batches=2)
    tokens = sum(len(c) for groups in run.record.rollouts for g in groups for c in g.completions)
    assert sum(run.metrics.of("train/tokens")) == tokens


def test_prompts_are_visited_once_per_pass(tiny_policy_dir: str) -> None:
    run = fit(tiny_policy_dir, data={"prompts": Letters(6)}, max_steps=4)
    visited = [group.prompt.id for groups in run.record.rollouts for group in groups]
    assert sorted(visited[:6]) == sorted(visited[6:]) == [f"train/{i}" for i in range(6)]


def test_training_stops_when_the_engine_keeps_its_old_weights(tiny_policy_dir: str) -> None:
    with pytest.raises(SyncError, match="does not hold the policy's weights"):
        fit(tiny_policy_dir, {"optimizer": sgd(5.0)}, {"engine": Stale()}, max_steps=2)


@pytest.mark.parametrize(
    ("data", "trainer", "reason"),
    [
        ({"top_p": 0.9}, {}, "top_p=0.9 renormalises .* set top_p to 1"),
        ({"top_k": 5}, {}, "top_k=5 renormalises .* set top_k to 0"),
        ({"temperature": 0.0}, {}, "temperature=0 explores nothing"),
        ({"samples_per_prompt": 1}, {}, "GroupMean compares .* data.samples_per_prompt to at least 2, got 1"),
        ({}, {"max_steps": -1, "max_epochs": 1}, "set trainer.max_steps"),
        ({"max_new_tokens": 512}, {}, "leaves no room for a prompt in a context of 512"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_engine_starts(
    data: dict[str, Any], trainer: dict[str, Any], reason: str, tiny_policy_dir: str
) -> None:
    class Unstartable(ScriptedEngine):
        def start(self, spec: object) -> None:
            raise AssertionError("started")

    with pytest.raises(ConfigError, match=reason):
        fit(tiny_policy_dir, data={"engine": Unstartable()} | data, **trainer)


@pytest.mark.parametrize(
    "name",
    ["prompts_per_step", "samples_per_prompt", "steps_per_rollout", "evaluate_every_n_steps", "heldout_samples"],
)
def test_numbers_below_one_are_refused_when_the_module_is_built(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be >= 1, got 0"):
        RolloutDataModule(Letters(), ShareOf(), ScriptedEngine(), **{name: 0})


def test_truncated_sampling_is_allowed_in_evaluation(tiny_policy_dir: str) -> None:
    data = {"prompts": Letters(2, heldout=3), "top_k": 1, "heldout_samples": 4, "solved_at": 0.5}
    module, source = build(tiny_policy_dir, data=data)
    memory = Memory()
    (values,) = pl.Trainer(**QUIET | {"logger": memory}).validate(module, datamodule=source, verbose=False)
    assert values["heldout/pass_at_k"] == values["heldout/avg_at_k"]  # with one candidate all samples are equal
    assert 1 <= values["heldout/length"] <= 6


class Unreliable(TransformersEngine):
    """Fails every request of some places in the rollout."""

    def __init__(self, places: Sequence[int], reason: str = "the prompt is cursed") -> None:
        super().__init__()
        self.places = places
        self.reason = reason

    def start(self, spec: Any) -> None:
        super().start(spec)
        self.failed: list[Failed] = []

    def submit(self, requests: Sequence[Request]) -> None:
        bad = [r for r in requests if r.group and int(r.group.rsplit("/", 1)[1]) in self.places]
        self.failed += [Failed(request.id, self.reason) for request in bad]
        super().submit([request for request in requests if request not in bad])

    def poll(self, timeout: float | None = None) -> list[Completion | Failed]:
        failed, self.failed = self.failed, []
        return [*failed, *super().poll(0 if failed else timeout)]


@pytest.mark.parametrize(("places", "groups"), [([0], 5), ([0, 1, 2, 3, 4], 1)])
def test_a_run_goes_on_without_the_prompts_that_fail(places: list[int], groups: int, tiny_policy_dir: str) -> None:
    """With a single group left the second step has nothing to train on, and changes nothing."""
    run = fit(
        tiny_policy_dir,
        data={"engine": Unreliable(places), "steps_per_rollout": 2},
        max_steps=2,
        accumulate_grad_batches=2,
    )
    assert [len(found) for found in run.record.rollouts] == [groups]
    assert run.metrics.of("train/failed")[0] == 4 * len(places)
    tokens = sum(len(c) for g in run.record.rollouts[0] for c in g.completions)
    assert sum(run.metrics.of("train/tokens")) == tokens
    if groups == 1:
        assert run.metrics.of("train/tokens")[1] == 0
        after_first = run.record.weights[1]
        assert all((weight == after_first[name]).all() for name, weight in run.weights.items())


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ({"engine": Unreliable([0, 1, 2, 3, 4]), "steps_per_rollout": 2}, "no group is left for it"),
        ({"selection": Selection(resampling=0.5), "reward": ShareOf("")}, "no group is left for it"),
        ({"selection": Selection(overlong="mask"), "max_new_tokens": 1}, "all completions of its groups are left out"),
    ],
    ids=["failed", "without signal", "overlong"],
)
def test_a_step_with_nothing_to_train_on_is_told_and_moves_nothing(
    data: dict[str, Any], why: str, tiny_policy_dir: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither by AdamW's momentum nor by its weight decay, and the schedule goes on."""
    run = fit(
        tiny_policy_dir,
        {"optimizer": adamw, "lr_scheduler": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5)},
        data,
        max_steps=4,
        accumulate_grad_batches=2,
    )
    empty = run.metrics.of("train/empty")
    assert sum(empty) >= 1
    assert [tokens == 0 for tokens in run.metrics.of("train/tokens")] == [bool(value) for value in empty]
    states = [*run.record.weights, run.weights]
    for step, nothing in enumerate(empty):
        before, after = states[step], states[step + 1]
        assert all((before[name] == after[name]).all() for name in before) == bool(nothing)
        assert run.metrics.of("train/learning_rate")[step] == (0 if nothing else pytest.approx(0.01 * 0.5**step))
    told = [record.getMessage() for record in caplog.records if "no token to train on" in record.getMessage()]
    assert len(told) == 1
    assert f"optimizer step {empty.index(1)} has no token to train on ({why})" in told[0]


def test_a_step_does_not_repeat_what_was_logged_for_an_earlier_one(tiny_policy_dir: str) -> None:
    engine = Unreliable([0, 1, 2, 3, 4])
    run = fit(tiny_policy_dir, data={"engine": engine, "steps_per_rollout": 2}, max_steps=2)
    first, second = (row for row in run.metrics.rows if "train/tokens" in row)
    assert {"train/failed", "time/generate", "train/entropy", "train/reward"} <= set(first)
    assert not {"train/failed", "time/generate", "train/entropy", "train/reward"} & set(second)
    assert "time/sync" not in first
    assert "time/sync" in second


def test_a_run_ends_when_nothing_can_be_generated_and_the_engine_is_closed(tiny_policy_dir: str) -> None:
    engine = Unreliable(range(100))
    with pytest.raises(EngineError, match="none of 12 requests: the prompt is cursed"):
        fit(tiny_policy_dir, data={"engine": engine})
    assert not engine.health().alive


def test_an_error_in_a_reward_closes_the_engine(tiny_policy_dir: str) -> None:
    engine = TransformersEngine()
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        fit(tiny_policy_dir, data={"engine": engine, "reward": Failing(ZeroDivisionError())})
    assert not engine.health().alive


def test_evaluation_in_between_does_not_change_training(tiny_policy_dir: str) -> None:
    runs = [
        fit(
            tiny_policy_dir,
            data={"prompts": Letters(6, heldout=2), "evaluate_every_n_steps": 1, "steps_per_rollout": 2},
            callbacks=callbacks,
            max_steps=4,
        )
        for callbacks in ([], [HeldOutEvaluation()])
    ]
    assert [len(run.metrics.of("heldout/reward")) for run in runs] == [1, 5]
    a, b = (run.weights for run in runs)
    assert all((a[name] == b[name]).all() for name in a)


def test_long_prompts_are_dropped_and_the_others_keep_their_names(tiny_policy_dir: str) -> None:
    run = fit(tiny_policy_dir, data={"prompts": Letters(6), "max_prompt_tokens": 2})
    ids = {prompt.id: len(prompt.token_ids) for prompt in run.data.train_prompts}
    assert ids == {"train/0": 1, "train/1": 2, "train/3": 1, "train/4": 2}


def test_group_metrics_by_hand() -> None:
    groups = [
        make_group([1, 0], [4, 6], ["stop", "length"], format=[1.0, np.nan]),
        make_group([0.5, 0.5], [1, 1], ["stop", "stop"], format=[0.0, 0.5]),
    ]
    assert group_metrics(groups) == {
        "train/reward": 0.5,
        "train/reward_std": pytest.approx(np.sqrt(0.125)),
        "train/length": 3,
        "train/truncated": 0.25,
        "train/no_signal": 0.5,
        "train/part/format": 0.5,
    }
    assert group_metrics([]) == {}


def test_an_engine_is_started_with_what_the_run_needs(tiny_policy_dir: str) -> None:
    seen: list[Any] = []

    class Curious(TransformersEngine):
        def start(self, spec: Any) -> None:
            seen.append(spec)
            super().start(spec)

    engine: RolloutEngine = Curious()
    fit(tiny_policy_dir, data={"engine": engine, "prompts": Letters(2, heldout=1)})
    (spec,) = seen
    assert (spec.model, spec.dtype, spec.max_model_len, spec.stop_token_ids) == (tiny_policy_dir, "float32", 9, (95,))


class Gaps(PromptSource):
    """Six prompts to train on and two that are held out; one of each has no answer."""

    def load(self) -> PromptSets:
        examples = [
            Example(prompt=chr(97 + i), answer=None if i in (2, 7) else "A", where=f"row {i}") for i in range(8)
        ]
        return PromptSets(examples[:6], examples[6:])


def test_an_answer_that_cannot_be_read_is_refused_before_the_engine_starts(tiny_policy_dir: str) -> None:
    class Unstarted(TransformersEngine):
        def start(self, spec: Any) -> None:
            raise AssertionError("started")

    with pytest.raises(DataError, match="1 of 6 training prompts cannot be scored by ExactMatch: row 2 has no answer"):
        fit(tiny_policy_dir, data={"engine": Unstarted(), "prompts": Gaps(), "reward": ExactMatch()})


def test_answers_that_cannot_be_read_are_left_out_by_choice(tiny_policy_dir: str) -> None:
    data = {"prompts": Gaps(), "reward": ExactMatch(), "unreadable_answers": "drop"}
    run = fit(tiny_policy_dir, data=data, callbacks=[HeldOutEvaluation()])
    assert [prompt.id for prompt in run.data.train_prompts] == [f"train/{i}" for i in (0, 1, 3, 4, 5)]
    assert [prompt.id for prompt in run.data.heldout_prompts] == ["heldout/0"]
    assert run.data.left_out == 2
    assert len(run.metrics.of("heldout/reward")) == 2
