"""What a recipe says about memory, and what to switch on when it does not fit."""

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

from dppo_lightning.errors import ConfigError
from dppo_lightning.memory import GIB, ModelShape, Part, Plan, estimate, total
from dppo_lightning.rollout.transformers_engine import TransformersEngine
from dppo_lightning.rollout.vllm_embedded import VLLMEmbedded
from dppo_lightning.rollout.vllm_remote import VLLMRemote
from dppo_lightning.scaling.fsdp2 import FSDP2Strategy
from dppo_lightning.scaling.strategies import check_kind, check_strategy
from dppo_lightning.scaling.zero import ZeroStrategy
from dppo_lightning.trust_region import TrustRegion

ASSUMED_PROMPT = 512
"""Tokens of the longest prompt, where neither data.max_prompt_tokens nor the context says less."""

ROLLOUT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def plan_of(recipe: Mapping[str, Any], shape: ModelShape, gpus: int) -> Plan:
    """The plan of a parsed recipe on ``gpus`` GPUs.

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
    region = built(model.get("trust_region"), TrustRegion)
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


def built(value: Any, kind: Any) -> Any:
    """What a part of a parsed recipe stands for, so that it can be asked; None where the recipe leaves it out."""
    if value is None:
        return None
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--part", type=kind)
    return parser.instantiate_classes(parser.parse_object({"part": value})).part


def class_of(value: Any) -> tuple[type | None, dict[str, Any]]:
    """The class that a parsed recipe names, and its settings, defaults and its bases' included; nothing is built."""
    if not isinstance(value, Mapping):
        return None, {}
    module, _, name = value["class_path"].rpartition(".")
    kind = getattr(import_module(module), name)
    known = [p for base in reversed(kind.__mro__) for p in signature(base.__init__).parameters.values()]
    defaults = {parameter.name: parameter.default for parameter in known if parameter.default is not parameter.empty}
    return kind, defaults | dict(value.get("init_args") or {})


def optimizer_bytes(value: Any) -> int:
    """Of optimizer state for each float32 parameter, after a step on a small matrix."""
    make = built(value, OptimizerCallable) or torch.optim.AdamW
    parameter = nn.Parameter(torch.zeros(64, 64))
    optimizer = make([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor)]
    return round(sum(tensor.numel() * tensor.element_size() for tensor in state) / parameter.numel())


def _number(value: Mapping[str, Any], name: str) -> float:
    return float(value.get("init_args", value).get(name) or 0)


def _precision(value: Any) -> str:
    names = {"None": "32-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
    return names.get(str(value), str(value))


def _sharding(strategy: Any, gpus: int) -> dict[str, Any]:
    """Of ``trainer.strategy``: a name or a class with arguments."""
    kind, given = class_of(strategy)
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
    """Whether a recipe's engine, which is VLLMEmbedded where it names none, starts vLLM on this machine."""
    kind, given = class_of(engine)
    return kind is None or issubclass(kind, VLLMEmbedded) or (issubclass(kind, VLLMRemote) and not given["urls"])


def _engine(engine: Any) -> dict[str, Any]:
    """Of ``data.engine``; the default is vLLM beside the trainer."""
    kind, given = class_of(engine)
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
    """What can still be switched on, the cheapest first: what to write, and what it changes in the plan."""
    zero = {"deepspeed": True, "ddp": False}
    lora = {"lora_rank": 16, "stage": 0, "deepspeed": False, "ddp": plan.ranks > 1}
    lora |= {"offload_optimizer": False, "offload_parameters": False}
    full, several, beside = plan.lora_rank is None, plan.ranks > 1, plan.engine != "elsewhere"
    every: list[tuple[bool, str, dict[str, Any]]] = [
        (plan.precision == "32-true", "trainer.precision: bf16-mixed", {"precision": "bf16-mixed"}),
        (not plan.gradient_checkpointing, "model.gradient_checkpointing: true", {"gradient_checkpointing": True}),
        (
            plan.micro_batch > 1,
            f"trainer.accumulate_grad_batches: {plan.micro_batch} times as many, one sequence a micro-batch",
            {"micro_batch": 1},
        ),
        (beside and plan.rollout_bytes == 4, "data.rollout_dtype: bfloat16", {"rollout_bytes": 2}),
        (
            plan.engine == "vllm" and (plan.engine_share or 0) > 0.3,
            "data.engine.init_args.gpu_memory_utilization: 0.3",
            {"engine_share": 0.3},
        ),
        (several and full and plan.stage < 2, "ZeRO stage 2 (trainer.strategy)", zero | {"stage": 2}),
        (several and full and plan.stage < 3, "ZeRO stage 3 (trainer.strategy)", zero | {"stage": 3}),
        (full and not plan.offload_optimizer, "ZeRO with offload_optimizer: cpu", {"offload_optimizer": True}),
        (beside, "the engine on a GPU or node of its own", {"engine": "elsewhere"}),
        (full, "LoRA adapters of rank 16 instead of a full fine-tune, without ZeRO (model.lora)", lora),
    ]
    return [(what, change) for possible, what, change in every if possible]


def report(recipe: Mapping[str, Any], gpus: int, gpu_bytes: float) -> tuple[Table, list[str], bool]:
    """The table of a recipe's memory, lines below it, and whether it fits.

    Raises:
        ConfigError: There is no such model, or its config does not say how large it is.
    """
    name = recipe["model"]["policy"]
    try:
        shape = ModelShape.of(name)
    except AttributeError as error:
        raise ConfigError(f"dppo doctor cannot size {name!r}: its config has no {error.name}") from error
    plan = plan_of(recipe, shape, gpus)
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
    if plan.stage:
        return f"stage {plan.stage} over {plan.ranks} ranks"
    return f"whole on each of {plan.ranks} rank(s)"


def memory_table(title: str, parts: list[Part]) -> Table:
    """Parts, GiB, and what they are computed from."""
    table = Table(title=title)
    for heading in ("what", "GiB", "from"):
        table.add_column(heading, justify="right" if heading == "GiB" else "left")
    for part in parts:
        table.add_row(part.name, f"{part.bytes / GIB:.2f}", part.formula)
    table.add_section()
    table.add_row("together", f"{total(parts) / GIB:.2f}", "")
    return table
