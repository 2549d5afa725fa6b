"""The records that flow through a training run: Prompt, Completion, Group, Sequence and TrainingBatch; and packing.

This module, with packing.py, is the only one that knows how a prompt and its completions lie in a row of token ids.
Everywhere else, training data are N generated tokens, packed one after another without padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dppo_lightning.attention import SegmentLayout
from dppo_lightning.packing import Layout, lay_out
from dppo_lightning.packing import split_by_tokens as split_by_tokens

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
        where: File and line of it, for messages.
    """

    id: str
    token_ids: tuple[int, ...]
    text: str
    answer: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)


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


@dataclass
class Group:
    """The completions of one prompt, with what was made of them. G is their number.

    Attributes:
        prompt: The prompt.
        completions: G completions.
        texts: [G] their text, without the tokens that begin, end and pad a text.
        raw_texts: [G] their text with every token; None where ``texts`` lacks only the one that ended it.
        rewards: [G] float64, or None before the reward verb.
        reward_parts: name -> [G] float64, the named parts that the reward reported.
        advantages: [G] float64, or None before the advantage verb.
        reference_logp: For each completion that has a token [T] log-probs under the reference model, or None.
        step: Optimizer step that trains on it, counted from 0; None before that is laid out, and in evaluation.
    """

    prompt: Prompt
    completions: list[Completion]
    texts: list[str]
    rewards: np.ndarray | None = None
    reward_parts: dict[str, np.ndarray] = field(default_factory=dict)
    advantages: np.ndarray | None = None
    reference_logp: list[np.ndarray] | None = None
    raw_texts: list[str | None] = field(default_factory=list)
    step: int | None = None

    def sequences(self) -> list[Sequence]:
        """One training sequence for each completion that has at least one token."""
        advantages = np.zeros(len(self.completions)) if self.advantages is None else self.advantages
        rows = [
            Sequence.from_completion(self.prompt, completion, float(advantage))
            for completion, advantage in zip(self.completions, advantages, strict=True)
            if len(completion) > 0
        ]
        if self.reference_logp is not None:
            for row, logp in zip(rows, self.reference_logp, strict=True):
                row.reference_logp = logp
        return rows

    def records(self) -> list[dict[str, Any]]:
        """One JSON-ready record for each completion; a reward part that was not reported for it is None."""
        rows = []
        for index, (completion, text) in enumerate(zip(self.completions, self.texts, strict=True)):
            row: dict[str, Any] = {
                "prompt_id": self.prompt.id,
                "prompt": self.prompt.text,
                "completion": text,
                "answer": self.prompt.answer,
            }
            if self.raw_texts and self.raw_texts[index] is not None:
                row["raw_completion"] = self.raw_texts[index]
            if self.rewards is not None:
                parts = {name: float(values[index]) for name, values in self.reward_parts.items()}
                row["reward"] = float(self.rewards[index])
                row["parts"] = {name: None if np.isnan(part) else part for name, part in parts.items()}
            if self.advantages is not None:
                row["advantage"] = float(self.advantages[index])
            versions = [int(completion.versions[0]), int(completion.versions[-1])] if len(completion) else []
            row |= {"tokens": len(completion), "finish_reason": completion.finish_reason, "versions": versions}
            rows.append(row)
        return rows


@dataclass
class Sequence:
    """One row to train on: L token ids, T of which the model generated (T >= 1).

    Attributes:
        token_ids: [L] int64.
        generated: [T] int64, ascending places in the row of the generated tokens, each >= 1.
        rollout_logp: [T] float32, log mu.
        versions: [T] int64, weight version of each token.
        advantage: Of the whole sequence.
        topk_ids: [T, K + 1] int64 or None: mu's K most likely ids, then the sampled token.
        rollout_topk_logp: [T, K + 1] float32 or None; -inf in the last column when the sampled token is among the K.
        reference_logp: [T] float32 or None, log-probs under the reference model.
        recomputed_logp: [T] float32 or None, log-probs under the policy that the first step on the rollout finds,
            recomputed by the trainer; with ``max_staleness`` above 0 it is not the one that sampled.
        rollout_hidden: [T, H] or None, that policy's hidden states, for full-vocabulary regions.
        truncated: Whether the completion was cut by the length limit.
    """

    token_ids: np.ndarray
    generated: np.ndarray
    rollout_logp: np.ndarray
    versions: np.ndarray
    advantage: float = 0.0
    topk_ids: np.ndarray | None = None
    rollout_topk_logp: np.ndarray | None = None
    reference_logp: np.ndarray | None = None
    recomputed_logp: np.ndarray | None = None
    rollout_hidden: Tensor | None = None
    truncated: bool = False

    @classmethod
    def from_completion(cls, prompt: Prompt, completion: Completion, advantage: float) -> Sequence:
        """Lay a prompt and its completion in one row."""
        prompt_length = len(prompt.token_ids)
        topk_ids, topk_logp = _with_sampled_column(completion)
        return cls(
            token_ids=np.concatenate([np.asarray(prompt.token_ids, np.int64), completion.token_ids]),
            generated=np.arange(prompt_length, prompt_length + len(completion)),
            rollout_logp=completion.logp,
            versions=completion.versions,
            advantage=advantage,
            topk_ids=topk_ids,
            rollout_topk_logp=topk_logp,
            truncated=completion.finish_reason == "length",
        )

    @property
    def tokens(self) -> int:
        """Number of generated tokens, T."""
        return len(self.generated)


