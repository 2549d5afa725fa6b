"""Records of a run: Prompt, Completion, Group and Sequence. Everything between the five verbs is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:  # reward workers import this file, and torch costs each of them seconds and 300 MB
    from torch import Tensor

FinishReason = Literal["stop", "length", "abort"]
FailureKind = Literal["timeout", "memory", "died", "raised"]


@dataclass(frozen=True)
class Prompt:
    """One question, already rendered by the chat template and tokenised.

    Attributes:
        id: Unique and stable within a run, e.g. ``"train/17"``.
        token_ids: Ids that the engine is given; never re-tokenised.
        text: The rendered text that ``token_ids`` encode, for logs and rewards.
        answer: The reference answer, if the source has one.
        columns: Any extra columns of the source's row; passed on to rewards untouched.
        where: File and line of the question, for messages.
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
        request_id: Id of the request that it answers.
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


class Failure(NamedTuple):
    """Completion that could not be scored.

    Attributes:
        kind: Way in which scoring it failed.
        detail: What happened, in one line.
    """

    kind: FailureKind
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}" if self.detail else self.kind


@dataclass
class Group:
    """Completions of one prompt with their texts, rewards and advantages. G is their number.

    Attributes:
        prompt: The prompt.
        completions: G completions.
        texts: [G] texts of the completions, without the tokens that begin, end and pad a text.
        raw_texts: [G] texts with every token; None where ``texts`` lacks only the one that ended it.
        rewards: [G] float64 rewards, or None before the reward verb.
        reward_parts: Named parts that the reward reported, name -> [G] float64.
        failures: [G] what became of those that could not be scored, None for the others.
        advantages: Advantages, for each completion [T] float64, one for each of its tokens; None before the advantage
            verb.
        reference_logp: Log-probs under the reference model, [T] for each completion that has a token, or None.
        step: Optimizer step that trains on the group, counted from 0; None before the step is laid out, and in
            evaluation.
    """

    prompt: Prompt
    completions: list[Completion]
    texts: list[str]
    rewards: np.ndarray | None = None
    reward_parts: dict[str, np.ndarray] = field(default_factory=dict)
    advantages: list[np.ndarray] | None = None
    reference_logp: list[np.ndarray] | None = None
    raw_texts: list[str | None] = field(default_factory=list)
    failures: list[Failure | None] = field(default_factory=list)
    step: int | None = None

    def sequences(self) -> list[Sequence]:
        """Training sequences of the group, one for each completion that has at least one token."""
        nothing: list[np.ndarray | float] = [0.0] * len(self.completions)
        advantages = nothing if self.advantages is None else self.advantages
        rows = [
            Sequence.from_completion(self.prompt, completion, advantage)
            for completion, advantage in zip(self.completions, advantages, strict=True)
            if len(completion) > 0
        ]
        if self.reference_logp is not None:
            for row, logp in zip(rows, self.reference_logp, strict=True):
                row.reference_logp = logp
        return rows

    def records(self) -> list[dict[str, Any]]:
        """JSON-ready records, one for each completion; a reward part that was not reported for it is None."""
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
            if self.failures and (failure := self.failures[index]) is not None:
                row["not_scored"] = str(failure)
            if self.advantages is not None:
                row["advantage"] = _as_number(self.advantages[index])
            versions = [int(completion.versions[0]), int(completion.versions[-1])] if len(completion) else []
            row |= {"tokens": len(completion), "finish_reason": completion.finish_reason, "versions": versions}
            rows.append(row)
        return rows


def _as_number(advantage: np.ndarray) -> float:
    """Advantage of a completion for a log: the one of its tokens, or their mean; 0 if it has no token."""
    if len(advantage) == 0 or (advantage == advantage[0]).all():
        return float(advantage[0]) if len(advantage) else 0.0
    return float(advantage.mean())


@dataclass
class Sequence:
    """One row to train on: L token ids, T of which the model generated (T >= 1).

    Attributes:
        token_ids: [L] int64, prompt and generated ids.
        generated: [T] int64, places of the generated tokens in the row, ascending, each >= 1.
        rollout_logp: [T] float32, log mu.
        versions: [T] int64, weight version of each token.
        advantage: [T] float64, advantage of each token; a single number is given to every token.
        topk_ids: [T, K + 1] int64 or None: mu's K most likely ids, then the sampled token.
        rollout_topk_logp: [T, K + 1] float32 or None: their log mu; -inf in the last column when the sampled token is
            among the K.
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
    advantage: np.ndarray | float = 0.0
    topk_ids: np.ndarray | None = None
    rollout_topk_logp: np.ndarray | None = None
    reference_logp: np.ndarray | None = None
    recomputed_logp: np.ndarray | None = None
    rollout_hidden: Tensor | None = None
    truncated: bool = False

    def __post_init__(self) -> None:
        self.advantage = np.broadcast_to(np.asarray(self.advantage, np.float64), self.generated.shape)

    @classmethod
    def from_completion(cls, prompt: Prompt, completion: Completion, advantage: np.ndarray | float) -> Sequence:
        """Lay a prompt and its completion in one row.

        Args:
            prompt: The prompt.
            completion: Its completion, of T >= 1 tokens.
            advantage: [T] advantages, or one for all tokens.
        """
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
