"""Training, against the same step computed with whole logits in plain torch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import dppo_lightning.train.module
import dppo_lightning.train.policy
from dppo_lightning.advantage import AdvantageEstimator
from dppo_lightning.base.errors import ConfigError
from dppo_lightning.base.records import Completion, Group
from dppo_lightning.reward.base import Sample
from dppo_lightning.run.callbacks.heldout import HeldOutEvaluation
from dppo_lightning.sync.weight_sync import LIMITS
from dppo_lightning.train.metrics import check_names
from dppo_lightning.train.objective import Aggregation, ReferenceKL
from dppo_lightning.train.policy import Policy
from dppo_lightning.trust_region import BinaryKL, BinaryTV, NoTrustRegion
from tests.helpers.log_probs import log_probs
from tests.helpers.models import END
from tests.helpers.rewards import ShareOf, share
from tests.helpers.runs import QUIET, Letters, SyncSeen, build, fit, sgd

DELTA = 0.02


def read(ids: np.ndarray) -> str:
    """Text of a completion: ids count from the space, the last one is the end."""
    return "".join(chr(32 + i) for i in ids.tolist() if i != END)


def logp_of(model: PreTrainedModel, group: Group, completion: Completion, temperature: float) -> Tensor:
    return log_probs(model, group.prompt.token_ids, completion.token_ids, temperature).float()


@dataclass(frozen=True)
class Plain:
    """A step of DPPO-Binary-TV with k3 in the loss, as the formulas say it."""

    policy: str
    aggregation: Aggregation
    temperature: float = 0.8
    beta: float = 0.0

    def load(self, weights: dict[str, Tensor] | None = None) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(self.policy, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(parameter if weights is None else weights[name])
        return model

    def step(self, weights: dict[str, Tensor], groups: list[Group]) -> tuple[dict[str, Tensor], float]:
        """The gradient, and the share of masked tokens."""
        model, reference = self.load(weights), self.load()
        losses, masks = [], []
        for group in groups:
            rewards = np.array([share(read(c.token_ids), ShareOf().characters) for c in group.completions])
            for completion, advantage in zip(group.completions, rewards - rewards.mean(), strict=True):
                logp = logp_of(model, group, completion, self.temperature)
                pi, mu = logp.detach().exp(), torch.from_numpy(completion.logp).exp()
                masked = (advantage * (pi / mu - 1) > 0) & ((mu - pi).abs() > DELTA)
                loss = -advantage * torch.where(masked, 0.0, pi / mu) * logp
                gap = logp_of(reference, group, completion, self.temperature).detach() - logp
                losses.append(loss + self.beta * (gap.exp() - 1 - gap))
                masks.append(masked)
        if self.aggregation == "token-mean":
            total = torch.cat(losses).mean()
        else:
            total = torch.stack([loss.sum() for loss in losses]).mean()
        total.backward()
        gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return gradient, torch.cat(masks).float().mean().item()


@pytest.mark.parametrize(
    ("aggregation", "beta"), [("token-mean", 0.0), ("seq-mean-token-sum", 0.0), ("token-mean", 0.5)]
)
def test_a_steps_gradient_is_that_of_whole_logits(aggregation: Aggregation, beta: float, tiny_policy_dir: str) -> None:
    """Two steps on one rollout: on-policy first, then with a policy that has moved and tokens that are masked."""
    settings = {"trust_region": BinaryTV(DELTA), "aggregation": aggregation, "optimizer": sgd(0.5)}
    run = fit(
        tiny_policy_dir,
        settings | {"kl": ReferenceKL(beta)},
        {"steps_per_rollout": 2, "temperature": 0.8},
        max_steps=2,
        accumulate_grad_batches=3,
    )
    (groups,) = run.record.rollouts
    plain = Plain(tiny_policy_dir, aggregation, beta=beta)
    for step, mine in enumerate((groups[:3], groups[3:])):
        expected, masked = plain.step(run.record.weights[step], mine)
        scale = max(gradient.abs().max() for gradient in expected.values())
        assert scale > 1e-3
        assert run.record.gradients[step].keys() == expected.keys()
        for name, gradient in run.record.gradients[step].items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5 * scale.item(), msg=name)
        assert run.metrics.of("train/masked_share")[step] == pytest.approx(masked, abs=1e-6)
        norm = torch.cat([gradient.flatten() for gradient in expected.values()]).norm().item()
        assert run.metrics.of("train/grad_norm")[step] == pytest.approx(norm, rel=1e-4)
    assert run.metrics.of("train/masked_share")[0] == 0
    assert run.metrics.of("train/masked_share")[1] > 0.05


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum"])
def test_the_number_of_micro_batches_changes_neither_weights_nor_metrics(
    aggregation: Aggregation, tiny_policy_dir: str
) -> None:
    """Up to as many as sequences; empty ones are in tests/scaling/test_same_updates.py."""
    runs = {
        parts: fit(
            tiny_policy_dir,
            {"aggregation": aggregation},
            {"steps_per_rollout": 2},
            max_steps=2,
            accumulate_grad_batches=parts,
        )
        for parts in (1, 2, 5, 12)
    }
    whole = runs.pop(1)
    names = [name for name in whole.metrics.rows[0] if name.startswith("train/")]
    assert len(names) > 15
    for run in runs.values():
        for name, weight in run.weights.items():
            torch.testing.assert_close(weight, whole.weights[name], rtol=0, atol=1e-6)
        for name in names:
            assert run.metrics.of(name) == pytest.approx(whole.metrics.of(name), rel=1e-3, abs=1e-5), name


def test_a_small_step_changes_weights_by_learning_rate_times_gradient(tiny_policy_dir: str) -> None:
    run = fit(tiny_policy_dir, {"optimizer": sgd(0.25)})
    for name, gradient in run.record.gradients[0].items():
        torch.testing.assert_close(run.weights[name], run.record.weights[0][name] - 0.25 * gradient)


@pytest.mark.parametrize(("beta", "models"), [(0.0, 1), (0.1, 2)])
def test_a_reference_is_loaded_only_for_kl(
    beta: float, models: int, tiny_policy_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def load(name: str, *settings: Any, **named: Any) -> Policy:
        loaded.append(name)
        return Policy(name, *settings, **named)

    monkeypatch.setattr(dppo_lightning.train.policy, "Policy", load)
    run = fit(tiny_policy_dir, {"kl": ReferenceKL(beta), "optimizer": sgd(0.5)}, max_steps=3)
    assert loaded == [tiny_policy_dir] * models
    kl = run.metrics.of("train/kl_reference")
    if beta == 0:
        assert kl == []
        return
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert min(kl[1:]) > 1e-4
    names = [name for name, _ in run.module.named_parameters()]
    assert len(names) == len(run.weights)  # the reference is neither trained nor saved
    before, after = Plain(tiny_policy_dir, "token-mean").load(), run.module.scorer.reference.model
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_kl_in_the_reward_is_subtracted_before_the_baseline(tiny_policy_dir: str) -> None:
    kl = ReferenceKL(0.3, "k1", "reward")
    run = fit(tiny_policy_dir, {"kl": kl, "optimizer": sgd(0.5)}, {"temperature": 0.8}, max_steps=2)
    reference = Plain(tiny_policy_dir, "token-mean").load()
    largest = 0.0
    for groups in run.record.rollouts:
        for group in groups:
            with torch.no_grad():
                costs = np.array(
                    [0.3 * (c.logp - logp_of(reference, group, c, 0.8).numpy()).sum() for c in group.completions]
                )
            rewards = np.array([share(read(c.token_ids), ShareOf().characters) for c in group.completions])
            assert np.asarray(group.rewards).tolist() == rewards.tolist()
            wanted = rewards - costs
            np.testing.assert_allclose([row["advantage"] for row in group.records()], wanted - wanted.mean(), atol=1e-4)
            largest = max(largest, np.abs(costs).max())
    assert largest > 0.05
    weights, groups = run.record.weights[1], run.record.rollouts[1]
    model = Plain(tiny_policy_dir, "token-mean").load(weights)
    with torch.no_grad():
        gaps = [logp_of(model, g, c, 0.8) - logp_of(reference, g, c, 0.8) for g in groups for c in g.completions]
    assert run.metrics.of("train/kl_reference")[1] == pytest.approx(torch.cat(gaps).mean().item(), abs=1e-5)


def test_reward_goes_up_on_an_easy_task(tiny_policy_dir: str) -> None:
    run = fit(
        tiny_policy_dir,
        {"trust_region": BinaryTV(), "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3)},
        {"samples_per_prompt": 8, "reward": ShareOf("abcdefghijklmnopqrstuvwxyz"), "steps_per_rollout": 2},
        max_steps=24,
    )
    reward = run.metrics.of("train/reward")
    assert len(reward) == 24
    assert np.mean(reward[-4:]) > np.mean(reward[:4]) + 0.3


def test_the_same_seed_gives_bit_equal_weights_and_another_seed_does_not(tiny_policy_dir: str) -> None:
    def train(seed: int, rng: int) -> dict[str, Tensor]:
        torch.manual_seed(rng)  # what else drew random numbers in the process does not matter
        return fit(tiny_policy_dir, {"kl": ReferenceKL(0.1)}, {"seed": seed}, max_steps=2).weights

    first, second, other = train(1, rng=1), train(1, rng=2), train(2, rng=1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_batch_without_signal_changes_no_weight(tiny_policy_dir: str) -> None:
    run = fit(tiny_policy_dir, data={"reward": ShareOf("")})
    assert run.metrics.of("train/no_signal") == [1]
    assert all(torch.equal(weight, run.record.weights[0][name]) for name, weight in run.weights.items())


@pytest.mark.parametrize("region", [BinaryTV(anchor="recomputed"), BinaryKL(), NoTrustRegion()])
def test_other_regions_train_on_a_rollout_several_times(region: Any, tiny_policy_dir: str) -> None:
    run = fit(tiny_policy_dir, {"trust_region": region}, {"steps_per_rollout": 2}, max_steps=2)
    assert all(torch.isfinite(weight).all() for weight in run.weights.values())
    assert run.metrics.of("train/mismatch_tv")[0] == pytest.approx(0, abs=1e-5)


def test_every_logged_name_is_in_the_glossary(tiny_policy_dir: str) -> None:
    run = fit(tiny_policy_dir, {"kl": ReferenceKL(0.1)}, {"prompts": Letters(4, heldout=2)})
    names = {name for row in run.metrics.rows for name in row} - {"epoch"}
    check_names(dict.fromkeys(names, 0.0))
    assert {"train/reward", "train/loss", "time/sync", "sync/parity_error", "heldout/pass_at_k"} <= names


class SlowOnHeldOut(ShareOf):
    """Takes an hour for the prompts that the trainer is not trained on, by the clock that the module reads."""

    hours = 0

    def score(self, samples: Sequence[Sample]) -> list[float]:
        self.hours += any(sample.prompt[0] >= "e" for sample in samples)
        return super().score(samples)


def test_time_of_training_does_not_count_evaluation(tiny_policy_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reward, clock = SlowOnHeldOut(), time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + 3600 * reward.hours)
    data = {"prompts": Letters(4, heldout=2), "reward": reward, "evaluate_every_n_steps": 1}
    run = fit(tiny_policy_dir, data=data, callbacks=[HeldOutEvaluation()], max_steps=3)
    assert reward.hours >= 3
    assert len(run.metrics.of("time/train")) == 3
    assert max(run.metrics.of("time/train")) < 3600


@pytest.mark.parametrize(
    ("data", "precision", "dtype", "tolerance"),
    [
        ({}, "32-true", "float32", None),
        ({"rollout_dtype": "bfloat16"}, "32-true", "bfloat16", None),
        ({"rollout_dtype": "float16"}, "32-true", "float16", None),
        ({}, "bf16-mixed", "bfloat16", None),
        ({"rollout_dtype": "bfloat16", "parity_tolerance": 0.9}, "32-true", "bfloat16", 0.9),
    ],
)
def test_the_parity_probe_has_the_limits_of_the_coarser_dtype(
    data: dict[str, Any], precision: Any, dtype: str, tolerance: float | None, tiny_policy_dir: str
) -> None:
    seen = SyncSeen()
    run = fit(tiny_policy_dir, data=data, precision=precision, callbacks=[seen])
    sync = seen.sync
    assert sync.as_loaded
    assert sync.probe.limits == LIMITS[dtype]
    assert sync.probe.tolerance == tolerance
    assert sync.probe.loaded == sync.probe.first
    mean, largest = max(run.metrics.of("sync/parity_mean")), max(run.metrics.of("sync/parity_error"))
    assert 0 <= mean <= largest <= 0.9
    assert mean <= LIMITS[dtype].first
    assert {weight.dtype for weight in run.weights.values()} == {torch.float32}


def test_a_continued_run_does_not_compare_the_engine_as_loaded_with_other_weights(
    tiny_policy_dir: str, tmp_path: Path
) -> None:
    """The engine has loaded the model's folder, while the trainer has the checkpoint's weights."""
    path = str(tmp_path / "one.ckpt")
    model, source = build(tiny_policy_dir, {"optimizer": sgd(5.0)})
    trainer = pl.Trainer(**QUIET, max_steps=1)
    trainer.fit(model, datamodule=source)
    trainer.save_checkpoint(path)
    again, source = build(tiny_policy_dir, {"optimizer": sgd(5.0)})
    seen = SyncSeen()
    pl.Trainer(**QUIET, max_steps=2, callbacks=[seen]).fit(again, datamodule=source, ckpt_path=path, weights_only=False)
    sync = seen.sync
    assert not sync.as_loaded
    assert sync.probe.loaded is None
    assert sync.probe.first is not None
    assert sync.probe.first.largest < 1e-4


class Halved(AdvantageEstimator):
    """A user's own."""

    def estimate(self, rewards: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [group / 2 for group in rewards]


def test_an_advantage_of_the_users_own_reaches_the_loss(tiny_policy_dir: str) -> None:
    run = fit(tiny_policy_dir, {"trust_region": NoTrustRegion()}, {"advantage": Halved(), "samples_per_prompt": 1})
    (groups,) = run.record.rollouts
    for group in groups:
        assert [row["advantage"] for row in group.records()] == (np.asarray(group.rewards) / 2).tolist()
    tokens = sum(len(group.completions[0]) for group in groups)
    mean = sum(float(group.rewards[0]) / 2 * len(group.completions[0]) for group in groups) / tokens
    assert run.metrics.of("train/surrogate")[0] == pytest.approx(mean, rel=1e-4)


class Growing(AdvantageEstimator):
    """Token t of every completion has advantage t."""

    def estimate(self, rewards: Sequence[np.ndarray]) -> list[np.ndarray]:
        raise AssertionError("per_token stands in its place")

    def per_token(self, groups: Sequence[Group], rewards: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        return [[np.arange(len(completion), dtype=float) for completion in group.completions] for group in groups]


def test_an_advantage_may_differ_from_token_to_token(tiny_policy_dir: str) -> None:
    run = fit(tiny_policy_dir, {"trust_region": NoTrustRegion()}, {"advantage": Growing()})
    lengths = np.array([len(completion) for group in run.record.rollouts[0] for completion in group.completions])
    assert lengths.max() > 2
    mean = (lengths * (lengths - 1) / 2).sum() / lengths.sum()
    assert run.metrics.of("train/surrogate")[0] == pytest.approx(mean, rel=1e-4)
    rows = [row for group in run.record.rollouts[0] for row in group.records()]
    assert [row["advantage"] for row in rows] == pytest.approx(((lengths - 1) / 2).tolist())


def test_seq_sum_constant_without_its_length_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match="constant_length"):
        dppo_lightning.train.module.DPPOModule("no-such-model", aggregation="seq-sum-constant")
