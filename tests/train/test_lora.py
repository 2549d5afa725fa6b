"""LoRA: adapters alone are trained, and everything else sees the model that they make."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from dppo_lightning.base.batch import pack
from dppo_lightning.base.errors import ConfigError
from dppo_lightning.base.packing import Layout
from dppo_lightning.generate.engine import ExpectedWeights
from dppo_lightning.generate.vllm.embedded import VLLMEmbedded
from dppo_lightning.sync.named_weights import is_adapter
from dppo_lightning.train.lora import LoRA, adapt
from dppo_lightning.train.module import DPPOModule
from dppo_lightning.train.objective import Objective, ReferenceKL
from dppo_lightning.train.policy import Policy, Unadapted
from dppo_lightning.trust_region import BinaryTV, NoTrustRegion
from tests.helpers.errors import config_error
from tests.helpers.records import random_sequence
from tests.helpers.rewards import ShareOf
from tests.helpers.runs import Run, fit

SMALL = LoRA(rank=4, alpha=8.0)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


SEQUENCES = [
    random_sequence(prompt, tokens, seed, logp=-4.0, advantage=1.0 - seed)
    for seed, (prompt, tokens) in enumerate([(12, 3), (12, 5), (2, 4)])
]


def plain(folder: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def trained(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: p for name, p in policy.model.named_parameters() if p.requires_grad}


def stir(policy: Policy) -> Policy:
    """Adapters that change the model: B is zero when they are new."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in trained(policy).values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return policy


@pytest.fixture(scope="module")
def run(tiny_policy_dir: str) -> Run:
    """Three steps with KL to the reference, two of them on one rollout."""
    settings = {"lora": SMALL, "optimizer": adamw, "kl": ReferenceKL(0.05)}
    return fit(tiny_policy_dir, settings, {"steps_per_rollout": 2}, max_steps=3)


def test_the_engine_is_given_what_peft_itself_would_merge(run: Run) -> None:
    assert run.module.policy is not None
    theirs = get_peft_model(
        plain(run.module.policy_name), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    adapters = {f"base_model.model.{name}": value for name, value in trained(run.module.policy).items()}
    missing, unexpected = theirs.load_state_dict(adapters, strict=False)
    assert not unexpected
    assert not any("lora" in name for name in missing)
    merged = dict(theirs.merge_and_unload().named_parameters())
    mine = run.weights
    assert set(mine) == set(merged)
    for name, weight in merged.items():
        torch.testing.assert_close(mine[name], weight, rtol=0, atol=1e-6)


def test_the_base_stays_as_it_is_and_the_policy_does_not(run: Run) -> None:
    assert run.module.policy is not None
    before = dict(plain(run.module.policy_name).named_parameters())
    named = run.module.policy.model.named_parameters()
    found = {name.replace(".base_layer.", "."): weight for name, weight in named if not is_adapter(name)}
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], weight) for name, weight in before.items())
    changed = [name for name, weight in before.items() if (run.weights[name] - weight).abs().max() > 1e-3]
    assert len(changed) == 2 * 7  # every linear layer of both blocks


def test_the_names_are_those_that_an_engine_expects(run: Run, tiny_policy_dir: str) -> None:
    ExpectedWeights.of(tiny_policy_dir).check({name: weight.shape for name, weight in run.weights.items()})


def test_the_probe_finds_the_merged_weights_in_the_engine(run: Run) -> None:
    errors = run.metrics.of("sync/parity_error")
    assert len(errors) >= 1
    assert max(errors) < 1e-4


def test_the_reference_is_the_untouched_model_and_no_copy_of_it(run: Run, tiny_policy_dir: str) -> None:
    reference = run.module.scorer.reference
    assert isinstance(reference, Unadapted)
    assert reference.policy is run.module.policy
    batch = pack(SEQUENCES, np.ones(3), run.module.layout)
    untouched = Policy(tiny_policy_dir).logp(batch)
    torch.testing.assert_close(reference.logp(batch), untouched, rtol=0, atol=1e-6)
    assert (reference.policy.logp(batch) - untouched).abs().max() > 1e-3  # and the adapters are on again
    assert all(is_adapter(name) == p.requires_grad for name, p in reference.policy.model.named_parameters())
    assert run.metrics.of("train/kl_reference")[0] == pytest.approx(0, abs=1e-6)
    assert run.metrics.of("train/kl_reference")[-1] > 1e-5


