"""LoRA: low-rank adapters on linear layers are trained, the model that they sit on is not.

An adapted layer computes W x + (alpha / rank) B A x; A and B are all that is trained. B starts at zero, so the policy
starts as the model that was loaded. The same model with its adapters switched off is the reference, and the engine is
given W + (alpha / rank) B A under W's own name, one matrix at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dppo_lightning.base.errors import ConfigError, require
from dppo_lightning.sync.named_weights import gathered_weights

ADAPTER = "default"


@dataclass(frozen=True)
class LoRA:
    """Which layers get adapters, and how large they are.

    There is no dropout: the trainer's log-probs must be those of the policy that samples.

    Args:
        rank: Of every adapter, >= 1.
        alpha: An adapter's product is scaled by alpha / rank, > 0.
        target_modules: Names of linear layers, whole or their last parts ("q_proj"); "all-linear" for every one but the
            output projection.

    Raises:
        ConfigError: A value is out of range.
    """

    rank: int = 16
    alpha: float = 32.0
    target_modules: Literal["all-linear"] | list[str] = "all-linear"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"model.lora.rank must be >= 1, got {self.rank}")
        if not 0 < self.alpha < float("inf"):
            raise ConfigError(f"model.lora.alpha must be > 0, got {self.alpha}")
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            raise ConfigError(
                f'model.lora.target_modules must be "all-linear" or a list of names, got {self.target_modules!r}'
            )
        if not self.target_modules or not all(self.target_modules):
            raise ConfigError("model.lora.target_modules names no layer: list some, or set all-linear")


def adapt(model: PreTrainedModel, lora: LoRA, seed: int = 0) -> None:
    """Freeze the model and put adapters on it, in place; needs peft.

    Args:
        model: Has no adapters yet.
        lora: Which adapters.
        seed: Of the values that every A starts with; no global generator is touched.

    Raises:
        ConfigError: peft is not installed, or a target is unknown, not linear, or the embedding or output projection.
    """
    peft = require("peft", extra="lora")
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # Lightning's context would draw on the GPU
        torch.default_generator.manual_seed(seed)
        peft.inject_adapter_in_model(peft_config(model, lora), model, ADAPTER)


def peft_config(model: PreTrainedModel, lora: LoRA) -> Any:
    """The adapters as peft describes them, for a model that has none yet.

    Raises:
        ConfigError: As ``adapt``.
    """
    return require("peft", extra="lora").LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=_targets(model, lora),
        task_type="CAUSAL_LM",
    )


def _targets(model: PreTrainedModel, lora: LoRA) -> list[str]:
    """Names, or ends of names, of the layers to adapt, all of them checked."""
    linear = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    fixed = {name for name, module in model.named_modules() if id(module) in ends}
    if lora.target_modules == "all-linear":
        return sorted({name.rpartition(".")[2] for name in linear - fixed})
    known = sorted({name.rpartition(".")[2] for name in linear - fixed})
    for target in lora.target_modules:
        found = {name for name, _ in model.named_modules() if name == target or name.endswith(f".{target}")}
        if found & fixed:
            raise ConfigError(
                f"model.lora.target_modules: {target!r} is the embedding or the output projection, which are not "
                f"adapted; choose from {', '.join(known)}"
            )
        if not found or not found <= linear:
            near = get_close_matches(target, known, n=1)
            what = "is no linear layer" if found else "matches no layer"
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"
            raise ConfigError(f"model.lora.target_modules: {target!r} {what}; {hint}")
    return list(lora.target_modules)


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight with its adapter added, each computed when it is asked for; the model stays as it is.

    Collective where the model is in shards, see sync/named_weights.py.
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
    """W + (alpha / rank) B A."""
    with torch.autocast(weight.device.type, enabled=False):
        product = high @ low
        return weight + (product.T if layer.fan_in_fan_out else product) * layer.scaling[ADAPTER]


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """The adapters alone, under the names of peft's file format."""
    return {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": parameter.detach()
        for name, parameter in model.named_parameters()
        if is_adapter(name)
    }


@torch.no_grad()
def scaled_adapters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The adapters alone, as ``<layer>.lora_A.weight`` and ``<layer>.lora_B.weight``; alpha / rank is part of B.

    Collective where the model is in shards.
    """
    adapters = ((name, parameter) for name, parameter in model.named_parameters() if is_adapter(name))
    for name, tensor in gathered_weights(adapters):
        owner = name.rpartition(".lora_")[0]
        scale = model.get_submodule(owner).scaling[ADAPTER] if ".lora_B." in name else 1.0  # type: ignore[index]
        yield name.replace(f".{ADAPTER}.", "."), tensor * scale
