"""Memory that a recipe asks for, and what to switch on when it does not fit.

The recipe's classes and objects are asked, not their names, so that a user's own are sized as they are: a region and an
optimizer are built and asked, strategies and engines are known by the class that they derive from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import OptimizerCallable
from rich.table import Table
from torch import Tensor, nn

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.generate.transformers_engine import TransformersEngine
from dppo_lightning.generate.vllm.embedded import VLLMEmbedded
from dppo_lightning.generate.vllm.remote import VLLMRemote
from dppo_lightning.run.doctor.memory import GIB, ModelShape, Part, Plan, estimate, total
from dppo_lightning.scaling.sharding import FSDP2Strategy
from dppo_lightning.scaling.strategies import check_kind, check_strategy
from dppo_lightning.scaling.zero import ZeroStrategy
from dppo_lightning.trust_region import TrustRegion

ASSUMED_PROMPT = 512
"""Tokens of the longest prompt, where neither ``data.max_prompt_tokens`` nor the model's context says less."""

ROLLOUT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one of the engine's weights, by ``data.rollout_dtype``."""


def plan_from_recipe(recipe: Mapping[str, Any], shape: ModelShape, gpus: int) -> Plan:
    """Read off a recipe what decides over memory.

    Args:
        recipe: Parsed configuration of ``dppo fit``.
        shape: Sizes of the recipe's model.
        gpus: Number of GPUs, each with one training process.

    Raises:
        ConfigError: The recipe's strategy is one that trains wrongly.
    """
    trainer, model, data = recipe["trainer"], recipe["model"], recipe["data"]
    new = data["max_new_tokens"]
    room = ASSUMED_PROMPT if shape.context is None else min(ASSUMED_PROMPT, shape.context - new)
    sequences = data["prompts_per_step"] * data["samples_per_prompt"]
    lora = model.get("lora") or {}
    lora = lora.get("init_args", lora)
    targets = lora.get("target_modules", "all-linear")
    region = instantiate(model.get("trust_region"), TrustRegion)
    return Plan(
        ranks=gpus,
        **_sharding(trainer.get("strategy"), gpus),
        precision=_precision(trainer.get("precision")),
        optimizer_bytes=optimizer_bytes(model.get("optimizer")),
        gradient_checkpointing=bool(model.get("gradient_checkpointing")),
        lora_rank=lora.get("rank"),
        lora_targets=None if isinstance(targets, str) else tuple(targets),
        micro_batch=math.ceil(sequences / (gpus * trainer["accumulate_grad_batches"])),
        prompt_tokens=data.get("max_prompt_tokens") or room,
        new_tokens=new,
        logits_mib=model.get("logits_mib", 64),
        whole_vocabulary="full" in getattr(region, "needs", ()) or bool(model.get("divergence_diagnostics")),
        reference=_number((model.get("kl") or {}), "coefficient") > 0,
        rollout_bytes=ROLLOUT_BYTES[data["rollout_dtype"]],
        **_engine(data.get("engine")),
    )


def instantiate(value: Any, kind: Any) -> Any:
    """Build the object that a part of a parsed recipe describes; None where the recipe leaves it out.

    Args:
        value: Part of the recipe, with ``class_path`` and ``init_args``; or None.
        kind: Type of the object, as the recipe's parser knows it.
    """
    if value is None:
        return None
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--part", type=kind)
    # "instantiate" since jsonargparse 4.49, where the older name warns
    build = parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes
    return build(parser.parse_object({"part": value})).part


def named_class(value: Any) -> tuple[type | None, dict[str, Any]]:
    """Import the class that a part of a parsed recipe names; nothing is built.

    Returns:
        The class, None where the recipe names none; and its settings, with the defaults of it and of its bases.
    """
    if not isinstance(value, Mapping):
        return None, {}
    module, _, name = value["class_path"].rpartition(".")
    kind = getattr(import_module(module), name)
    known = [p for base in reversed(kind.__mro__) for p in signature(base.__init__).parameters.values()]
    defaults = {parameter.name: parameter.default for parameter in known if parameter.default is not parameter.empty}
    return kind, defaults | dict(value.get("init_args") or {})


