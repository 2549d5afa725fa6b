"""The records that flow through a training run: Prompt, Completion, Group, Sequence and TrainingBatch; and packing.

This is the only module that knows how a prompt and its completions lie in a row of token ids. Everywhere else, training
data are N generated tokens, packed one after another without padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Prompt:
    """One question, already rendered by the chat template and tokenised.

    Attributes:
        id: Unique and stable within a run, e.g. ``"train/17"``.
        token_ids: What the engine is given; never re-tokenised.
        text: The rendered text that ``token_ids`` encode, for logs and rewards.
        answer: The reference answer, if the source has one.
        columns: Any extra columns of the source's row; passed on to rewards untouched.
    """

    id: str
    token_ids: tuple[int, ...]
    text: str
    answer: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Completion:
    """One sampled continuation, as the engine returned it. T is the number of generated tokens, T >= 1 unless aborted.

    Attributes:
        request_id: The id of the request that it answers.
        token_ids: [T] int64, the end-of-sequence token included when the model emitted it.
        logp: [T] float32, log-prob of each token under the distribution that sampled it (log mu).
        topk_ids: [T, K] int64, the K most likely tokens of mu, or None when not asked for.
        topk_logp: [T, K] float32, their log mu.
        finish_reason: "stop" (end of sequence), "length" (token limit) or "abort".
        versions: [T] int64, the weight version that sampled each token.
    """

    request_id: str
    token_ids: np.ndarray
    logp: np.ndarray
    finish_reason: FinishReason
    versions: np.ndarray
    topk_ids: np.ndarray | None = None
    topk_logp: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.token_ids)
