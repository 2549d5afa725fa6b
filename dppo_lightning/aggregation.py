"""How per-token losses become one number: a weight for every token, fixed when an optimizer step is assembled.

The denominators count the whole optimizer step, over all ranks and micro-batches, so the gradient does not depend on
how the step was split.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from dppo_lightning.errors import ConfigError

Aggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-sum-constant"]


def sequence_weights(aggregation: Aggregation, tokens: np.ndarray, constant_length: int | None = None) -> np.ndarray:
    """Weight of each token of each sequence, so that the step's loss is the weighted sum over all its tokens.

    Args:
        aggregation: ``token-mean``: over the step's tokens. ``seq-mean-token-sum`` (the DPPO paper's objective): sum
            over tokens, mean over sequences. ``seq-mean-token-mean`` (GRPO): mean over tokens, then over sequences.
            ``seq-sum-constant`` (Dr.GRPO, arXiv 2503.20783): sum over tokens divided by ``constant_length``, mean
            over sequences.
        tokens: [S] generated tokens of each sequence of the whole step; sequences of none count in no mean.
        constant_length: For ``seq-sum-constant``, > 0.

    Returns:
        [S] float64; 0 for a sequence without tokens.
    """
    counted = tokens > 0
    sequences = max(int(counted.sum()), 1)
    if aggregation == "token-mean":
        weight = np.full(len(tokens), 1 / max(int(tokens.sum()), 1))
    elif aggregation == "seq-mean-token-sum":
        weight = np.full(len(tokens), 1 / sequences)
    elif aggregation == "seq-mean-token-mean":
        weight = 1 / (sequences * np.maximum(tokens, 1))
    else:
        if constant_length is None or constant_length <= 0:
            raise ConfigError("aggregation seq-sum-constant needs constant_length > 0: set model.constant_length")
        weight = np.full(len(tokens), 1 / (sequences * constant_length))
    return np.where(counted, weight, 0.0)
