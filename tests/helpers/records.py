"""Completions, groups and sequences made by hand or drawn at random, without an engine."""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np

from dppo_lightning.base.records import Completion, FinishReason, Group, Prompt, Sequence


def make_completion(
    token_ids: Many[int], logp: float | Many[float] = 0.0, reason: FinishReason = "stop", topk: np.ndarray | None = None
) -> Completion:
    """Completion under weight version 0.

    Args:
        token_ids: Generated tokens.
        logp: Log-prob of each, or one number for all.
        reason: Finish reason.
        topk: [T, K] ids of the engine's top-K, each with log-prob -1; None: no top-K.
    """
    count = len(token_ids)
    return Completion(
        request_id="r",
        token_ids=np.array(token_ids, np.int64),
        logp=np.broadcast_to(np.asarray(logp, np.float32), count).copy(),
        finish_reason=reason,
        versions=np.zeros(count, np.int64),
        topk_ids=topk,
        topk_logp=None if topk is None else -np.ones_like(topk, np.float32),
    )


def make_sequence(
    prompt_ids: Many[int], token_ids: Many[int], logp: float | Many[float] = 0.0, advantage: float = 0.0
) -> Sequence:
    """Sequence of one prompt and one completion."""
    prompt = Prompt("p", tuple(map(int, prompt_ids)), "")
    return Sequence.from_completion(prompt, make_completion(token_ids, logp), advantage)


def random_sequence(
    prompt: int,
    tokens: int,
    seed: int,
    ids: tuple[int, int] = (0, 96),
    logp: float = 0.0,
    advantage: float = 0.0,
) -> Sequence:
    """Sequence of random tokens.

    Args:
        prompt: Tokens of the prompt.
        tokens: Tokens of the completion.
        seed: Seed of the draw.
        ids: First id that is drawn, and the first above.
        logp: Log-prob of each token of the completion under the rollout policy.
        advantage: Advantage of the completion.
    """
    drawn = np.random.default_rng(seed).integers(*ids, prompt + tokens)
    return make_sequence(drawn[:prompt], drawn[prompt:], logp, advantage)


def make_group(
    rewards: Many[float],
    lengths: Many[int] | None = None,
    reasons: Many[FinishReason] | None = None,
    **parts: list[float],
) -> Group:
    """Group of one prompt with rewards.

    Args:
        rewards: Reward of each completion.
        lengths: Tokens of each; None: one token.
        reasons: Finish reason of each; None: "stop".
        parts: Reward parts by name, one number for each completion.
    """
    lengths, reasons = lengths or [1] * len(rewards), reasons or ["stop"] * len(rewards)
    completions = [make_completion([0] * count, reason=reason) for count, reason in zip(lengths, reasons, strict=True)]
    group = Group(Prompt("p", (1,), ""), completions, [""] * len(completions), np.array(rewards))
    group.reward_parts = {name: np.array(values) for name, values in parts.items()}
    return group
