"""Adapters alone, instead of whole weights, on their way into vLLM: the trainer's end and vLLM's.

They travel under the names ``<layer>.lora_A.weight`` [r, in] and ``<layer>.lora_B.weight`` [out, r], with the scale
multiplied into B, so that tensors say everything: the layer computes W x + B A x.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dppo_lightning.base.errors import ConfigError, SyncError
from dppo_lightning.generate.engine import ExpectedWeights

if TYPE_CHECKING:
    from vllm import LLMEngine

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM can reserve memory for; an adapter of a rank between two is padded with zeros."""

PARTS = (".lora_A.weight", ".lora_B.weight")


def vllm_arguments(rank: int | None) -> dict[str, Any]:
    """Arguments of vLLM's EngineArgs for adapters of ``rank``; none for None."""
    if rank is None:
        return {}
    reserved_rank = next(allowed for allowed in RANKS if allowed >= rank)
    return {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": reserved_rank}


def check_rank(rank: int | None) -> None:
    """Refuse a rank that vLLM cannot reserve memory for.

    Raises:
        ConfigError: ``rank`` is out of range.
    """
    if rank is not None and not 1 <= rank <= RANKS[-1]:
        raise ConfigError(f"VLLMEmbedded: adapter_rank must be in [1, {RANKS[-1]}] or null, got {rank}")


class ExpectedAdapters:
    """The adapters that an update may bring: of one rank, on weights that the model has, the same every time.

    Args:
        weights: Names and shapes of the model's weights.
        rank: Rank of every adapter.
    """

    def __init__(self, weights: ExpectedWeights, rank: int) -> None:
        self.weights = weights
        self.rank = rank
        self._layers: set[str] | None = None

    def once(self, named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Pass every tensor on: adapters are never tied."""
        yield from named_tensors

    def check(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Compare names and shapes with those that an update may bring.

        Raises:
            SyncError: A name is unknown or missing, or a shape differs.
        """
        layers = {name.removesuffix(part) for name in shapes for part in PARTS if name.endswith(part)}
        wanted = {}
        for layer in layers:
            out_and_in = self.weights.shapes.get(f"{layer}.weight", ())
            if len(out_and_in) == 2:
                wanted[f"{layer}{PARTS[0]}"] = (self.rank, out_and_in[1])
                wanted[f"{layer}{PARTS[1]}"] = (out_and_in[0], self.rank)
        given = {name: tuple(shape) for name, shape in shapes.items()}
        wrong = sorted(name for name in given.keys() | wanted.keys() if given.get(name) != wanted.get(name))
        if not given or wrong:
            raise SyncError(
                f"adapter update refused, the engine keeps its adapters: {', '.join(wrong[:3]) or 'none were sent'} "
                f"(not an adapter of rank {self.rank} on a linear layer of the model)"
            )
        if self._layers not in (None, layers):
            raise SyncError(
                "adapter update refused, the engine keeps its adapters: they are on other layers than before"
            )
        self._layers = layers


class AdapterSlot:
    """The one set of adapters that all requests use, in vLLM's process.

    Attributes:
        request: vLLM's LoRARequest that names the adapters; None before the first ``load``.
    """

    def __init__(self) -> None:
        self.request: Any = None

    def load(self, engine: LLMEngine, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the adapters; vLLM takes them from files only."""
        from safetensors.torch import save_file
        from vllm.lora.request import LoRARequest

        tensors = {f"base_model.model.{name}": tensor for name, tensor in named_tensors}
        rank = next(len(tensor) for name, tensor in tensors.items() if name.endswith(PARTS[0]))
        targets = sorted(
            {name.removesuffix(PARTS[0]).rpartition(".")[2] for name in tensors if name.endswith(PARTS[0])}
        )
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, "bias": "none"}
        with TemporaryDirectory() as folder:
            (Path(folder) / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
            save_file(tensors, Path(folder) / "adapter_model.safetensors")
            if not engine.add_lora(LoRARequest("policy", 1, folder, load_inplace=True)):
                raise RuntimeError("vLLM did not load the adapters")
        self.request = LoRARequest("policy", 1, "loaded")