def optimizer_bytes(value: Any) -> int:
    """Bytes of optimizer state for each float32 parameter, measured after a step on a small matrix."""
    make = instantiate(value, OptimizerCallable) or torch.optim.AdamW
    parameter = nn.Parameter(torch.zeros(64, 64))
    optimizer = make([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor)]
    return round(sum(tensor.numel() * tensor.element_size() for tensor in state) / parameter.numel())


def _number(value: Mapping[str, Any], name: str) -> float:
    """Number in a setting ``name``, of a class with arguments or of plain arguments; 0 where it is not set."""
    return float(value.get("init_args", value).get(name) or 0)


def _precision(value: Any) -> str:
    """Long name of a value of ``trainer.precision``."""
    names = {"None": "32-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
    return names.get(str(value), str(value))


def _sharding(strategy: Any, gpus: int) -> dict[str, Any]:
    """Fields of the plan that ``trainer.strategy``, a name or a class with arguments, decides."""
    kind, given = named_class(strategy)
    if kind is None:
        check_strategy(strategy)
        return {"ddp": gpus > 1}
    check_kind(kind.__name__, kind, given)
    if issubclass(kind, ZeroStrategy):
        return {
            "stage": given["stage"],
            "deepspeed": True,
            "offload_optimizer": given["offload_optimizer"] != "none",
            "offload_parameters": given["offload_parameters"] != "none",
            "reduce_bucket": given["reduce_bucket_size"],
            "max_live": given["max_live_parameters"],
        }
    if issubclass(kind, FSDP2Strategy):
        return {"stage": 3}
    return {"ddp": gpus > 1 and not given.get("gradient_as_bucket_view")}


def starts_vllm(engine: Any) -> bool:
    """Whether a value of ``data.engine`` starts vLLM on this machine; without a value the engine is VLLMEmbedded."""
    kind, given = named_class(engine)
    return kind is None or issubclass(kind, VLLMEmbedded) or (issubclass(kind, VLLMRemote) and not given["urls"])


def _engine(engine: Any) -> dict[str, Any]:
    """Fields of the plan that ``data.engine`` decides; without a value vLLM shares the first GPU with the trainer."""
    kind, given = named_class(engine)
    if kind is not None and issubclass(kind, TransformersEngine):
        on_gpu = str(given.get("device", "cpu")) != "cpu"
        return {"engine": "transformers" if on_gpu else "elsewhere", "engine_sequences": given.get("batch_size", 64)}
    if not starts_vllm(engine):
        return {"engine": "elsewhere"}
    cache = given.get("kv_cache_gib")
    return {
        "engine": "vllm",
        "engine_share": None if cache else given.get("gpu_memory_utilization", 0.5),
        "kv_cache": int(cache * GIB) if cache else None,
        "engine_sequences": given.get("max_num_seqs", 256),
        "engines": given.get("servers", 1),  # all of them start on the first GPU
    }


def remedies(plan: Plan) -> list[tuple[str, dict[str, Any]]]:
    """List what can still be switched on, the cheapest first: (what to write, fields of the plan that it changes)."""
    zero = {"deepspeed": True, "ddp": False}
    lora = {"lora_rank": 16, "stage": 0, "deepspeed": False, "ddp": plan.ranks > 1}
    lora |= {"offload_optimizer": False, "offload_parameters": False}
    full, several, engine_here = plan.lora_rank is None, plan.ranks > 1, plan.engine != "elsewhere"
    every: list[tuple[bool, str, dict[str, Any]]] = [
        (plan.precision == "32-true", "trainer.precision: bf16-mixed", {"precision": "bf16-mixed"}),
        (not plan.gradient_checkpointing, "model.gradient_checkpointing: true", {"gradient_checkpointing": True}),
        (
            plan.micro_batch > 1,
            f"trainer.accumulate_grad_batches: {plan.micro_batch} times as many, one sequence a micro-batch",
            {"micro_batch": 1},
        ),
        (engine_here and plan.rollout_bytes == 4, "data.rollout_dtype: bfloat16", {"rollout_bytes": 2}),
        (
            plan.engine == "vllm" and (plan.engine_share or 0) > 0.3,
            "data.engine.init_args.gpu_memory_utilization: 0.3",
            {"engine_share": 0.3},
        ),
        (several and full and plan.stage < 2, "ZeRO stage 2 (trainer.strategy)", zero | {"stage": 2}),
        (several and full and plan.stage < 3, "ZeRO stage 3 (trainer.strategy)", zero | {"stage": 3}),
        (full and not plan.offload_optimizer, "ZeRO with offload_optimizer: cpu", {"offload_optimizer": True}),
        (engine_here, "the engine on a GPU or node of its own", {"engine": "elsewhere"}),
        (full, "LoRA adapters of rank 16 instead of a full fine-tune, without ZeRO (model.lora)", lora),
    ]
    return [(what, change) for possible, what, change in every if possible]


def report(recipe: Mapping[str, Any], gpus: int, gpu_bytes: float) -> tuple[Table, list[str], bool]:
    """Estimate a recipe's memory and say whether it fits, and if not, what to switch on.

    Args:
        recipe: Parsed configuration of ``dppo fit``.
        gpus: Number of GPUs, each with one training process.
        gpu_bytes: Bytes of memory of each GPU.

    Returns:
        Table of the parts, lines to print below it, and whether all of it fits into one GPU.

    Raises:
        ConfigError: The recipe's model cannot be found, or its config does not say how large it is.
    """
    name = recipe["model"]["policy"]
    try:
        shape = ModelShape.from_name(name)
    except AttributeError as error:
        raise ConfigError(f"dppo doctor cannot size {name!r}: its config has no {error.name}") from error
    plan = plan_from_recipe(recipe, shape, gpus)
    parts = estimate(shape, plan, gpu_bytes)
    fits = total(parts) <= gpu_bytes
    table = memory_table(f"{name}: memory of the fullest of {gpus} GPU(s), estimated", parts)
    lines = [
        f"{shape.parameters:,} parameters, {plan.precision}, {_strategy(plan)}; micro-batches of "
        f"{plan.micro_batch} x ({plan.prompt_tokens} + {plan.new_tokens}) tokens",
    ]
    if not recipe["data"].get("max_prompt_tokens"):
        lines.append(f"prompts of {plan.prompt_tokens} tokens are assumed: data.max_prompt_tokens is not set")
    needed = f"{total(parts) / GIB:.1f} GiB of {gpu_bytes / GIB:.1f}"
    lines.append(
        f"ok: it fits, {needed}" if fits else f"fail: it does not fit, {needed}. Switch on, one after another:"
    )
    if not fits:
        lines += _advice(shape, plan, gpu_bytes)
    return table, lines, fits


def _advice(shape: ModelShape, plan: Plan, gpu_bytes: float) -> list[str]:
    """Lines that say what to switch on, one after another, until the plan fits."""
    lines, size = [], total(estimate(shape, plan, gpu_bytes))
    for what, change in remedies(plan):
        changed = replace(plan, **change)
        after = total(estimate(shape, changed, gpu_bytes))
        if after >= size:
            continue
        size, plan = after, changed
        lines.append(f"  {what}: {size / GIB:.1f} GiB")
        if size <= gpu_bytes:
            return [*lines, "  then it fits"]
    return [*lines, "  nor does it fit then: more GPUs, larger ones, or a smaller model"]


def _strategy(plan: Plan) -> str:
    """Phrase that says how the model is spread over the ranks."""
    if plan.stage:
        return f"stage {plan.stage} over {plan.ranks} ranks"
    return f"whole on each of {plan.ranks} rank(s)"


def memory_table(title: str, parts: list[Part]) -> Table:
    """Lay out the parts, their GiB, and what these are computed from."""
    table = Table(title=title)
    for heading in ("what", "GiB", "from"):
        table.add_column(heading, justify="right" if heading == "GiB" else "left")
    for part in parts:
        table.add_row(part.name, f"{part.bytes / GIB:.2f}", part.formula)
    table.add_section()
    table.add_row("together", f"{total(parts) / GIB:.2f}", "")
    return table