def _with_sampled_column(completion: Completion) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Append the sampled token to mu's top K as one more column, unused (-inf) where it is among the K already."""
    if completion.topk_ids is None or completion.topk_logp is None:
        return None, None
    sampled = completion.token_ids[:, None]
    inside = (completion.topk_ids == sampled).any(axis=1, keepdims=True)
    sampled_logp = np.where(inside, np.float32(-np.inf), completion.logp[:, None])
    ids = np.concatenate([completion.topk_ids, sampled], axis=1)
    return ids, np.concatenate([completion.topk_logp, sampled_logp], axis=1).astype(np.float32)


@dataclass(frozen=True)
class TrainingBatch:
    """One micro-batch: B rows of at most L ids, and N generated tokens packed one after another.

    Attributes:
        input_ids: [B, L] int64, padded on the right; one row of many sequences where ``segments`` is given.
        predict_index: [N] int64, place in the flattened rows of the position that predicts each generated token.
        targets: [N] int64, the generated tokens.
        rollout_logp: [N] float32, log mu.
        advantage: [N] float32.
        weight: [N] float32, the token's share of the optimizer step's loss (the aggregation, see aggregation.py).
        sequence: [N] int64, index of the token's sequence within the micro-batch.
        position: [N] int64, place of the token in its completion.
        version: [N] int64, weight version that sampled the token.
        real_tokens: Number of ids in the rows that are not padding.
        saved_tokens: Number of ids that were spared because sequences share their beginning.
        position_ids: [1, L] int64 or None, place of each id in its own sequence.
        segments: How the row attends, or None for rows that are causal from end to end.
        topk_ids, rollout_topk_logp: [N, K + 1] or None.
        reference_logp, recomputed_logp: [N] float32 or None.
        rollout_hidden: [N, H] or None.
        chosen: [N] bool, or [N, C] for several choices, or None: what the region chose over the whole step.
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

    def to(self, device: torch.device | str) -> TrainingBatch:
        """The same batch with every tensor on ``device``."""
        moved: dict[str, Any] = {
            item.name: value.to(device, non_blocking=True)
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), Tensor)
        }
        if self.segments is not None:
            moved["segments"] = self.segments.to(device)
        return replace(self, **moved)


def pack(sequences: list[Sequence], weights: np.ndarray, layout: Layout = "rows") -> TrainingBatch:
    """Lay sequences out as one micro-batch.

    Args:
        sequences: B sequences; none makes an empty batch of one padding row, whose loss is a connected zero.
        weights: [B] share of each of the sequence's tokens in the optimizer step's loss.
        layout: "packed" only for a model that can run it, see Policy.layout.
    """
    laid = lay_out(sequences, layout)
    counts = [sequence.tokens for sequence in sequences]
    return TrainingBatch(
        input_ids=laid.input_ids,
        predict_index=_joined(laid.predict_index, torch.int64),
        targets=_joined([s.token_ids[s.generated] for s in sequences], torch.int64),
        rollout_logp=_joined([s.rollout_logp for s in sequences], torch.float32),
        advantage=_joined([np.full(s.tokens, s.advantage) for s in sequences], torch.float32),
        weight=torch.from_numpy(np.repeat(weights, counts)).float(),
        sequence=torch.from_numpy(np.repeat(np.arange(len(sequences)), counts)),
        position=_joined([np.arange(s.tokens) for s in sequences], torch.int64),
        version=_joined([s.versions for s in sequences], torch.int64),
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
