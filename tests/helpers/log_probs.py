"""Log-probs by whole logits: one sequence at a time, in a forward pass of transformers without a cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel


def log_probs(model: PreTrainedModel, prompt: Sequence[int], tokens: Sequence[int], temperature: float = 1.0) -> Tensor:
    """[T] float64 log-probs of ``tokens``, which follow ``prompt``; they carry the gradient."""
    ids = torch.tensor([[*map(int, prompt), *map(int, tokens)]])
    logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double()
    table = (logits / temperature).log_softmax(-1)
    return table[torch.arange(len(tokens)), ids[0, len(prompt) :]]
