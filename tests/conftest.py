"""Tiny models with random weights, for every test that needs a model."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny Llama with tied embeddings."""
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tied", tied=True)


@pytest.fixture(scope="session")
def tiny_untied_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny Llama with an output projection of its own."""
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "untied", tied=False)
