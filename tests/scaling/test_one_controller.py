"""Whole runs on one rank and on two: what is generated, rewarded and learned does not depend on their number."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertLMHeadModel

from dppo_lightning.base.errors import ConfigError, DPPOError
from dppo_lightning.generate.engine import EngineSpec
from dppo_lightning.generate.schedule import Streaming
from dppo_lightning.generate.transformers_engine import TransformersEngine
from dppo_lightning.run.callbacks.heldout import HeldOutEvaluation
from dppo_lightning.train.lora import LoRA
from dppo_lightning.train.objective import ReferenceKL
from dppo_lightning.trust_region import CovarianceClip, FullTV, PPOClip
from tests.helpers.models import save_character_tokenizer
from tests.helpers.rank_pool import RankPool
from tests.helpers.rewards import Failing
from tests.helpers.runs import Letters, fit, sgd
from tests.helpers.training import strategy_of

Outcome = dict[str, Any]


def outcome(
    policy: str, strategy: str, module: Mapping[str, Any] = {}, data: Mapping[str, Any] = {}, **trainer: Any
) -> Outcome | None:
    """A small run; what came of it, on rank 0."""
    world = 1 if strategy == "one" else torch.distributed.get_world_size()
    run = fit(
        policy,
        {"optimizer": sgd(0.05)} | dict(module),
        {"prompts": Letters(6, heldout=2)} | dict(data),
        callbacks=[HeldOutEvaluation()],
        devices=world,
        strategy=strategy_of(strategy),
        use_distributed_sampler=False,
        **{"max_steps": 3} | trainer,
    )
    weights = {name: tensor.clone() for name, tensor in run.module.policy.named_weights()}  # type: ignore[union-attr]
    if run.module.global_rank:
        assert run.record.rollouts == []
        return None
    return {
        "texts": [[group.texts for group in groups] for groups in run.record.rollouts],
        "rewards": [[list(group.rewards) for group in groups] for groups in run.record.rollouts],
        "heldout": run.metrics.of("heldout/reward"),
        "weights": weights,
        **{
            name: run.metrics.of(name)
            for name in ("train/loss", "train/tokens", "train/masked_share", "train/grad_norm")
        },
        "parity": run.metrics.of("sync/parity_error"),
    }


def compare(one: Outcome, two: Outcome) -> None:
    for name in ("texts", "rewards", "heldout", "train/tokens"):
        assert one[name] == two[name], name
    for name in ("train/loss", "train/masked_share", "train/grad_norm"):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert max(two["parity"]) < 1e-4
    assert one["weights"].keys() == two["weights"].keys()
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def on_one_rank(tiny_policy_dir: str) -> Outcome:
    """Outcome of a run with as many micro-batches a step as two ranks have."""
    one = outcome(tiny_policy_dir, "one", accumulate_grad_batches=2)
    assert one is not None
    return one


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp2"])
def test_completions_rewards_and_weights_do_not_depend_on_the_ranks(
    strategy: str, on_one_rank: Outcome, two_ranks: RankPool, tiny_policy_dir: str
) -> None:
    two, none = two_ranks.run(outcome, tiny_policy_dir, strategy)
    assert none is None
    assert len({str(weight) for weight in on_one_rank["train/grad_norm"]}) == 3
    compare(on_one_rank, two)


PASSES: dict[str, dict[str, Any]] = {
    "kl": {"kl": ReferenceKL(0.1)},
    "kl in the reward": {"kl": ReferenceKL(0.1, where="reward")},
    "recomputed anchor": {"trust_region": PPOClip(anchor="recomputed")},
    "whole vocabulary": {"trust_region": FullTV(0.15)},
    "covariance": {"trust_region": CovarianceClip(0.2)},
    "lora": {"lora": LoRA(rank=4), "kl": ReferenceKL(0.1)},
}
"""Arguments of the module that ask for passes without gradient, of the policy or of a reference."""

TWICE = {"steps_per_rollout": 2}


@pytest.fixture(scope="module", params=PASSES)
def with_passes(request: pytest.FixtureRequest, tiny_policy_dir: str) -> tuple[dict[str, Any], Outcome]:
    """Arguments of the module, and the outcome of a run with them on one rank."""
    module = PASSES[request.param]
    one = outcome(tiny_policy_dir, "one", module, TWICE)
    assert one is not None
    return module, one


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_passes_without_gradient_are_shared_out(
    strategy: str, with_passes: tuple[dict[str, Any], Outcome], two_ranks: RankPool, tiny_policy_dir: str
) -> None:
    module, one = with_passes
    two, _ = two_ranks.run(outcome, tiny_policy_dir, strategy, module, TWICE)
    compare(one, two)


def test_generation_runs_ahead_on_two_ranks(two_ranks: RankPool, tiny_policy_dir: str) -> None:
    two, _ = two_ranks.run(outcome, tiny_policy_dir, "ddp", data={"streaming": Streaming(1)}, max_steps=4)
    assert len(two["texts"]) == 4
    assert max(two["parity"]) < 1e-4


class Unstartable(TransformersEngine):
    def start(self, spec: EngineSpec) -> None:
        raise DPPOError("the moon is full")


def message(
    policy: str, data: Mapping[str, Any] = {}, by_rank: str | None = None, strategy: str = "ddp", **trainer: Any
) -> str:
    """The error that a run ends with, on this rank."""
    changed = {by_rank: 10 + torch.distributed.get_rank()} if by_rank else {}
    try:
        outcome(policy, strategy, data=dict(data) | changed, **trainer)
    except DPPOError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize(
    ("data", "by_rank", "reason"),
    [
        ({"engine": Unstartable()}, None, "rank 0: DPPOError: the moon is full"),
        ({"prompts_per_step": 1, "samples_per_prompt": 1}, None, ""),
        ({}, "max_new_tokens", "rank 1 has another configuration than rank 0: data.sampling"),
        ({}, "prompts_per_step", "rank 1 has another configuration than rank 0: data.prompts_per_step is 11, not 10"),
    ],
    ids=["engine", "more ranks than sequences", "sampling", "prompts"],
)
def test_an_error_is_told_on_every_rank(
    data: dict[str, Any], by_rank: str | None, reason: str, two_ranks: RankPool, tiny_policy_dir: str
) -> None:
    first, second = two_ranks.run(message, tiny_policy_dir, data, by_rank, timeout=60)
    for said in (first, second):
        assert said != "no error"
        assert reason in said


@pytest.mark.parametrize(("accumulate", "fits"), [(12, True), (13, False)])
def test_more_micro_batches_than_completions_are_refused(accumulate: int, fits: bool, tiny_policy_dir: str) -> None:
    if fits:
        fit(tiny_policy_dir, accumulate_grad_batches=accumulate)  # 3 prompts x 4 completions
        return
    with pytest.raises(ConfigError, match=r"=13 make 13 micro-batches of 12 completions .* set it to 12 or less"):
        fit(tiny_policy_dir, accumulate_grad_batches=accumulate)


def test_micro_batches_of_all_ranks_count(two_ranks: RankPool, tiny_policy_dir: str) -> None:
    for said in two_ranks.run(message, tiny_policy_dir, timeout=60, accumulate_grad_batches=7):
        assert "2 rank(s) with trainer.accumulate_grad_batches=7 make 14 micro-batches of 12 completions" in said
        assert said.endswith("set it to 6 or less")


@pytest.mark.parametrize("strategy", ["ddp", "zero3", "fsdp2"])
def test_a_model_that_computes_something_else_is_refused_on_every_rank_before_the_engine_starts(
    strategy: str, two_ranks: RankPool, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertLMHeadModel(BertConfig(vocab_size=96, initializer_range=0.2, **sizes)).save_pretrained(tmp_path)
    save_character_tokenizer(tmp_path)
    arguments = (str(tmp_path), {"engine": Unstartable()}, None, strategy)
    first, second = two_ranks.run(message, *arguments, timeout=60)
    assert first == second
    assert "BertLMHeadModel cannot be trained: it is not causal" in first


def test_a_reward_that_fails_on_rank_0_ends_every_rank(two_ranks: RankPool, tiny_policy_dir: str) -> None:
    reward = Failing(ValueError("no more"), after=12 + 2)  # in the second rollout
    first, second = two_ranks.run(message, tiny_policy_dir, {"reward": reward}, timeout=60)
    assert "no more" in first
    assert second == f"RankError: rank 0: {first}"
