"""Rollout streams on scripted engines: no model, and a clock of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from dppo_lightning.advantage import GroupMean
from dppo_lightning.base.records import Prompt
from dppo_lightning.generate.engine import EngineSpec, Sampling
from dppo_lightning.generate.scripted import ScriptedEngine
from dppo_lightning.generate.stream import RolloutStream
from dppo_lightning.prompts.sampler import PromptSampler, Shuffled
from tests.helpers.models import END
from tests.helpers.rewards import IN_PROCESS


def numbered_prompts(count: int) -> list[Prompt]:
    """Prompts of two tokens that differ in id, tokens, text, answer and a column."""
    return [Prompt(f"train/{i}", (10 + i, 20), f"*{i}", str(i), {"level": i}) for i in range(count)]


def shuffled(prompts: Sequence[Prompt], seed: int = 0) -> PromptSampler:
    """Sampler that has been started."""
    sampler = Shuffled()
    sampler.start(prompts, seed)
    return sampler


def make_stream(
    engine: ScriptedEngine, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], **arguments: Any
) -> RolloutStream:
    """Make a stream of shuffled prompts on an engine, which is started here.

    Args:
        engine: Engine that answers.
        tokenizer: Tokenizer that makes text of its tokens.
        prompts: Prompts that are asked.
        arguments: Arguments of RolloutStream; at least ``reward``, ``samples_per_prompt`` and ``schedule``.
    """
    engine.start(EngineSpec("none", stop_token_ids=(END,)))
    defaults: dict[str, Any] = {
        "engine": engine,
        "sampler": shuffled(prompts),
        "tokenizer": tokenizer,
        "advantage": GroupMean(),
        "sampling": Sampling(max_new_tokens=6),
        "seed": 0,
        "rewarding": IN_PROCESS,
    }
    return RolloutStream(**(defaults | arguments))


def give_weights(stream: RolloutStream, version: int) -> None:
    """Tell the engine that the policy has new weights, as a weight sync does."""
    with stream.updating(version):
        stream.inbox.engine.update_weights([], version)
