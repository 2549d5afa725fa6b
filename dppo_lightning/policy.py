"""The policy and the reference: a Hugging Face causal LM, run up to its hidden states on packed micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from dppo_lightning import attention
from dppo_lightning.batch import TrainingBatch
from dppo_lightning.errors import ConfigError
from dppo_lightning.freezing import freeze
from dppo_lightning.head import PolicyHead
from dppo_lightning.lora import LoRA, adapt, merged_weights, scaled_adapters
from dppo_lightning.model_check import as_loaded, ask, backbone_name, check
from dppo_lightning.packing import Layout
from dppo_lightning.precision import KeepsBuffers
from dppo_lightning.pretrained import load_model


class Policy(KeepsBuffers):
    """A causal LM with its output projection taken over by a PolicyHead.

    Args:
        name: Hugging Face id or folder.
        temperature: Of sampling; divides the logits.
        logits_mib: Memory of one chunk of logits, see PolicyHead.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        shared_prompts: Run micro-batches without padding, and a group's prompt once for all its completions, where the
            model's attention allows it.
        lora: Train adapters on the model instead of the model; None: the model itself.
        frozen: Name patterns of parameters that are not trained.
        seed: Of the adapters' first values.
        longest: Length of the longest sequence, in tokens, which the engine is told too; None: the model's context.

    Attributes:
        layout: What ``pack`` is to make of sequences for this model: "packed", or "rows" where ``shared_prompts`` is
            off, the model has attention that cannot be replaced (a sliding window, a softcap, recurrent layers), or the
            model computes something else when it is packed.
        why_rows: Which of these it is; empty when packed.

    Raises:
        ConfigError: The model cannot be found or is no causal LM, or has nothing of the name that ``lora`` or
            ``frozen`` gives, or the log-probs that are computed here are not those of its own logits.
    """

    def __init__(
        self,
        name: str,
        temperature: float = 1.0,
        logits_mib: int = 64,
        gradient_checkpointing: bool = False,
        shared_prompts: bool = True,
        lora: LoRA | None = None,
        frozen: Sequence[str] = (),
        seed: int = 0,
        longest: int | None = None,
    ) -> None:
        super().__init__()
        self.lora = lora
        self.model = load_model(name, longest)
        self.backbone_name = backbone_name(self.model)
        if lora is not None:
            adapt(self.model, lora, seed)
        freeze(self.model, frozen)
        if gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        with as_loaded(self.model, longest):
            told = ask(self.model)
            self.head = PolicyHead(self.model.get_output_embeddings(), told.transform(temperature), logits_mib)
            self.train()
            self.layout: Layout
            self.layout, self.why_rows = check(self, told, shared_prompts)

    def train(self, mode: bool = True) -> Policy:
        """Training mode, for the layers that recompute their activations alone: they do it in no other.

        Nothing else may be in it. It turns on dropout and the noise of routers, and the trainer's log-probs must be
        those of the policy that samples.
        """
        super().train(mode)
        for module in self.model.modules():
            module.training = mode and bool(getattr(module, "gradient_checkpointing", False))
        return self

    def hidden_states(self, batch: TrainingBatch) -> Float[Tensor, "N H"]:
        """Hidden states at the positions that predict a generated token.

        Rows need no attention mask: they are padded on the right, and under causal attention nothing real sees padding.
        """
        backbone = self.model.get_submodule(self.backbone_name)
        hidden = backbone(input_ids=batch.input_ids, use_cache=False, **_attends(batch)).last_hidden_state
        return functional.embedding(batch.predict_index, hidden.flatten(0, 1))  # a shared prompt's end is taken often

    @torch.no_grad()
    def logp(self, batch: TrainingBatch) -> Float[Tensor, " N"]:
        """Log-probs of the generated tokens, without gradient."""
        return self.head(self.hidden_states(batch), batch)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight, whole, under its Hugging Face name, once: of tied parameters the first name.

        Adapters are merged. Over several ranks with shards it is collective, see scaling/weights.py.
        """
        return merged_weights(self.model)

    def weights_for(self, adapter_rank: int | None) -> Iterator[tuple[str, Tensor]]:
        """What an update of an engine takes: every weight, or adapters alone.

        Args:
            adapter_rank: Of the adapters that the engine takes; None: it takes every weight.

        Raises:
            ConfigError: The engine takes adapters, and the policy has none or others.
        """
        if adapter_rank is None:
            return self.named_weights()
        if self.lora is None or self.lora.rank != adapter_rank:
            has = "no adapters" if self.lora is None else f"adapters of rank {self.lora.rank}"
            raise ConfigError(
                f"data.engine takes adapters of rank {adapter_rank}, the policy has {has}: "
                "set adapter_rank to model.lora.rank, or to null to send every weight"
            )
        return scaled_adapters(self.model)


def _attends(batch: TrainingBatch) -> dict[str, Any]:
    """What tells the model how the row attends; a mask with four dimensions is handed on as it is."""
    if batch.segments is None:
        return {}
    unused = torch.ones(attention.UNUSED, dtype=torch.bool, device=batch.input_ids.device)
    return {"position_ids": batch.position_ids, "attention_mask": unused, "segments": batch.segments}


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before ``lora.adapt``, for as long as the context lasts; for passes without gradient."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


class Unadapted:
    """The reference of a policy with adapters: the same model without them. Nothing is copied.

    Args:
        policy: Its log-probs are those of the model that was loaded, whenever they are asked of this object.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def to(self, device: torch.device) -> Unadapted:
        """Nothing to move: the policy is where it trains."""
        return self

    def logp(self, batch: TrainingBatch) -> Float[Tensor, " N"]:
        """Log-probs of the generated tokens, without gradient."""
        with adapters_off(self.policy.model):
            return self.policy.logp(batch)
