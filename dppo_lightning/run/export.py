"""``dppo export``: write the policy of a run directory as a folder that transformers, peft and vLLM load."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import cached_file

from dppo_lightning.base.errors import ConfigError, DataError
from dppo_lightning.base.pretrained import load_config, load_tokenizer
from dppo_lightning.run.checkpoint_files import read_weights
from dppo_lightning.run.prepare import check_free, scratch_folder
from dppo_lightning.run.run_directory import RunDirectory
from dppo_lightning.sync.named_weights import adapter_weights, merged_weights
from dppo_lightning.train.lora import LoRA, adapt, peft_config

PREFIX = "policy.model."
"""Beginning of the names of the policy's weights in a checkpoint; their Hugging Face names follow."""


@dataclass(frozen=True)
class Trained:
    """Description of what a run has trained.

    Attributes:
        base: Hugging Face id or folder of the model that training began with.
        lora: Settings of the adapters, or None when the model itself was trained.
    """

    base: str
    lora: LoRA | None

    @classmethod
    def read(cls, run: Path) -> Trained:
        """Read the ``config.yaml`` of a run directory.

        Raises:
            ConfigError: ``run`` is no run directory, or its base model cannot be found.
        """
        path = run / "config.yaml"
        try:
            model = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
            base, lora = model["policy"], model.get("lora")
        except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
            raise ConfigError(f"{run} is no run directory: {path} is missing or names no model.policy") from error
        try:
            load_config(base)
            return cls(base, None if lora is None else LoRA(**lora))
        except (ConfigError, TypeError) as error:
            raise ConfigError(
                f"{path}: {error}; give the command in the directory that the run was started in"
            ) from error


def export(
    run: str,
    out: str,
    checkpoint: str = "last",
    adapter: bool = False,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Write a trained policy as a Hugging Face folder.

    The folder holds weights, config, generation config, tokenizer and chat template; it is complete or not there.

    Args:
        run: Run directory.
        out: Folder to write; it must not exist yet, or be empty.
        checkpoint: "last", or the name of a file in the run's ``checkpoints``, or a path.
        adapter: Whether to write the adapters alone, as peft does, instead of adding them to the weights.
        dtype: Dtype of the written weights.

    Raises:
        ConfigError: The output exists, the run or the checkpoint does not, or there are no adapters to write.
        DataError: The checkpoint is damaged, or belongs to another model than the run's config names.
    """
    target, source = Path(out), Path(run)
    check_free(target)
    trained = Trained.read(source)
    if adapter and trained.lora is None:
        raise ConfigError(f"{run} trained the model itself, not adapters: leave out --adapter")
    path = RunDirectory(source).resolve(checkpoint)
    model = assign_weights(empty_model(trained), read_weights(path), path)
    with scratch_folder(target) as scratch:
        written = Path(scratch) / "model"
        written.mkdir()
        write = write_adapter if adapter else write_model
        what = write(written, model, trained, getattr(torch, dtype))
        load_tokenizer(trained.base).save_pretrained(written)
        check_free(target)
        os.replace(written, target)
    print(f"{target}: {what}, {dtype}, from {path}")


def empty_model(trained: Trained) -> PreTrainedModel:
    """Build the trained model with its adapters, on the meta device: its weights take no memory yet."""
    with torch.device("meta"):
        config = load_config(trained.base)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        model.tie_weights()
        if trained.lora is not None:
            adapt(model, trained.lora)
    return model


def assign_weights(model: PreTrainedModel, weights: Mapping[str, Tensor], source: Path) -> PreTrainedModel:
    """Give an empty model the weights of a checkpoint, in float32; returns the model.

    Args:
        model: Model of ``empty_model``.
        weights: State dict of the LightningModule.
        source: Path of the checkpoint, for messages.

    Raises:
        DataError: A name is missing or unknown, or a shape differs.
    """
    given = {name.removeprefix(PREFIX): value for name, value in weights.items() if name.startswith(PREFIX)}
    named = dict(model.named_parameters(remove_duplicate=False))
    persistent = model.state_dict().keys()
    known = {id(named[name]) for name in given if name in named}
    missing = [name for name in persistent if name not in given and id(named.get(name)) not in known]
    unknown = [name for name in given if name not in persistent]
    shapes = [name for name in given if name in named and given[name].shape != named[name].shape]
    for what, names in (("lacks", missing), ("has the unknown", unknown), ("has another shape for", shapes)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise DataError(
                f"{source} is not a checkpoint of the run's model and adapters: it {what} {', '.join(names[:3])}{more}"
            )
    model.load_state_dict({name: _float32(value) for name, value in given.items()}, strict=False, assign=True)
    model.tie_weights()
    return model


def _float32(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def write_model(folder: Path, model: PreTrainedModel, trained: Trained, dtype: torch.dtype) -> str:
    """Write weights, adapters added, with config and generation config; returns what was written, in a phrase."""
    plain = model if trained.lora is None else empty_model(Trained(trained.base, None))
    merged = {name: weight.to(dtype) for name, weight in merged_weights(model)}
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in plain.state_dict()}
    plain.load_state_dict(merged | buffers, strict=False, assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder)
    generation = cached_file(trained.base, "generation_config.json", _raise_exceptions_for_missing_entries=False)
    if generation is not None:  # copied as it is: loading and saving it would fill in values, and check them
        shutil.copyfile(generation, folder / "generation_config.json")
    count = sum(weight.numel() for weight in merged.values())
    return f"{type(plain).__name__}, {count / 1e6:.1f}M parameters{'' if trained.lora is None else ', adapters merged'}"


def write_adapter(folder: Path, model: PreTrainedModel, trained: Trained, dtype: torch.dtype) -> str:
    """Write the adapters in peft's format; returns what was written, in a phrase."""
    from safetensors.torch import save_file

    assert trained.lora is not None
    config: Any = peft_config(empty_model(Trained(trained.base, None)), trained.lora)
    config.base_model_name_or_path, config.inference_mode = trained.base, True
    config.save_pretrained(folder)
    weights = {name: weight.to(dtype).contiguous() for name, weight in adapter_weights(model).items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return f"adapters of {trained.base}, {sum(weight.numel() for weight in weights.values()):,} parameters"
