"""Tiny models with random weights, for every test that needs a model."""

import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads: spinning threads slow down tiny models
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the network

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHARACTERS = [chr(code) for code in range(32, 127)]


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


def save_character_tokenizer(folder: str | Path) -> None:
    """One id for each printable ASCII character, and id 95 for the end: 96 in all, as the tiny Llama has words."""
    vocabulary = {token: place for place, token in enumerate([*CHARACTERS, "<end>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_policy_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny Llama that can be trained: with a tokenizer of characters."""
    folder = save_tiny_llama(tmp_path_factory.mktemp("models") / "policy", tied=True)
    save_character_tokenizer(folder)
    return folder
