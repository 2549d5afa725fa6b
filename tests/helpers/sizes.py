"""A Llama of known numbers, and recipes, to size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from dppo_lightning.run.cli import RecipeReader
from tests.helpers.models import save_random_model
from tests.helpers.places import ROOT

NUMBERS = {"H": 96, "I": 224, "L": 3, "V": 320, "heads": 4, "kv": 2, "d": 32}


def save_llama(folder: Path, tied: bool = True) -> str:
    """Save a Llama of these numbers, with random weights."""
    n = NUMBERS
    config = LlamaConfig(
        vocab_size=n["V"], hidden_size=n["H"], intermediate_size=n["I"], num_hidden_layers=n["L"], head_dim=n["d"],
        num_attention_heads=n["heads"], num_key_value_heads=n["kv"], tie_word_embeddings=tied,
        max_position_embeddings=512, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return save_random_model(config, folder)


def recipe(*options: str) -> dict[str, Any]:
    """The quickstart's recipe as parsed, with further options."""
    config = str(ROOT / "configs" / "quickstart.yaml")
    return RecipeReader(["fit", "--config", config, *options]).config.fit.as_dict()
