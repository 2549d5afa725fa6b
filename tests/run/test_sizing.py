"""A recipe is sized by what its classes say, whatever they are called; one that does not fit is told what to do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.generate import TransformersEngine, VLLMEmbedded, VLLMRemote
from dppo_lightning.run.doctor.memory import (
    GIB,
    ModelShape,
    Plan,
    estimate,
    total,
)
from dppo_lightning.run.doctor.recipe import plan_from_recipe, remedies, report
from dppo_lightning.scaling import FSDP2Strategy, ZeroStrategy
from dppo_lightning.trust_region import BinaryTV, FullTV, TrustRegion
from tests.helpers.places import ROOT
from tests.helpers.sizes import recipe

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
