"""TrainingBatch: one micro-batch as tensors, and its making from sequences.

This module, with packing.py, is the only one that knows how sequences lie in rows of token ids. Everywhere else,
training data are N generated tokens, packed one after another without padding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dppo_lightning.base.packing import Layout, SegmentLayout, lay_out, moved
from dppo_lightning.base.records import Sequence


@dataclass(frozen=True)
class TrainingBatch:
    """One micro-batch: B rows of at most L ids, and N generated tokens packed one after another.

    Attributes:
        input_ids: [B, L] int64, padded on the right; one row of many sequences where ``segments`` is given.
        predict_index: [N] int64, place in the flattened rows of the position that predicts each generated token.
        targets: [N] int64, the generated tokens.
        rollout_logp: [N] float32, log mu.
        advantage: [N] float32, the token's advantage.
        weight: [N] float32, the token's share of the optimizer step's loss (the aggregation, see train/objective.py).
        sequence: [N] int64, index of the token's sequence within the micro-batch.
        position: [N] int64, place of the token in its completion.
        version: [N] int64, weight version that sampled the token.
        step: Number of optimizer steps taken before the one that the batch belongs to.
        real_tokens: Number of ids in the rows that are not padding.
        saved_tokens: Number of ids that were spared because sequences share their beginning.
        position_ids: [1, L] int64 or None, place of each id in its own sequence.
        segments: Layout of the row's attention, or None for rows that are causal from end to end.
        topk_ids, rollout_topk_logp: [N, K + 1] or None: mu's K most likely ids and the sampled token, and their log mu.
        reference_logp, recomputed_logp: [N] float32 or None: log-probs under the reference model, and under the policy
            that the first step on the rollout finds.
        rollout_hidden: [N, H] or None: that policy's hidden states.
        chosen: [N] bool, or [N, C] for several choices, or None: tokens that the region chose over the whole step.
    """

    input_ids: Tensor
    predict_index: Tensor
    targets: Tensor
    rollout_logp: Tensor
    advantage: Tensor
    weight: Tensor
    sequence: Tensor
    position: Tensor
    version: Tensor
    step: int
    real_tokens: int
    saved_tokens: int = 0
    position_ids: Tensor | None = None
    segments: SegmentLayout | None = None
    topk_ids: Tensor | None = None
    rollout_topk_logp: Tensor | None = None
    reference_logp: Tensor | None = None
    recomputed_logp: Tensor | None = None
    rollout_hidden: Tensor | None = None
    chosen: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Number of generated tokens, N."""
        return len(self.targets)

    @property
    def age(self) -> Tensor:
        """[N] int64, optimizer steps between the weights that sampled the token and those that it is trained at."""
        return self.step - self.version

    def to(self, device: torch.device | str) -> TrainingBatch:
        """Copy of the batch with every tensor on ``device``."""
        segments = None if self.segments is None else self.segments.to(device)
        return replace(self, segments=segments, **moved(self, device))


def pack(sequences: list[Sequence], weights: np.ndarray, layout: Layout = "rows", step: int = 0) -> TrainingBatch:
    """Lay sequences out as one micro-batch.

    Args:
        sequences: B sequences; none makes an empty batch of one padding row, whose loss is a connected zero.
        weights: [B] share of each of the sequence's tokens in the optimizer step's loss.
        layout: Layout of the ids; "packed" only for a model that can run it, see Policy.layout.
        step: Number of optimizer steps taken before the one that the batch belongs to.
    """
    laid = lay_out(sequences, layout)
    counts = [sequence.tokens for sequence in sequences]
    return TrainingBatch(
        input_ids=laid.input_ids,
        predict_index=_joined(laid.predict_index, torch.int64),
        targets=_joined([s.token_ids[s.generated] for s in sequences], torch.int64),
        rollout_logp=_joined([s.rollout_logp for s in sequences], torch.float32),
        advantage=_joined([np.asarray(s.advantage) for s in sequences], torch.float32),
        weight=torch.from_numpy(np.repeat(weights, counts)).float(),
        sequence=torch.from_numpy(np.repeat(np.arange(len(sequences)), counts)),
        position=_joined([np.arange(s.tokens) for s in sequences], torch.int64),
        version=_joined([s.versions for s in sequences], torch.int64),
        step=step,
        real_tokens=laid.real_tokens,
        saved_tokens=laid.saved_tokens,
        position_ids=laid.position_ids,
        segments=laid.segments,
        topk_ids=_joined_if_given([s.topk_ids for s in sequences], torch.int64),
        rollout_topk_logp=_joined_if_given([s.rollout_topk_logp for s in sequences], torch.float32),
        reference_logp=_joined_if_given([s.reference_logp for s in sequences], torch.float32),
        recomputed_logp=_joined_if_given([s.recomputed_logp for s in sequences], torch.float32),
        rollout_hidden=_hidden_if_given([s.rollout_hidden for s in sequences]),
    )


def _joined(arrays: list[np.ndarray], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays)).to(dtype) if arrays else torch.empty(0, dtype=dtype)


def _joined_if_given(arrays: list[np.ndarray | None], dtype: torch.dtype) -> Tensor | None:
    """Join an optional statistic; it is given for every sequence or for none."""
    given = [array for array in arrays if array is not None]
    if not given:
        return None
    if len(given) != len(arrays):
        raise ValueError(f"a statistic is given for {len(given)} of {len(arrays)} sequences: give it for all or none")
    return _joined(given, dtype)


def _hidden_if_given(tensors: list[Tensor | None]) -> Tensor | None:
    given = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(given) if given else None
