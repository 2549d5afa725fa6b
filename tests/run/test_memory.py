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
import yaml
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig

from dppo_lightning.base.batch import pack
from dppo_lightning.base.errors import ConfigError
from dppo_lightning.base.records import Sequence
from dppo_lightning.generate import TransformersEngine, VLLMEmbedded, VLLMRemote
from dppo_lightning.run.cli import RecipeReader
from dppo_lightning.run.doctor.memory import (
    GIB,
    ModelShape,
    Plan,
    activations,
    engine,
    estimate,
    gathered,
    head,
    model_states,
    total,
)
from dppo_lightning.run.doctor.recipe import plan_from_recipe, remedies, report
from dppo_lightning.scaling import FSDP2Strategy, ZeroStrategy
from dppo_lightning.train.policy import Policy
from dppo_lightning.trust_region import BinaryTV, FullTV, TrustRegion
from tests.helpers.places import ROOT

NUMBERS = {"H": 96, "I": 224, "L": 3, "V": 320, "heads": 4, "kv": 2, "d": 32}


ZERO = "dppo_lightning.scaling.ZeroStrategy"


class Mine(ZeroStrategy):
    """Stage 3 unless it is told otherwise."""

    def __init__(self, stage: int = 3, **settings: Any) -> None:
        super().__init__(stage, **settings)  # type: ignore[arg-type]


class MyEngine(VLLMEmbedded):
    """With a share of its own."""

    def __init__(self, gpu_memory_utilization: float = 0.3) -> None:
        super().__init__(gpu_memory_utilization=gpu_memory_utilization)


class MyShards(FSDP2Strategy):
    """Shards as its base class does."""


class MyServers(VLLMRemote):
    """Servers on other machines."""

    def __init__(self, urls: list[str] | None = None) -> None:
        super().__init__(urls=urls or ["http://127.0.0.1:8000"])


class MyTransformers(TransformersEngine):
    """On the GPU, unless the recipe says otherwise."""

    def __init__(self, device: str = "cuda", batch_size: int = 7) -> None:
        super().__init__(device=device, batch_size=batch_size)


class Whole(TrustRegion):
    """Derives from no region with a table, and asks for one when it is built."""

    def __init__(self, compare: str = "everything") -> None:
        super().__init__()
        self.needs = frozenset({"full"} if compare == "everything" else ())


class FullOfHope(BinaryTV):
    """Compares two numbers, whatever its name."""


class Everything(FullTV):
    """Compares whole distributions."""


def llama(folder: Path, tied: bool = True) -> str:
    n = NUMBERS
    config = LlamaConfig(
        vocab_size=n["V"], hidden_size=n["H"], intermediate_size=n["I"], num_hidden_layers=n["L"], head_dim=n["d"],
        num_attention_heads=n["heads"], num_key_value_heads=n["kv"], tie_word_embeddings=tied,
        max_position_embeddings=512, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return llama(tmp_path_factory.mktemp("shapes") / "tied")


@pytest.fixture(scope="module")
def shape(folder: str) -> ModelShape:
    return ModelShape.from_name(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_saved_file(tied: bool, tmp_path: Path) -> None:
    shape = ModelShape.from_name(llama(tmp_path / "model", tied))
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


def recipe(*options: str) -> dict[str, Any]:
    config = str(ROOT / "configs" / "quickstart.yaml")
    return RecipeReader(["fit", "--config", config, *options]).config.fit.as_dict()


def test_a_recipe_is_read(shape: ModelShape) -> None:
    options = ["--trainer.accumulate_grad_batches", "4", "--trainer.precision", "bf16-mixed", "--model.kl.coefficient",
               "0.1", "--model.trust_region", "FullTV", "--data.engine.kv_cache_gib", "null",
               "--data.engine.gpu_memory_utilization", "0.4",
               "--data.rollout_dtype", "bfloat16", "--data.max_prompt_tokens", "50"]  # fmt: skip
    plan = plan_from_recipe(recipe(*options), shape, 2)
    assert plan.micro_batch == 32 * 8 // (4 * 2)
    assert (plan.prompt_tokens, plan.new_tokens) == (50, 10)
    assert (plan.precision, plan.reference, plan.whole_vocabulary, plan.ddp) == ("bf16-mixed", True, True, True)
    assert (plan.engine, plan.engine_share, plan.rollout_bytes) == ("vllm", 0.4, 2)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ({"class_path": "dppo_lightning.scaling.ZeroStrategy", "init_args": {"stage": 1}}, (1, True, False)),
        ({"class_path": ZERO, "init_args": {"offload_optimizer": "cpu"}}, (2, True, True)),
        ({"class_path": f"{__name__}.Mine"}, (3, True, False)),
        ({"class_path": "dppo_lightning.scaling.FSDP2Strategy"}, (3, False, False)),
        ({"class_path": f"{__name__}.MyShards"}, (3, False, False)),
        ("auto", (0, False, False)),
        (None, (0, False, False)),
    ],
)
def test_strategies_are_understood(shape: ModelShape, strategy: Any, expected: tuple[int, bool, bool]) -> None:
    config = recipe()
    config["trainer"]["strategy"] = strategy
    plan = plan_from_recipe(config, shape, 2)
    assert (plan.stage, plan.deepspeed, plan.offload_optimizer) == expected


