"""Loading of a Hugging Face name: its config, its tokenizer, or its model in float32 without dropout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers import __version__ as transformers_version

from dppo_lightning.base.errors import ConfigError, one_line


def load_model(name: str, longest: int | None = None) -> PreTrainedModel:
    """Load a model in float32 with every dropout off: the trainer's log-probs must be those of the policy that samples.

    Args:
        name: Hugging Face id or folder.
        longest: Length of the longest sequence, in tokens; None for the model's context.

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
    except Exception as error:  # a broken folder can make transformers raise anything
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
    """Load the model's Hugging Face config.

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
    except Exception as error:  # a broken folder can make transformers raise anything
        if path.is_dir():
            raise ConfigError(f"model folder {name!r} cannot be used: {_refused(name, error)}") from error
        raise ConfigError(
            f"no model {name!r}: there is no such folder, and as a Hugging Face id it gave: {_refused(name, error)}; "
            "or make a folder with `dppo prepare tiny --out DIR`"
        ) from error


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer.

    Raises:
        ConfigError: There is no such model, or it has no tokenizer.
    """
    load_config(name)
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # a broken folder can make transformers raise anything
        why = _refused(name, error)
        raise ConfigError(
            f"no tokenizer in {name!r} that can be used, save one there with tokenizer.save_pretrained: {why}"
        ) from error


def context_length(name: str) -> int | None:
    """Length of the longest sequence that the model was built for, in tokens, or None when its config does not say."""
    return getattr(load_config(name).get_text_config(), "max_position_embeddings", None)


def backbone_name(model: PreTrainedModel) -> str:
    """Name of the part of a causal LM that makes hidden states of ids.

    Raises:
        ConfigError: There is none apart from the whole, or no output projection.
    """
    inner = model.base_model
    if inner is model:  # of Llama 4's text model: the prefix names an attribute that it does not have
        inner = model.get_decoder()
    if inner is model and isinstance(getattr(model, "model", None), nn.Module):
        inner = model.model
    projection = model.get_output_embeddings()
    if inner is model or not isinstance(getattr(projection, "weight", None), Tensor):
        raise ConfigError(
            f"model.policy: {type(model).__name__} cannot be trained: it has no hidden states and output projection "
            "that can be taken apart"
        )
    return next(name for name, module in model.named_modules() if module is inner)


def _is_folder_here(name: str) -> bool:
    """Tell whether the name can only mean a folder: the part before its slash is one."""
    return "/" in name and Path(name).parent.is_dir()


def _refused(name: str, error: Exception) -> str:
    """Say why transformers did not load something of a model, and what to change."""
    if "trust_remote_code" in str(error):  # an argument that nobody is offered here: a model's own code is never run
        return (
            "it is made of code of its own (auto_map), which is never run here: set model.policy to a model of an "
            f"architecture that transformers {transformers_version} has"
        )
    why = one_line(error).rstrip(".")
    return f"{why} (transformers {transformers_version}): mend it, or set model.policy to another model"


def settle_frequencies(config: Any, longest: int | None) -> None:
    """Make a model's rotary frequencies independent of the sequences of a call, before the model is built.

    With "longrope" transformers takes the long factors when the longest sequence of a call is longer than those of
    pretraining, so a short sequence's log-probs would depend on its neighbours. vLLM takes the long factors whenever a
    sequence may become so long, and so it is here. With "dynamic" transformers stretches the frequencies beyond the
    model's context, where no sequence of a run goes; vLLM never does.

    Args:
        config: Hugging Face config of the text model; changed in place.
        longest: Length of the longest sequence, in tokens; None for the model's context.
    """
    context = getattr(config, "max_position_embeddings", None)
    for rope in _rope_parameters(config):
        kind = rope.get("rope_type")
        if kind == "longrope":
            pretrained = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
            taken, left = ("long", "short") if (longest or context) > pretrained else ("short", "long")
            for name in ("factor", "mscale"):
                if f"{taken}_{name}" in rope:
                    rope[f"{left}_{name}"] = rope[f"{taken}_{name}"]
        elif kind == "dynamic" and not rope.get("alpha"):  # with alpha the frequencies have been stretched already
            rope["rope_type"] = "default"


def _rope_parameters(config: Any) -> Iterator[dict[str, Any]]:
    """Yield the rope parameters: one dict for the model, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        yield parameters
    else:
        yield from (entry for entry in parameters.values() if isinstance(entry, dict))
