"""Folders of tiny models with random weights. Not in conftest.py, which a rank must not import: it clears RANK."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast

CHARACTERS = [chr(code) for code in range(32, 127)]
END = len(CHARACTERS)
"""Id of the end in the character tokenizer; those of the characters count from the space."""

SMALL_VOCABULARY = 97
SMALL: dict[str, Any] = {
    "vocab_size": SMALL_VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
"""Arguments of a config of almost any architecture, for a model of two layers that loads at once."""


def save_random_model(config: PreTrainedConfig, folder: Path, spread: float = 1.0) -> str:
    """Save a model with random weights.

    Args:
        config: Config of the model.
        folder: Folder that it is saved to.
        spread: Factor on the matrices; above 1 the model's distributions are further from uniform.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(spread)
        model.save_pretrained(folder)
    return str(folder)


def save_tiny_llama(folder: Path, tied: bool) -> str:
    """A Llama with 96 words, whose head size vLLM's CPU attention supports; its distributions are far from uniform."""
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    return save_random_model(config, folder)


def save_character_tokenizer(folder: str | Path) -> None:
    """One id for each printable ASCII character, and id 95 for the end: 96 in all, as the tiny Llama has words."""
    vocabulary = {token: place for place, token in enumerate([*CHARACTERS, "<end>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
