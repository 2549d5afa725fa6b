"""Whole small runs in which generation runs ahead of training."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from dppo_lightning.base.records import Completion
from dppo_lightning.generate.engine import Failed, UpdateStats
from dppo_lightning.generate.schedule import Selection, Streaming
from dppo_lightning.generate.vllm.embedded import VLLMEmbedded
from dppo_lightning.run.callbacks.record import LANES, TimelineLog, read_timeline
from tests.helpers.log_probs import log_probs
from tests.helpers.rewards import ShareOf
from tests.helpers.runs import Run, fit


def logp_of(policy: str, weights: dict[str, Tensor], prompt: Sequence[int], completion: Completion) -> np.ndarray:
    """[T] log-probs of a completion's tokens under given weights."""
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        return log_probs(model, prompt, completion.token_ids).numpy()


def check_every_version(run: Run, policy: str) -> None:
    """Every token has the log-prob that the weights of its version give it."""
    weights = dict(enumerate(run.record.weights))  # before each optimizer step: version 0, 1, ...
    seen = set()
    for groups in run.record.rollouts:
        for group in groups:
            for completion in group.completions:
                for version in set(completion.versions.tolist()):
                    mine = completion.versions == version
                    scored = logp_of(policy, weights[version], group.prompt.token_ids, completion)
                    np.testing.assert_allclose(completion.logp[mine], scored[mine], atol=1e-4)
                seen.add(tuple(sorted(set(completion.versions.tolist()))))
    assert any(len(versions) > 1 for versions in seen) or len({v for vs in seen for v in vs}) > 1


@pytest.mark.parametrize("ahead", [1, 2])
def test_tokens_are_as_old_as_the_bound_allows_and_carry_their_own_version(ahead: int, tiny_policy_dir: str) -> None:
    run = fit(tiny_policy_dir, data={"streaming": Streaming(ahead)}, max_steps=4)
    assert run.metrics.of("train/staleness_max") == [min(step, ahead) for step in range(4)]
    assert [len(groups) for groups in run.record.rollouts] == [3] * 4
    check_every_version(run, tiny_policy_dir)
    last = [row for row in run.metrics.rows if "train/tokens" in row][-1]
    tokens = {age: last.get(f"staleness/tokens/{age}", 0.0) for age in range(ahead + 1)}
    assert tokens[ahead] > 0
    assert sum(tokens.values()) == last["train/tokens"]
    masked = sum(last[f"staleness/masked_share/{age}"] * count for age, count in tokens.items() if count)
    assert masked / last["train/tokens"] == pytest.approx(last["train/masked_share"])


def test_a_real_engine_that_is_updated_in_flight_stamps_every_token_rightly(tiny_policy_dir: str) -> None:
    """Completions of up to 200 tokens are in flight while the policy takes steps of milliseconds."""
    data = {
        "engine": VLLMEmbedded(),
        "streaming": Streaming(2),
        "max_new_tokens": 200,
        "samples_per_prompt": 8,
    }
    run = fit(tiny_policy_dir, data=data, max_steps=4)
    check_every_version(run, tiny_policy_dir)
    versions = [c.versions for groups in run.record.rollouts for g in groups for c in g.completions]
    assert any(len(set(mine.tolist())) > 1 for mine in versions)  # one completion, several weights
    assert max(run.metrics.of("sync/parity_error")) < 1e-4
    assert max(run.metrics.of("train/staleness_max")) <= 2


def test_on_policy_a_run_repeats_itself(tiny_policy_dir: str) -> None:
    a, b = (fit(tiny_policy_dir, data={"selection": Selection(resampling=1.0)}, max_steps=3) for _ in range(2))
    for mine, other in zip(a.record.rollouts, b.record.rollouts, strict=True):
        assert [g.prompt.id for g in mine] == [g.prompt.id for g in other]
        assert [g.texts for g in mine] == [g.texts for g in other]
    assert all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights)


def test_overlong_completions_are_masked_on_request(tiny_policy_dir: str) -> None:
    """Six characters are never enough for some; they count in the baseline and not in the step's tokens."""
    run = fit(tiny_policy_dir, data={"selection": Selection(overlong="mask")})
    completions = [c for g in run.record.rollouts[0] for c in g.completions]
    cut = [c for c in completions if c.finish_reason == "length"]
    assert len(cut) > 0
    assert run.metrics.of("train/tokens") == [sum(len(c) for c in completions) - sum(len(c) for c in cut)]
    for group in run.record.rollouts[0]:
        np.testing.assert_allclose(
            [row["advantage"] for row in group.records()], np.asarray(group.rewards) - np.mean(group.rewards)
        )


def test_seconds_of_a_step_add_up(tiny_policy_dir: str) -> None:
    run = fit(tiny_policy_dir, data={"streaming": Streaming(1)}, max_steps=5)
    for row in run.metrics.rows:
        if "time/wait" in row:
            assert row["time/reward"] >= 0
            assert row["time/generate"] > 0
            assert row["time/train"] > 0


def test_the_time_line_can_be_read_and_holds_every_verb(tiny_policy_dir: str, tmp_path: Path) -> None:
    fit(tiny_policy_dir, callbacks=[TimelineLog()], max_steps=2, default_root_dir=tmp_path)
    events = read_timeline(tmp_path / "timeline.json")
    spans = [event for event in events if event["ph"] == "X"]
    assert {LANES[event["tid"]] for event in spans} == {"generate", "reward", "wait", "train", "sync"}
    assert all(event["dur"] >= 0 for event in spans)
    trained = [event for event in spans if event["name"] == "train"]
    assert [event["args"]["step"] for event in trained] == [0, 1]
    (tmp_path / "timeline.json").open("a").write('{"name": "tr')  # a run that was killed while it wrote
    assert len(read_timeline(tmp_path / "timeline.json")) == len(events)
    assert json.loads((tmp_path / "timeline.json").read_text().split("\n")[1].rstrip(","))["ph"] == "M"


class Doomed(VLLMEmbedded):
    """Its process is killed once, when the third request of some training rollout has come back."""

    def __init__(self, rollout: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.victim = rollout
        self.updates = -1
        self.results = 0

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> UpdateStats:
        self.updates += 1
        self.results = 0
        return super().update_weights(named_tensors, version)

    def poll(self, timeout: float | None = None) -> list[Completion | Failed]:
        found = super().poll(timeout)
        self.results += sum(result.request_id.startswith("train/") for result in found)
        if self.updates == self.victim and self.results >= 1 and self.pid is not None:
            self.victim = -1
            os.kill(self.pid, signal.SIGKILL)
        return found


@pytest.mark.slow
def test_an_engine_that_is_killed_in_the_middle_of_a_step_changes_nothing(tiny_policy_dir: str) -> None:
    data = {"max_new_tokens": 60, "samples_per_prompt": 16, "reward": ShareOf()}
    quiet = fit(tiny_policy_dir, data=data | {"engine": VLLMEmbedded()}, max_steps=3)
    doomed = Doomed(1)
    shot = fit(tiny_policy_dir, data=data | {"engine": doomed}, max_steps=3)
    assert doomed.victim == -1
    for mine, other in zip(quiet.record.rollouts, shot.record.rollouts, strict=True):
        assert [g.prompt.id for g in mine] == [g.prompt.id for g in other]
        assert [[c.token_ids.tolist() for c in g.completions] for g in mine] == [
            [c.token_ids.tolist() for c in g.completions] for g in other
        ]
    assert all(torch.allclose(quiet.weights[n], shot.weights[n], atol=1e-6) for n in quiet.weights)