def test_the_optimizer_holds_adapters_alone(run: Run) -> None:
    assert run.module.policy is not None
    optimizer = run.module.trainer.optimizers[0]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    wanted = {id(p) for name, p in run.module.policy.model.named_parameters() if is_adapter(name)}
    assert held == wanted
    assert {id(p) for p in optimizer.state} == wanted
    assert len(wanted) == 2 * 2 * 7
    assert all(is_adapter(name) for name in run.record.gradients[0])


def test_adapters_learn_an_easy_task(tiny_policy_dir: str) -> None:
    run = fit(
        tiny_policy_dir,
        {"lora": SMALL, "optimizer": adamw, "trust_region": BinaryTV()},
        {"samples_per_prompt": 8, "reward": ShareOf("abcdefghijklmnopqrstuvwxyz"), "steps_per_rollout": 2},
        max_steps=24,
    )
    rewards = run.metrics.of("train/reward")
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.2


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_follows_every_update(tiny_policy_dir: str) -> None:
    engine = VLLMEmbedded(kv_cache_gib=0.25)
    run = fit(tiny_policy_dir, {"lora": SMALL, "optimizer": adamw}, {"engine": engine}, max_steps=2)
    before = dict(plain(tiny_policy_dir).named_parameters())
    assert max((run.weights[name] - weight).abs().max() for name, weight in before.items()) > 1e-3
    assert len(run.metrics.of("sync/parity_error")) == 2
    assert max(run.metrics.of("sync/parity_error")) < 1e-4


def gradients(policy: Policy, layout: Layout) -> dict[str, torch.Tensor]:
    batch = pack(SEQUENCES, np.full(3, 0.5), layout)
    policy.zero_grad()
    objective = Objective(NoTrustRegion(), ReferenceKL())
    policy.head(policy.hidden_states(batch), batch, objective).loss.backward()  # type: ignore[union-attr]
    return {name: p.grad.clone() for name, p in trained(policy).items() if p.grad is not None}


def test_layouts_agree(tiny_model_dir: str) -> None:
    packed, rows = (stir(seeded(tiny_model_dir, shared_prompts=shared)) for shared in (True, False))
    assert (packed.layout, rows.layout) == ("packed", "rows")
    mine, theirs = (p.logp(pack(SEQUENCES, np.ones(3), p.layout)) for p in (packed, rows))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    compare(gradients(packed, "packed"), gradients(rows, "rows"))


def test_checkpointing_changes_no_gradient(tiny_model_dir: str) -> None:
    stored, recomputed = (stir(seeded(tiny_model_dir, gradient_checkpointing=on)) for on in (False, True))
    calls = []
    layer = recomputed.model.model.layers[0]  # type: ignore[union-attr,index]
    layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    compare(gradients(stored, "packed"), gradients(recomputed, "packed"))
    assert len(calls) == 2  # forward, and once more for the backward pass


def seeded(folder: str, **settings: Any) -> Policy:
    return Policy(folder, lora=SMALL, seed=3, **settings)


def compare(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert len(mine) == 2 * 2 * 7
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert gradient.abs().max() > 1e-6
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_merged_weights_by_the_chain_rule(tiny_model_dir: str) -> None:
    policy = stir(seeded(tiny_model_dir))
    mine = gradients(policy, "packed")
    whole = Policy(tiny_model_dir)
    whole.model.load_state_dict(dict(policy.named_weights()), strict=False)
    by_weight = gradients(whole, "packed")
    adapters = {name: weight.detach() for name, weight in policy.model.named_parameters() if is_adapter(name)}
    for layer in {name.partition(".lora_")[0] for name in adapters}:
        by_product = 2.0 * by_weight[f"{layer}.weight"]  # alpha / rank = 2
        low, high = (f"{layer}.lora_{which}.default.weight" for which in "AB")
        compare_close(mine[low], adapters[high].T @ by_product)
        compare_close(mine[high], by_product @ adapters[low].T)


def compare_close(mine: torch.Tensor, wanted: torch.Tensor) -> None:
    assert wanted.abs().max() > 1e-6
    torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-5)


