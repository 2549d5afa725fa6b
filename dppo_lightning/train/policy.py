"""The policy and the reference: a Hugging Face causal LM, run up to its hidden states on packed micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Self

import lightning.pytorch as pl
import torch
from jaxtyping import Float
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn import functional

from dppo_lightning.base.batch import TrainingBatch
from dppo_lightning.base.errors import ConfigError
from dppo_lightning.base.packing import Layout
from dppo_lightning.base.pretrained import backbone_name, load_model
from dppo_lightning.scaling.sharding import shard, shard_frozen
from dppo_lightning.scaling.zero import ZeroStrategy
from dppo_lightning.sync.named_weights import merged_weights, scaled_adapters
from dppo_lightning.train import attention
from dppo_lightning.train.head import PolicyHead
from dppo_lightning.train.lora import LoRA, adapt
from dppo_lightning.train.model_check import as_loaded, ask, check


class KeepsBuffers(nn.Module):
    """A module whose floating-point buffers keep the dtype that they were made with, whatever casts the module.

    RoPE's inverse frequencies are such buffers. In bfloat16 they are off by up to 1/256 of themselves: at position
    1,000 by up to two radians. ``to(dtype)``, ``half`` and their kin all go through ``_apply``, so this holds for every
    strategy and precision. ZeRO-3 makes a model's tensors in 16 bits as it loads; its configuration tells it so too.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.is_floating_point()
        ]
        result = super()._apply(fn, recurse)
        for module, name, buffer in kept:
            moved = module._buffers[name]
            assert moved is not None
            if moved.dtype != buffer.dtype:
                module._buffers[name] = buffer.to(moved.device)
        return result


class Policy(KeepsBuffers):
    """A causal LM with its output projection taken over by a PolicyHead.

    Args:
        name: Hugging Face id or folder.
        temperature: Temperature of sampling; divides the logits.
        logits_mib: Memory of one chunk of logits, in MiB, see PolicyHead.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        shared_prompts: Run micro-batches without padding, and a group's prompt once for all its completions, where the
            model's attention allows it.
        lora: Train adapters on the model instead of the model; None: the model itself.
        frozen: Name patterns of parameters that are not trained.
        seed: Seed of the adapters' first values.
        longest: Length of the longest sequence, in tokens, which the engine is told too; None: the model's context.

    Attributes:
        layout: Layout in which ``pack`` lays sequences for this model: "packed", or "rows" where ``shared_prompts`` is
            off, the model has attention that cannot be replaced (a sliding window, a softcap, recurrent layers), or the
            model computes something else when it is packed.
        why_rows: Reason for rows, in words; empty when packed.

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
        """Set training mode for the layers that recompute their activations alone: they do it in no other.

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
        """Yield every weight, whole, under its Hugging Face name, once: of tied parameters the first name.

        Adapters are merged. Over several ranks with shards it is collective, see sync/named_weights.py.
        """
        return merged_weights(self.model)

    def weights_for(self, adapter_rank: int | None) -> Iterator[tuple[str, Tensor]]:
        """Yield what an update of an engine takes: every weight, or adapters alone.

        Args:
            adapter_rank: Rank of the adapters that the engine takes; None: it takes every weight.

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
    """Make the arguments that tell the model how the row attends; a mask of four dimensions is handed on as it is."""
    if batch.segments is None:
        return {}
    unused = torch.ones(attention.UNUSED, dtype=torch.bool, device=batch.input_ids.device)
    return {"position_ids": batch.position_ids, "attention_mask": unused, "segments": batch.segments}


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Context in which the model is as it was before ``lora.adapt``; for passes without gradient."""
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
        policy: Policy whose adapters are switched off while its log-probs are asked of this object.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def to(self, device: torch.device) -> Unadapted:
        """Do nothing: the policy is where it trains."""
        return self

    def logp(self, batch: TrainingBatch) -> Float[Tensor, " N"]:
        """Log-probs of the generated tokens, without gradient."""
        with adapters_off(self.policy.model):
            return self.policy.logp(batch)


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Take parameters out of training, in place.

    Args:
        model: Model whose parameters' names are matched; a tied parameter is frozen by any of its names.
        patterns: Patterns as of file names: ``model.embed_tokens.*``.

    Raises:
        ConfigError: A pattern matches nothing, or nothing is left to train.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        found = [name for name in named if fnmatchcase(name, pattern)]
        if not found:
            near = get_close_matches(pattern, named, n=3, cutoff=0.3) or list(named)[:3]
            raise ConfigError(f"model.frozen: {pattern!r} matches no parameter; names are like {', '.join(near)}")
        for name in found:
            named[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in named.values()):
        raise ConfigError("model.frozen leaves nothing to train: name fewer parameters")


def check_precision(trainer: pl.Trainer) -> None:
    """Refuse to train in float16, and to train bfloat16 parameters that have no float32 masters.

    The head forms its gradient with the loss. In float16, whose least number is 6e-8, the small entries are 0 by then:
    a token's share of a step of 16k tokens is 6e-5, spread over the vocabulary. No loss scale brings them back. An
    update of 1e-6 of a weight is lost when it is added to a bfloat16, which has 8 bits. DeepSpeed keeps masters.

    Raises:
        ConfigError: The run trains, and its precision is "16-mixed" or "16-true", or "bf16-true" without ZeRO.
    """
    if trainer.state.fn != TrainerFn.FITTING:
        return
    precision = str(trainer.precision)
    if precision in ("16-mixed", "16-true"):
        raise ConfigError(f"trainer.precision {precision} loses the small gradients of the head: set bf16-mixed")
    if precision == "bf16-true" and not isinstance(trainer.strategy, ZeroStrategy):
        raise ConfigError(
            f"trainer.precision {precision} trains without float32 weights, and small updates are lost: "
            "set bf16-mixed, or add configs/scaling/zero2.yaml, which keeps float32 weights beside"
        )


def load_models(
    name: str,
    strategy: Strategy,
    with_reference: bool,
    lora: LoRA | None,
    frozen: Sequence[str],
    gradient_checkpointing: bool,
    seed: int,
    **settings: Any,
) -> tuple[Policy, Policy | Unadapted | None]:
    """Load the policy, and the reference where one is asked for; a strategy that shards takes them over.

    Args:
        name: Hugging Face id or folder of both.
        strategy: Lightning's strategy of the run.
        with_reference: Whether there is a reference; of a policy with adapters it is the policy without them.
        lora: Adapters of the policy.
        frozen: Name patterns of the policy's parameters that are not trained.
        gradient_checkpointing: Whether the policy recomputes activations.
        seed: Seed of the adapters' first values.
        settings: Further arguments of ``Policy``, the same for both.

    Raises:
        ConfigError: As ``Policy``.
    """
    policy = Policy(
        name, gradient_checkpointing=gradient_checkpointing, lora=lora, frozen=frozen, seed=seed, **settings
    )
    shard(strategy, policy)
    if not with_reference:
        return policy, None
    if lora is not None:
        return policy, Unadapted(policy)
    reference = Policy(name, **settings).requires_grad_(False).eval()
    shard_frozen(strategy, reference)
    return policy, reference
