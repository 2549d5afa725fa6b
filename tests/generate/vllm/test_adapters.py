"""Adapters alone, sent to the real vLLM."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dppo_lightning.base.errors import ConfigError, SyncError
from dppo_lightning.generate.engine import EngineSpec, ExpectedWeights, Failed
from dppo_lightning.generate.vllm.adapters import ExpectedAdapters, vllm_arguments
from dppo_lightning.generate.vllm.embedded import VLLMEmbedded
from dppo_lightning.train.lora import LoRA
from dppo_lightning.train.policy import Policy
from tests.helpers.engines import Case, ask, error
from tests.helpers.runs import fit

RANK = 3  # vLLM reserves 8: the rest must be zeros
LAYERS = ["q_proj", "v_proj", "gate_proj", "down_proj"]  # the first three are parts of fused layers there

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


def stirred(folder: str, seed: int) -> Policy:
    policy = Policy(folder, lora=LoRA(RANK, 6.0, LAYERS))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


def merged(policy: Policy, folder: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.load_state_dict(dict(policy.named_weights()), strict=False)
    return model


@pytest.fixture(scope="module")
def case(tiny_model_dir: str) -> Iterator[Case]:
    spec = EngineSpec(model=tiny_model_dir, max_model_len=512)
    engine = VLLMEmbedded(kv_cache_gib=0.25, adapter_rank=RANK)
    engine.start(spec)
    yield Case(engine, spec, AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32))
    engine.close()


@needs_vllm
def test_a_request_before_the_first_adapters_fails(case: Case) -> None:
    case.engine.submit([ask()])
    (failed,) = case.wait(1).values()
    assert isinstance(failed, Failed)
    assert "an update comes before any request" in failed.reason


@needs_vllm
def test_log_probs_are_those_of_the_merged_weights_after_every_update(case: Case, tiny_model_dir: str) -> None:
    prompt = tuple(5 + i % 80 for i in range(300))  # longer than a block of the prefix cache
    for version in (1, 2):
        policy = stirred(tiny_model_dir, version)
        stats = case.engine.update_weights(policy.weights_for(case.engine.adapter_rank), version)
        assert (stats.tensors, stats.version) == (2 * 2 * len(LAYERS), version)
        for completion in case.generate([ask("a", prompt), ask("b", prompt, seed=2)]):
            assert error(merged(policy, tiny_model_dir), completion, prompt) < 1e-4
            assert error(case.model, completion, prompt) > 1e-2
            assert (completion.versions == version).all()


@needs_vllm
def test_an_update_reaches_completions_in_flight(case: Case, tiny_model_dir: str) -> None:
    before, after = (stirred(tiny_model_dir, seed) for seed in (3, 4))
    case.engine.update_weights(before.weights_for(case.engine.adapter_rank), 3)
    finished = case.begin_long()
    case.engine.update_weights(after.weights_for(case.engine.adapter_rank), 4)
    results = finished | case.wait(24 - len(finished))
    mixed = [c for c in results.values() if not isinstance(c, Failed) and len(set(c.versions.tolist())) == 2]
    assert mixed
    for completion in mixed:
        for version, policy in ((3, before), (4, after)):
            where = completion.versions == version
            assert error(merged(policy, tiny_model_dir), completion, where=where) < 1e-4


@needs_vllm
def test_what_is_no_set_of_adapters_is_refused_and_the_old_ones_stay(case: Case, tiny_model_dir: str) -> None:
    policy = stirred(tiny_model_dir, 5)
    case.engine.update_weights(policy.weights_for(case.engine.adapter_rank), 5)
    with pytest.raises(SyncError, match="keeps its adapters"):
        case.engine.update_weights(policy.named_weights(), 6)
    (completion,) = case.generate([ask()])
    assert (completion.versions == 5).all()
    assert error(merged(policy, tiny_model_dir), completion) < 1e-4


@needs_vllm
def test_a_run_sends_adapters_alone(tiny_policy_dir: str) -> None:
    lora = LoRA(RANK, 6.0, LAYERS)
    engine = VLLMEmbedded(kv_cache_gib=0.25, adapter_rank=RANK)
    settings = {"lora": lora, "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)}
    run = fit(tiny_policy_dir, settings, {"engine": engine}, max_steps=3)
    errors = run.metrics.of("sync/parity_error")
    assert len(errors) == 3
    assert max(errors) < 1e-4
    adapters = sum(p.numel() for p in run.module.policy.parameters() if p.requires_grad)  # type: ignore[union-attr]
    assert run.metrics.of("sync/bytes") == [4 * adapters] * 3


def test_an_engine_for_other_adapters_is_refused(tiny_model_dir: str) -> None:
    engine = VLLMEmbedded(adapter_rank=RANK + 1)
    for policy in (Policy(tiny_model_dir), stirred(tiny_model_dir, 0)):
        with pytest.raises(ConfigError, match=r"adapter_rank to model\.lora\.rank") as caught:
            policy.weights_for(engine.adapter_rank)
        assert "\n" not in str(caught.value)
    every = stirred(tiny_model_dir, 0).weights_for(None)
    ExpectedWeights.of(tiny_model_dir).check({name: weight.shape for name, weight in every})


@pytest.mark.parametrize("rank", [0, -1, 513])
def test_a_rank_that_vllm_cannot_reserve_memory_for_is_refused(rank: int) -> None:
    with pytest.raises(ConfigError, match="adapter_rank"):
        VLLMEmbedded(adapter_rank=rank)


def test_memory_is_reserved_for_the_next_rank_of_vllms() -> None:
    assert vllm_arguments(None) == {}
    assert [vllm_arguments(rank)["max_lora_rank"] for rank in (1, 2, 8, 9, 512)] == [1, 8, 8, 16, 512]


def test_names_and_shapes_of_adapters_are_checked(tiny_model_dir: str) -> None:
    expected = ExpectedAdapters(ExpectedWeights.of(tiny_model_dir), 4)
    layer = "model.layers.0.mlp.up_proj"
    good = {f"{layer}.lora_A.weight": (4, 64), f"{layer}.lora_B.weight": (128, 4)}
    expected.check(good)
    a, b = good
    for bad in (
        {},
        {a: good[a]},
        {a: (4, 65), b: good[b]},
        {a: (3, 64), b: (128, 3)},
        good | {"model.norm.lora_A.weight": (4, 64)},
        good | {"model.layers.9.mlp.up_proj.lora_A.weight": (4, 64)},
        good | {"model.norm.weight": (64,)},
        {name.replace("up", "gate"): shape for name, shape in good.items()},
    ):
        with pytest.raises(SyncError, match="keeps its adapters"):
            expected.check(bad)
    expected.check(good)
