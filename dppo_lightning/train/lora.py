"""LoRA: low-rank adapters on linear layers are trained, the model that they sit on is not.

An adapted layer computes W x + (alpha / rank) B A x; A and B are all that is trained. B starts at zero, so the policy
starts as the model that was loaded. The same model with its adapters switched off is the reference. What the engine is
given of them is decided in sync/named_weights.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dppo_lightning.base.errors import ConfigError, require
from dppo_lightning.sync.named_weights import ADAPTER


@dataclass(frozen=True)
class LoRA:
    """Choice of the layers that get adapters, and of their size.

    There is no dropout: the trainer's log-probs must be those of the policy that samples.

    Args:
        rank: Rank of every adapter, >= 1.
        alpha: Scale of every adapter's product, which is multiplied by alpha / rank, > 0.
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
        model: Model without adapters.
        lora: Choice of the adapters.
        seed: Seed of the values that every A starts with; no global generator is touched.

    Raises:
        ConfigError: peft is not installed, or a target is unknown, not linear, or the embedding or output projection.
    """
    peft = require("peft", extra="lora")
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # Lightning's context would draw on the GPU
        torch.default_generator.manual_seed(seed)
        peft.inject_adapter_in_model(peft_config(model, lora), model, ADAPTER)


def peft_config(model: PreTrainedModel, lora: LoRA) -> Any:
    """Describe the adapters as peft does, for a model that has none yet.

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
    """List names, or ends of names, of the layers to adapt, all of them checked."""
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
