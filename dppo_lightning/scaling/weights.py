"""Whole tensors from shards: weights for the engine."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.tensor import DTensor

BUCKET_BYTES = 512 << 20
"""Most bytes of weights that are whole at a time for an engine, beyond the shards; one larger tensor is a bucket."""


def gathered_weights(
    named_parameters: Iterable[tuple[str, Tensor]], bucket_bytes: int = BUCKET_BYTES
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter whole, in the order given, one bucket at a time.

    Collective where parameters are in shards: every rank has to run through it, in the same order and to its end; rank
    0 is given the tensors, the others nothing. Parameters that are whole pass through on every rank. Stopping early
    still takes part in the buckets that are left, so that no other rank waits for this one.

    Args:
        named_parameters: Names and parameters: plain, of ZeRO-3, or DTensors (FSDP2).
        bucket_bytes: Most bytes gathered at a time.

    Yields:
        Name and tensor, detached; gathered ones are copies of the reader's own.
    """
    buckets = iter(_buckets(named_parameters, bucket_bytes))
    try:
        for bucket in buckets:
            yield from _whole(bucket)
    finally:
        for bucket in buckets:
            for _ in _whole(bucket):
                pass


def full_copy(parameter: Tensor) -> Tensor:
    """A detached copy of the whole parameter, on every rank; collective where it is in shards."""
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
    """The tensors of a bucket; gathered ones on rank 0 only, each copied when its turn comes."""
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
    """Parameters of ZeRO-3 are whole inside, on every rank; others are left as they are."""
    sharded = [parameter for parameter in parameters if _in_zero_shards(parameter)]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield


@contextmanager
def whole_as_it_runs(model: Any) -> Generator[None, None, None]:
    """Before DeepSpeed has an engine for a model of ZeRO-3, that engine's work: each decoder layer is whole while it
    runs, and everything else throughout. Collective there; other models are left as they are."""
    if not in_shards(model):
        yield
        return
    import deepspeed

    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    within = {id(module) for layer in layers for module in layer.modules()}
    others = [module for module in model.modules() if id(module) not in within]
    outside = {id(parameter): parameter for module in others for parameter in module.parameters(recurse=False)}
    running: list[Any] = []

    def gather(layer: Any, *_: Any) -> None:
        mine = [parameter for parameter in layer.parameters() if id(parameter) not in outside]
        running.append(deepspeed.zero.GatheredParameters(mine))
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
    """Whether ZeRO-3 has cut the model up."""
    return any(_in_zero_shards(parameter) for parameter in model.parameters())


def _in_zero_shards(parameter: Tensor) -> bool:
    """Whether DeepSpeed's stage 3 has taken the parameter over."""
    return hasattr(parameter, "ds_id")


def elements(parameter: Any) -> int:
    """``numel()`` is 0 for a parameter that ZeRO-3 has cut up."""
    return int(parameter.ds_numel) if _in_zero_shards(parameter) else int(parameter.numel())


def _is_first() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