@pytest.mark.parametrize(
    "strategy", ["deepspeed_stage_2", "fsdp", "lightning.pytorch.strategies.ModelParallelStrategy"]
)
def test_strategies_that_train_wrongly_are_not_sized(shape: ModelShape, strategy: str) -> None:
    config = recipe()
    config["trainer"]["strategy"] = {"class_path": strategy} if "." in strategy else strategy
    with pytest.raises(ConfigError, match="use configs/scaling"):
        plan_from_recipe(config, shape, 2)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--config", "configs/scaling/ddp.yaml"], {"ddp": False}),  # its gradients are views of the buckets
        (["--trainer.strategy", "ddp"], {"ddp": True}),
        (
            ["--config", "configs/scaling/zero3.yaml", "--trainer.strategy.offload_parameters", "cpu"],
            {"offload_parameters": True, "offload_optimizer": False, "max_live": 10**9, "reduce_bucket": 2 * 10**8},
        ),
        (
            ["--config", "configs/scaling/zero2.yaml", "--trainer.strategy.reduce_bucket_size", "5"],
            {"reduce_bucket": 5, "offload_parameters": False},
        ),
        (["--data.engine", "VLLMRemote", "--data.engine.servers", "4"], {"engine": "vllm", "engines": 4}),
        (["--data.engine", f"{__name__}.MyEngine"], {"engine": "vllm", "engine_share": 0.3}),
        (["--data.engine", "TransformersEngine"], {"engine": "elsewhere"}),
        (["--data.engine", f"{__name__}.MyTransformers"], {"engine": "transformers", "engine_sequences": 7}),
        (
            ["--data.engine", f"{__name__}.MyServers", "--data.engine.urls", "[http://127.0.0.1:9]"],
            {"engine": "elsewhere"},
        ),
        (["--model.trust_region", "FullKL"], {"whole_vocabulary": True}),
        (["--model.trust_region", "BinaryTV"], {"whole_vocabulary": False}),
        (["--model.trust_region", f"{__name__}.FullOfHope"], {"whole_vocabulary": False}),
        (["--model.trust_region", f"{__name__}.Everything"], {"whole_vocabulary": True}),
        (["--model.trust_region", f"{__name__}.Whole"], {"whole_vocabulary": True}),
        (
            ["--model.trust_region", f"{__name__}.Whole", "--model.trust_region.compare", "little"],
            {"whole_vocabulary": False},
        ),
        (["--config", "combined.yaml"], {"whole_vocabulary": True}),
        (["--model.optimizer", "torch.optim.SGD"], {"optimizer_bytes": 0}),
        (["--model.optimizer", "torch.optim.SGD", "--model.optimizer.momentum", "0.9"], {"optimizer_bytes": 4}),
        (["--model.optimizer", "torch.optim.Adam"], {"optimizer_bytes": 8}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_recipe_is_sized_by_what_its_classes_say(
    options: list[str], expected: dict[str, Any], shape: ModelShape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever they are called."""
    monkeypatch.chdir(ROOT)
    masks = [{"class_path": "BinaryTV"}, {"class_path": "FullTV"}]
    combined = {"model": {"trust_region": {"class_path": "Combined", "init_args": {"masks": masks}}}}
    (tmp_path / "combined.yaml").write_text(yaml.safe_dump(combined))
    options = [str(tmp_path / "combined.yaml") if word == "combined.yaml" else word for word in options]
    plan = plan_from_recipe(recipe(*options), shape, 2)
    assert {name: getattr(plan, name) for name in expected} == expected


def test_a_recipe_that_fits_needs_nothing(folder: str) -> None:
    _, lines, fits = report(recipe("--model.policy", folder), gpus=1, gpu_bytes=40 * GIB)
    assert fits
    assert lines[-1].startswith("ok: it fits")


def test_one_that_does_not_is_told_what_to_switch_on_until_it_fits(folder: str, shape: ModelShape) -> None:
    config = recipe("--model.policy", folder)
    plan = plan_from_recipe(config, shape, 2)
    gpu = 1.7 * GIB
    assert total(estimate(shape, plan, gpu)) > gpu
    _, lines, fits = report(config, gpus=2, gpu_bytes=gpu)
    assert not fits
    assert any("gradient_checkpointing: true" in line for line in lines)
    assert lines[-1] == "  then it fits"
    _, lines, _ = report(config, gpus=2, gpu_bytes=0.2 * GIB)
    assert "more GPUs" in lines[-1]


def test_no_remedy_is_offered_twice(shape: ModelShape) -> None:
    plan = Plan(ranks=2, ddp=True, micro_batch=8)
    while options := remedies(plan):
        plan = replace(plan, **options[0][1])
        assert options[0] not in remedies(plan)
        if plan.lora_rank is not None:
            break
    assert plan.engine == "elsewhere"
