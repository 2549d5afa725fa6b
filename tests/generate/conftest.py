"""What the tests of streams share."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from dppo_lightning.base.pretrained import load_tokenizer


@pytest.fixture(scope="package")
def tokenizer(tiny_policy_dir: str) -> PreTrainedTokenizerBase:
    """The tokenizer of characters."""
    return load_tokenizer(tiny_policy_dir)
