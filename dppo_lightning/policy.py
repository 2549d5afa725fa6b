"""The policy and the reference: a Hugging Face causal LM, run up to its hidden states on packed micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers import __version__ as transformers_version

from dppo_lightning import attention
from dppo_lightning.batch import TrainingBatch
from dppo_lightning.errors import ConfigError, reason
from dppo_lightning.freezing import freeze
from dppo_lightning.head import PolicyHead
from dppo_lightning.lora import LoRA, adapt, merged_weights, scaled_adapters
from dppo_lightning.model_check import as_loaded, ask, backbone_name, check
from dppo_lightning.packing import Layout
from dppo_lightning.precision import KeepsBuffers
from dppo_lightning.rope import settle_frequencies

if TYPE_CHECKING:
    from dppo_lightning.rollout.engine import RolloutEngine


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

    def weights_for(self, engine: RolloutEngine) -> Iterator[tuple[str, Tensor]]:
        """What an update of ``engine`` takes: every weight, or adapters alone.

        Raises:
            ConfigError: The engine takes adapters, and the policy has none or others.
        """
        if engine.adapter_rank is None:
            return self.named_weights()
        if self.lora is None or self.lora.rank != engine.adapter_rank:
            has = "no adapters" if self.lora is None else f"adapters of rank {self.lora.rank}"
            raise ConfigError(
                f"data.engine takes adapters of rank {engine.adapter_rank}, the policy has {has}: "
                "set adapter_rank to model.lora.rank, or to null to send every weight"
            )
        return scaled_adapters(self.model)


def _attends(batch: TrainingBatch) -> dict[str, Any]:
    """What tells the model how the row attends; a mask with four dimensions is handed on as it is."""
    if batch.segments is None:
        return {}
    unused = torch.ones(attention.UNUSED, dtype=torch.bool, device=batch.input_ids.device)
    return {"position_ids": batch.position_ids, "attention_mask": unused, "segments": batch.segments}


def load_model(name: str, longest: int | None = None) -> PreTrainedModel:
    """Load in float32 with every dropout off: the trainer's log-probs must be those of the policy that samples.

    Args:
        name: Hugging Face id or folder.
        longest: Length of the longest sequence, in tokens; None: the model's context.

    Raises:
        ConfigError: The model cannot be found or is no causal LM, or its folder lacks some of its weights.
    """
    config = load_config(name)
    text = config.get_text_config()
    settle_frequencies(text, longest)
    # transformers' "sdpa" leaves the softcap of attention out
    softcapped = getattr(text, "attn_logit_softcapping", None) is not None
    for key in vars(config):
        if key.endswith(("dropout", "dropout_prob", "pdrop", "layerdrop")) and isinstance(getattr(config, key), float):
            setattr(config, key, 0.0)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            attn_implementation="eager" if softcapped else None,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
        )
    except Exception as error:  # whatever a folder of somebody else's makes transformers raise
        raise ConfigError(f"cannot load a causal language model from {name!r}: {_refused(name, error)}") from error
    model, found = loaded
    # transformers would train on random values in their place
    lacking = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise ConfigError(
            f"{name!r} holds no weights, or of another shape, for {', '.join(lacking[:3])}{more} of a "
            f"{type(model).__name__}: set model.policy to a folder with all of them"
        )
    return cast(PreTrainedModel, model)


def load_config(name: str) -> Any:
    """The model's Hugging Face config.

    Raises:
        ConfigError: There is no such model, or transformers cannot use it; the message gives its reason.
    """
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ConfigError(f"model folder {name!r} holds no config.json: set model.policy to a Hugging Face folder")
    if not path.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1 or _is_folder_here(name)):
        raise ConfigError(f"model folder {name!r} does not exist: make one with `dppo prepare`, or set model.policy")
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # whatever a folder of somebody else's makes transformers raise
        if path.is_dir():
            raise ConfigError(f"model folder {name!r} cannot be used: {_refused(name, error)}") from error
        raise ConfigError(
            f"no model {name!r}: there is no such folder, and as a Hugging Face id it gave: {_refused(name, error)}; "
            "or make a folder with `dppo prepare tiny --out DIR`"
        ) from error


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ConfigError: There is no such model, or it has no tokenizer.
    """
    load_config(name)
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # whatever a folder of somebody else's makes transformers raise
        why = _refused(name, error)
        raise ConfigError(
            f"no tokenizer in {name!r} that can be used, save one there with tokenizer.save_pretrained: {why}"
        ) from error


def context_length(name: str) -> int | None:
    """Longest sequence that the model was built for, in tokens, or None when its config does not say."""
    return getattr(load_config(name).get_text_config(), "max_position_embeddings", None)


def _is_folder_here(name: str) -> bool:
    """Whether the name can only mean a folder: what comes before its slash is one."""
    return "/" in name and Path(name).parent.is_dir()


def _refused(name: str, error: Exception) -> str:
    """Why transformers did not load something of a model, and what to change."""
    if "trust_remote_code" in str(error):  # an argument that nobody is offered here: a model's own code is never run
        return (
            "it is made of code of its own (auto_map), which is never run here: set model.policy to a model of an "
            f"architecture that transformers {transformers_version} has"
        )
    why = reason(error).rstrip(".")
    return f"{why} (transformers {transformers_version}): mend it, or set model.policy to another model"