def test_first_values_do_not_come_from_the_device_that_is_the_default(tiny_model_dir: str) -> None:
    """On GPUs Lightning makes them the default while a model is built; here another device stands in for them."""
    wanted, other = (AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32) for _ in range(2))
    adapt(wanted, SMALL, seed=3)
    with torch.device("meta"):
        adapt(other, SMALL, seed=3)
    for name, parameter in wanted.named_parameters():
        assert torch.equal(other.get_parameter(name), parameter), name


def test_first_values_depend_on_the_seed_alone(tiny_model_dir: str) -> None:
    drawn = []
    for rng, seed in ((1, 3), (2, 3), (1, 4)):
        torch.manual_seed(rng)
        drawn.append(trained(Policy(tiny_model_dir, lora=SMALL, seed=seed)))
        after = torch.rand(1)
        torch.manual_seed(rng)
        assert torch.equal(after, torch.rand(1))
    first, same, other = drawn
    assert all(torch.equal(first[name], same[name]) for name in first)
    for name in first:
        assert torch.equal(first[name], other[name]) == (".lora_B." in name)


def test_layers_that_store_their_weight_transposed_are_merged_too(tmp_path: Path) -> None:
    size = {"vocab_size": 96, "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config(**size)).save_pretrained(tmp_path)
    policy = stir(Policy(str(tmp_path), lora=LoRA(rank=2, target_modules=["c_attn", "c_fc"])))
    merged = plain(str(tmp_path))
    merged.load_state_dict(dict(policy.named_weights()), strict=False)
    ids = torch.arange(10)[None]
    torch.testing.assert_close(merged.eval()(ids).logits, policy.model(ids).logits, rtol=1e-4, atol=1e-5)
    assert (plain(str(tmp_path)).eval()(ids).logits - policy.model(ids).logits).abs().max() > 1e-2


def test_merging_leaves_the_adapters_in_place(tiny_model_dir: str) -> None:
    policy = stir(seeded(tiny_model_dir))
    before = copy.deepcopy(policy.model.state_dict())
    once, again = dict(policy.named_weights()), dict(policy.named_weights())
    assert all(torch.equal(once[name], again[name]) for name in once)
    after = policy.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"rank": 0}, "rank must be >= 1"),
        ({"alpha": 0.0}, "alpha must be > 0"),
        ({"alpha": float("inf")}, "alpha must be > 0"),
        ({"target_modules": []}, "names no layer"),
        ({"target_modules": [""]}, "names no layer"),
        ({"target_modules": "q_proj"}, "list of names"),
    ],
)
def test_a_wrong_value_is_refused_at_once(settings: dict[str, Any], word: str) -> None:
    assert word in config_error(LoRA, **settings)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("q_prj", ["matches no layer", "'q_proj'"]),
        ("self_attn", ["no linear layer"]),
        ("lm_head", ["output projection", "q_proj"]),
        ("model.embed_tokens", ["embedding", "q_proj"]),
    ],
)
def test_a_target_that_cannot_be_adapted_is_named(target: str, words: list[str], tiny_untied_dir: str) -> None:
    message = config_error(Policy, tiny_untied_dir, lora=LoRA(target_modules=["v_proj", target]))
    assert all(word in message for word in [repr(target), *words])


def test_chosen_layers_alone_are_adapted(tiny_model_dir: str) -> None:
    policy = Policy(tiny_model_dir, lora=LoRA(rank=3, target_modules=["v_proj", "layers.1.mlp.up_proj"]))
    owners = {name.rpartition(".lora_")[0].removeprefix("model.layers.") for name in trained(policy)}
    assert owners == {"0.self_attn.v_proj", "1.self_attn.v_proj", "1.mlp.up_proj"}
    assert all(3 in weight.shape for weight in trained(policy).values())


def test_without_peft_the_message_says_what_to_install(tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"dppo-lightning\[lora\]"):
        adapt(plain(tiny_model_dir), LoRA())


def test_lora_and_frozen_exclude_each_other(tiny_model_dir: str) -> None:
    assert "drop one" in config_error(DPPOModule, tiny_model_dir, lora=LoRA(), frozen=["model.norm.*"])
