"""Named weights to send to the engine: whole tensors from shards, LoRA adapters merged into them or alone."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dppo_lightning.scaling.zero import gathered_parameters

BUCKET_BYTES = 512 << 20
"""Largest number of bytes of weights that are whole at a time for an engine, beyond the shards.

A tensor that is larger is a bucket of its own."""

ADAPTER = "default"
"""Name of the adapters among those that peft could put on one model."""


def gathered_weights(
    named_parameters: Iterable[tuple[str, Tensor]], bucket_bytes: int = BUCKET_BYTES
) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter whole, in the order given, one bucket at a time.

    Collective where parameters are in shards: every rank has to run through it, in the same order and to its end; rank
    0 is given the tensors, the others nothing. Parameters that are whole pass through on every rank. Stopping early
    still takes part in the buckets that are left, so that no other rank waits for this one.

    Args:
        named_parameters: Names and parameters; a parameter is plain, of ZeRO-3, or a DTensor (FSDP2).
        bucket_bytes: Largest number of bytes gathered at a time.

    Yields:
        Name and detached tensor; a gathered one is a copy that the reader owns.
    """
    buckets = iter(_buckets(named_parameters, bucket_bytes))
    try:
        for bucket in buckets:
            yield from _whole(bucket)
    finally:
        for bucket in buckets:
            for _ in _whole(bucket):
                pass


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight with its adapter added, each computed when it is asked for; the model stays as it is.

    A layer's own weight is given as W + (alpha / rank) B A under W's name. Collective where the model is in shards.
    """
    base: dict[str, Tensor] = {}  # of the one layer whose adapter has not come yet: its parts follow one another
    low: dict[str, Tensor] = {}
    for name, tensor in gathered_weights(model.named_parameters()):
        owner, _, kind = name.rpartition(".base_layer.")
        if ".lora_A." in name:
            low[name.rpartition(".lora_")[0]] = tensor
        elif ".lora_B." in name:
            owner = name.rpartition(".lora_")[0]
            layer: Any = model.get_submodule(owner)
            yield f"{owner}.weight", _added(layer, base.pop(owner), low.pop(owner), tensor)
        elif owner and kind == "weight":
            base[owner] = tensor
        else:
            yield (f"{owner}.{kind}" if owner else name), tensor


@torch.no_grad()
def _added(layer: Any, weight: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return W + (alpha / rank) B A."""
    with torch.autocast(weight.device.type, enabled=False):
        product = high @ low
        return weight + (product.T if layer.fan_in_fan_out else product) * layer.scaling[ADAPTER]


def is_adapter(name: str) -> bool:
    """Tell whether a parameter's name is that of an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapters alone, under the names of peft's file format; they must not be in shards."""
    return {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": parameter.detach()
        for name, parameter in model.named_parameters()
        if is_adapter(name)
    }


@torch.no_grad()
def scaled_adapters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the adapters alone, as ``<layer>.lora_A.weight`` and ``<layer>.lora_B.weight``; alpha / rank is part of B.

    Collective where the model is in shards.
    """
    adapters = ((name, parameter) for name, parameter in model.named_parameters() if is_adapter(name))
    for name, tensor in gathered_weights(adapters):
        owner = name.rpartition(".lora_")[0]
        scale = model.get_submodule(owner).scaling[ADAPTER] if ".lora_B." in name else 1.0  # type: ignore[index]
        yield name.replace(f".{ADAPTER}.", "."), tensor * scale


def full_copy(parameter: Tensor) -> Tensor:
    """Return a detached copy of the whole parameter, on every rank; collective where it is in shards."""
    with _zero_gathered([parameter]):
        return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()


def _buckets(named: Iterable[tuple[str, Tensor]], most: int) -> Iterator[list[tuple[str, Tensor]]]:
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, parameter in named:
        added = elements(parameter) * parameter.element_size()
        if bucket and size + added > most:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, parameter))
        size += added
    if bucket:
        yield bucket


def _whole(bucket: list[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a bucket; gathered ones on rank 0 only, each copied when its turn comes."""
    first, rest = _is_first(), iter(bucket)
    with _zero_gathered([parameter for _, parameter in bucket]):
        try:
            for name, parameter in rest:
                if isinstance(parameter, DTensor):
                    full = parameter.full_tensor().detach()
                    if first:
                        yield name, full
                elif not _in_zero_shards(parameter):
                    yield name, parameter.detach()
                elif first:
                    yield name, parameter.detach().clone()
        finally:
            for _, parameter in rest:  # of a reader that has stopped: the other ranks gather on
                if isinstance(parameter, DTensor):
                    parameter.full_tensor()


@contextmanager
def _zero_gathered(parameters: list[Tensor]) -> Generator[None, None, None]:
    """Make parameters of ZeRO-3 whole inside the context, on every rank; others are left as they are."""
    sharded = [parameter for parameter in parameters if _in_zero_shards(parameter)]
    if not sharded:
        yield
        return
    with gathered_parameters(sharded):
        yield


@contextmanager
def whole_as_it_runs(model: Any) -> Generator[None, None, None]:
    """Make a model of ZeRO-3 runnable while DeepSpeed has no engine for it yet.

    Each decoder layer is whole while it runs, and everything else all the time; later this is the work of the engine.
    Collective for such a model; other models are left as they are.
    """
    if not in_shards(model):
        yield
        return
    # the only place where transformers names the class of a decoder layer; without it all of the model is whole at once
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    within = {id(module) for layer in layers for module in layer.modules()}
    others = [module for module in model.modules() if id(module) not in within]
    outside = {id(parameter): parameter for module in others for parameter in module.parameters(recurse=False)}
    running: list[Any] = []

    def gather(layer: Any, *_: Any) -> None:
        mine = [parameter for parameter in layer.parameters() if id(parameter) not in outside]
        running.append(gathered_parameters(mine))
        running[-1].__enter__()

    def release(*_: Any) -> None:
        running.pop().__exit__(None, None, None)

    handles = [layer.register_forward_pre_hook(gather) for layer in layers]
    handles += [layer.register_forward_hook(release) for layer in layers]
    try:
        with _zero_gathered(list(outside.values())):
            yield
    finally:
        for handle in handles:
            handle.remove()
        while running:  # of a layer that has raised
            release()


def in_shards(model: Any) -> bool:
    """Tell whether ZeRO-3 has cut the model into shards."""
    return any(_in_zero_shards(parameter) for parameter in model.parameters())


def _in_zero_shards(parameter: Tensor) -> bool:
    """Tell whether DeepSpeed's stage 3 holds the parameter in shards, by the attribute that it then puts on it."""
    return hasattr(parameter, "ds_id")


def elements(parameter: Any) -> int:
    """Number of elements of the whole parameter; ``numel()`` is 0 for one that ZeRO-3 has cut into shards."""
    return int(parameter.ds_numel) if _in_zero_shards(parameter) else int(parameter.numel())


def _is_first() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
