"""What a recipe is said to need, against independent counts of parameters and of what autograd really keeps."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import Qwen3MoeConfig

from dppo_lightning.base.batch import pack
from dppo_lightning.base.records import Sequence
from dppo_lightning.run.doctor.memory import (
    GIB,
    ModelShape,
    Plan,
    activations,
    engine,
    gathered,
    head,
    model_states,
    total,
)
from dppo_lightning.run.doctor.recipe import plan_from_recipe
from dppo_lightning.train.policy import Policy
from tests.helpers.places import ROOT
from tests.helpers.sizes import NUMBERS, recipe, save_llama


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_saved_file(tied: bool, tmp_path: Path) -> None:
    shape = ModelShape.from_name(save_llama(tmp_path / "model", tied))
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        saved = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert shape.parameters == sum(saved.values())
    n = NUMBERS
    layer = n["H"] * n["d"] * (2 * n["heads"] + 2 * n["kv"]) + 3 * n["H"] * n["I"] + 2 * n["H"]
    assert shape.parameters == n["L"] * layer + n["H"] * n["V"] * (1 if tied else 2) + n["H"]
    assert shape.largest_layer == layer
    assert shape.outside == shape.parameters - n["L"] * layer
    assert (shape.query, shape.key_value, shape.intermediate) == (128, 64, 224)


def test_a_mixture_of_experts_counts_every_expert_and_activates_some(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=6, num_experts_per_tok=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    shape = ModelShape.from_name(str(tmp_path))
    attention = 32 * 16 * (2 * 2 + 2 * 1) + 2 * 16  # with norms of queries and keys
    layer = attention + 6 * 3 * 32 * 16 + 6 * 32 + 2 * 32
    assert shape.parameters == 2 * layer + 2 * 100 * 32 + 32
    assert shape.intermediate == 2 * 16


def test_adapters_are_counted_as_they_are_made(shape: ModelShape) -> None:
    n = NUMBERS
    q, kv = n["heads"] * n["d"], n["kv"] * n["d"]
    assert shape.adapters(8, ("q_proj", "down_proj")) == n["L"] * 8 * ((n["H"] + q) + (n["I"] + n["H"]))
    every = 2 * (n["H"] + q) + 2 * (n["H"] + kv) + 3 * (n["H"] + n["I"])
    assert shape.adapters(8, None) == n["L"] * 8 * every


@pytest.mark.parametrize(
    ("plan", "weights", "gradients", "state"),
    [
        (Plan(), 4, 4, 8),
        (Plan(ranks=4, ddp=True), 4, 8, 8),
        (Plan(precision="bf16-mixed"), 4 + 2, 4, 8),
        (Plan(precision="bf16-true"), 2, 2, 4),
        (Plan(optimizer_bytes=0), 4, 4, 0),
        (Plan(ranks=4, deepspeed=True, stage=1, precision="bf16-mixed"), 2, 4, 12 / 4),
        (Plan(ranks=4, deepspeed=True, stage=2, precision="bf16-mixed"), 2, 4 / 4, 12 / 4),
        (Plan(ranks=4, deepspeed=True, stage=3, precision="bf16-true"), 2 / 4, 4 / 4, 12 / 4),
        (Plan(ranks=4, deepspeed=True, stage=3), 4 / 4, 4 / 4, 12 / 4),
        (Plan(ranks=4, deepspeed=True, stage=3, precision="bf16-mixed", offload_parameters=True), 0, 4 / 4, 12 / 4),
        (Plan(ranks=4, deepspeed=True, stage=2, precision="bf16-mixed", offload_optimizer=True), 2, 4 / 4, 0),
        (Plan(ranks=4, stage=3), 4 / 4, 4 / 4, 8 / 4),
        (Plan(ranks=4, stage=3, precision="bf16-mixed"), 4 / 4, 4 / 4, 8 / 4),
    ],
)
def test_bytes_of_a_parameter(shape: ModelShape, plan: Plan, weights: float, gradients: float, state: float) -> None:
    parts = {part.name: part.bytes / shape.parameters for part in model_states(shape, plan)}
    assert parts["weights"] + parts.get("weights in 16 bits", 0) == pytest.approx(weights)
    assert parts["gradients"] == pytest.approx(gradients)
    assert parts["optimizer state"] == pytest.approx(state)


@pytest.mark.parametrize("piece", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_the_table_of_the_docs_is_what_the_doctor_counts(piece: str, shape: ModelShape) -> None:
    """Bytes of a parameter on one of N ranks, in float32."""
    page = (ROOT / "docs" / "scaling.md").read_text()
    (formula,) = re.findall(rf"^\| `{piece}\.yaml` \| ([\d +/N]+)", page, re.MULTILINE)
    plan = plan_from_recipe(recipe("--config", str(ROOT / "configs" / "scaling" / f"{piece}.yaml")), shape, 4)
    parts = {part.name: part.bytes / shape.parameters for part in model_states(shape, plan)}
    counted = parts["weights"] + parts["gradients"] + parts["optimizer state"]
    assert counted == pytest.approx(eval(formula, {"N": 4}))


def test_zero_gives_the_numbers_of_its_paper_and_two_bytes_more_for_the_sum_of_gradients() -> None:
    """Figure 1 of arXiv 1910.02054: 7.5B parameters on 64 ranks take 31.4, 16.6 and 1.9 GB."""
    shape = ModelShape(7_500_000_000, 0, (), 1, 1, 1, 1, 1, 1, None)
    plan = Plan(ranks=64, deepspeed=True, precision="bf16-mixed")
    for stage, paper, more in ((1, 31.4, 15.0), (2, 16.6, 15.0 / 64), (3, 1.9, 15.0 / 64)):
        parts = model_states(shape, replace(plan, stage=stage))  # type: ignore[arg-type]
        states = [part for part in parts if part.name in ("weights", "gradients", "optimizer state")]
        assert total(states) / 1e9 == pytest.approx(paper + more, rel=0.02)


def test_what_is_whole_at_a_time_is_counted(shape: ModelShape) -> None:
    def parts(**plan: Any) -> dict[str, float]:
        return {part.name: part.bytes for part in gathered(shape, Plan(ranks=4, **plan), 2)}

    sizes = {"reduce_bucket": 7, "max_live": 1}
    zero: dict[str, Any] = {"deepspeed": True, "precision": "bf16-true", **sizes}
    assert parts(stage=3, **zero) == {
        "buckets of gradients": 7 * 2,
        "weights that are whole": 2 * max(shape.largest_layer, shape.outside),
    }
    assert parts(stage=3, **zero | {"max_live": 10**9})["weights that are whole"] == 2 * shape.parameters
    assert parts(stage=2, **zero) == {"buckets of gradients": 2 * 7 * 2}
    assert parts(stage=1, **zero) == {}
    mixed, exact = parts(stage=3, precision="bf16-mixed"), parts(stage=3)
    assert mixed["layers that are whole"] == shape.largest_layer * (2 * 2 + 2 + 4)
    assert exact["layers that are whole"] == shape.largest_layer * (2 * 4 + 4 + 4)
    assert mixed["embedding and projection"] == exact["embedding and projection"] == 8 * shape.outside
    assert parts(ddp=True) == {}


def test_fsdp2_has_no_copy_of_every_weight_in_16_bits(shape: ModelShape) -> None:
    names = {part.name for part in model_states(shape, Plan(ranks=4, stage=3, precision="bf16-mixed"))}
    assert "weights in 16 bits" not in names


def test_gradients_of_adapters_are_the_adapters_alone(shape: ModelShape) -> None:
    parts = {part.name: part.bytes for part in model_states(shape, Plan(lora_rank=8))}
    adapters = shape.adapters(8, None)
    assert parts["weights"] == 4 * (shape.parameters + adapters)
    assert (parts["gradients"], parts["optimizer state"]) == (4 * adapters, 8 * adapters)


def kept(policy: Policy, batch: Any) -> int:
    """Bytes that autograd keeps of a forward pass, each storage once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    sizes: dict[int, int] = {}
    alive = []

    def pack_(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_, lambda tensor: tensor):
        policy.hidden_states(batch)
    return sum(sizes.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_activations_are_about_what_autograd_keeps(
    folder: str, shape: ModelShape, checkpointing: bool, shared: bool
) -> None:
    plan = Plan(gradient_checkpointing=checkpointing, micro_batch=4, prompt_tokens=16, new_tokens=112)
    ids = np.random.default_rng(0).integers(0, NUMBERS["V"], (4, 128))
    zeros = np.zeros(112)
    sequences = [Sequence(row, np.arange(16, 128), zeros.astype(np.float32), zeros.astype(int)) for row in ids]
    policy = Policy(folder, gradient_checkpointing=checkpointing, shared_prompts=shared)
    measured = kept(policy, pack(sequences, np.ones(4), policy.layout))
    said = activations(shape, plan).bytes
    if checkpointing:  # the layer that is recomputed is not kept by the forward pass
        h, q, k, i = shape.hidden, shape.query, shape.key_value, shape.intermediate
        said -= 512 * (16 * h + 4 * (2 * h + 3 * q + 2 * k + 4 * i))
    assert 0.8 < said / measured < 1.25


def test_the_head_and_the_engine(shape: ModelShape) -> None:
    n, mib = NUMBERS, 2**20
    plan = Plan(micro_batch=2, prompt_tokens=10, new_tokens=20, logits_mib=16, rollout_bytes=2, engine_share=None)
    assert head(shape, plan).bytes == 2 * 16 * mib + 4 * n["V"] * n["H"] + 4 * 2 * 20 * n["H"]
    weights, cache = engine(shape, replace(plan, kv_cache=5 * mib), GIB)
    assert (weights.bytes, cache.bytes) == (2 * shape.parameters, 5 * mib)
    per_token = 2 * n["L"] * n["kv"] * n["d"] * 2
    assert f"holds {5 * mib // (per_token * 30):,} sequences of 30 tokens" in cache.formula
    shared = engine(shape, replace(plan, engine_share=0.5), GIB)
    assert total(shared) == pytest.approx(0.5 * GIB)
    assert engine(shape, replace(plan, engine="elsewhere"), GIB) == []
    assert total(engine(shape, replace(plan, engine_share=0.2, engines=3), GIB)) == pytest.approx(0.6 * GIB)
