"""Weights from the trainer to an engine on the same GPU, by vLLM's own weight transfer (its "ipc" backend).

**This has not run on hardware.** It is written against the interface of vLLM 0.32: ``init_weight_transfer_engine``,
then for each update ``start_weight_update``, ``update_weights`` for each chunk, ``finish_weight_update``. All chunks of
an update pass through one buffer on the GPU; what crosses the pipe is its CUDA IPC handle, and what lies where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dppo_lightning.base.errors import EngineError
from dppo_lightning.generate.vllm.child_process import ParentLink
from dppo_lightning.generate.vllm.weight_memory import dtype_name, narrowed

if TYPE_CHECKING:
    from vllm import LLMEngine

CONFIG = {"backend": "ipc"}
"""Arguments of vLLM's WeightTransferConfig."""

NEEDS_GPU = (
    "weights: ipc needs trainer and engine on one CUDA GPU, and there is none here: set weights to shared_memory"
)


def check_gpu(available: bool) -> None:
    """Refuse a machine or an installation without CUDA.

    Raises:
        EngineError: Not ``available``.
    """
    if not available:
        raise EngineError(NEEDS_GPU)


def share(buffer: Tensor) -> dict[str, tuple[Any, ...]]:
    """CUDA IPC handle of a buffer, by its GPU's UUID, with which another process of this GPU can open the buffer."""
    from torch.multiprocessing.reductions import reduce_tensor

    check_gpu(buffer.is_cuda)
    _, handle = reduce_tensor(buffer)
    return {str(torch.cuda.get_device_properties(buffer.device).uuid): handle}


def chunks(
    named_tensors: Iterable[tuple[str, Tensor]],
    size: int,
    dtype: torch.dtype | None,
    share: Callable[[Tensor], dict[str, tuple[Any, ...]]] = share,
) -> Iterator[dict[str, Any]]:
    """Pack tensors into one shared buffer, a chunk at a time.

    Each chunk holds the arguments of vLLM's IPCWeightTransferUpdateInfo. The buffer is written again for the next
    chunk, so the receiver must be done with a chunk before the next is taken. Each tensor is copied before the next one
    is taken: a sharded trainer gathers them one by one.

    Args:
        named_tensors: The weights, all on one GPU.
        size: Size of the buffer, in bytes; a larger single tensor gets a larger buffer.
        dtype: Dtype that wider floating-point tensors are rounded to; None: none are.
        share: Function from a buffer to the handle with which another process opens it.
    """
    buffer, used, chunk = torch.empty(0, dtype=torch.uint8), 0, _empty({})
    for name, given in named_tensors:
        tensor = narrowed(given, dtype)
        data = tensor.contiguous().reshape(-1).view(torch.uint8)
        # One dtype a chunk: the receiver reads each piece in place, where another dtype might not be aligned.
        if used and (used + len(data) > len(buffer) or chunk["dtype_names"][0] != dtype_name(tensor.dtype)):
            yield _written(chunk, buffer)
            used, chunk = 0, _empty(chunk["ipc_handles"])
        if len(data) > len(buffer) or not chunk["ipc_handles"]:
            buffer = torch.empty(max(size, len(data)), dtype=torch.uint8, device=data.device)
            chunk["ipc_handles"] = share(buffer)
        buffer[used : used + len(data)].copy_(data)
        used += len(data)
        chunk["names"].append(name)
        chunk["dtype_names"].append(dtype_name(tensor.dtype))
        chunk["shapes"].append(list(tensor.shape))
        chunk["tensor_sizes"].append(len(data))
    if chunk["names"]:
        yield _written(chunk, buffer)


def _empty(handles: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    return {"names": [], "dtype_names": [], "shapes": [], "tensor_sizes": [], "ipc_handles": handles}


def _written(chunk: dict[str, Any], buffer: Tensor) -> dict[str, Any]:
    """Wait until the GPU has copied everything that the chunk lists, and return the chunk."""
    if buffer.is_cuda:
        torch.cuda.current_stream(buffer.device).synchronize()
    return chunk


def prepare(engine: LLMEngine) -> None:
    """Tell vLLM, in its own process and once, to expect packed buffers."""
    engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": {"packed": True}})


def receive(engine: LLMEngine, link: ParentLink) -> None:
    """Load chunks, in the engine's process, until the trainer sends "finish"; nothing is generated meanwhile.

    Every message but the last is answered with its own kind.
    """
    engine.collective_rpc("start_weight_update")
    link.send("transfer")
    while True:
        kind, chunk = link.receive(wait=True) or ("finish", None)
        if kind == "finish":
            break
        engine.collective_rpc("update_weights", kwargs={"update_info": chunk})
        link.send("chunk")
    engine.collective_rpc("finish_weight_update")
