"""RolloutStream: the first three of the five verbs, generate -> reward -> advantage. The other two are in module.py."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dppo_lightning.advantage import AdvantageEstimator
from dppo_lightning.batch import Completion, Group, Prompt
from dppo_lightning.errors import EngineError
from dppo_lightning.prompts.sampler import PromptSampler
from dppo_lightning.rewards.base import RewardFunction, Sample
from dppo_lightning.rollout.engine import Failed, Request, RolloutEngine, Sampling

Progress = Callable[[int, int], None]
"""Called with (completions finished, completions asked for) while a rollout is generated."""

RewardPenalty = Callable[[list[Group]], list[np.ndarray]]
"""For each group what is subtracted from its [G] rewards before the advantage (KL to the reference, in reward)."""


@dataclass
class Rollout:
    """One rollout's groups, in the order of their prompts, and what making them cost.

    Attributes:
        groups: Rewarded, with advantages.
        failed: Requests that the engine could not serve.
        seconds: "generate" and "reward".
    """

    groups: list[Group]
    failed: int
    seconds: dict[str, float]

    @property
    def tokens(self) -> int:
        """Generated tokens."""
        return sum(len(completion) for group in self.groups for completion in group.completions)


class RolloutStream:
    """Turns prompts into groups that can be trained on.

    Args:
        engine: Started.
        sampler: Gives the training prompts.
        tokenizer: Turns token ids into the text that rewards see.
        reward: Scores completions.
        advantage: Turns rewards into advantages.
        sampling: How training completions are drawn.
        samples_per_prompt: Completions of each prompt.
        seed: Of the run; each request's seed is derived from (run seed, rollout, prompt, sample).
        penalty: Subtracted from the rewards before the advantage.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        sampler: PromptSampler,
        tokenizer: PreTrainedTokenizerBase,
        reward: RewardFunction,
        advantage: AdvantageEstimator,
        sampling: Sampling,
        samples_per_prompt: int,
        seed: int,
        penalty: RewardPenalty | None = None,
    ) -> None:
        self.engine = engine
        self.sampler = sampler
        self.tokenizer = tokenizer
        self.reward = reward
        self.advantage = advantage
        self.sampling = sampling
        self.samples_per_prompt = samples_per_prompt
        self.seed = seed
        self.penalty = penalty
        self.rollouts = 0

    def next_rollout(self, prompts: int, progress: Progress | None = None) -> Rollout:
        """Draw prompts, generate, reward, and estimate advantages."""
        drawn = self.sampler.draw(prompts)
        rollout = self.sample(drawn, self.samples_per_prompt, self.sampling, f"train/{self.rollouts}", progress)
        self.estimate_advantages(rollout.groups)
        self.rollouts += 1
        return rollout

    def sample(
        self, prompts: list[Prompt], samples: int, sampling: Sampling, label: str, progress: Progress | None = None
    ) -> Rollout:
        """Generate and reward ``samples`` completions of each prompt; ``label`` enters the seeds."""
        started = time.perf_counter()
        groups, failures = self.generate(prompts, samples, sampling, label, progress)
        generated = time.perf_counter()
        self.score(groups)
        seconds = {"generate": generated - started, "reward": time.perf_counter() - generated}
        return Rollout(groups, len(failures), seconds)

    def generate(
        self, prompts: list[Prompt], samples: int, sampling: Sampling, label: str, progress: Progress | None = None
    ) -> tuple[list[Group], list[Failed]]:
        """Complete every prompt ``samples`` times; a prompt none of whose requests could be served has no group.

        Raises:
            EngineError: The engine died, lost a request, or could serve none at all.
        """
        requests = [
            Request(
                id=f"{label}/{index}/{sample}",
                prompt_token_ids=prompt.token_ids,
                sampling=sampling,
                seed=derive_seed(self.seed, label, index, prompt.id, sample),
                group=f"{label}/{index}",
            )
            for index, prompt in enumerate(prompts)
            for sample in range(samples)
        ]
        self.engine.submit(requests)
        results: dict[str, Completion | Failed] = {}
        while len(results) < len(requests):
            arrived = self.engine.poll(timeout=1.0)
            if not arrived and self.engine.health().in_flight == 0:
                raise EngineError(f"the engine lost {len(requests) - len(results)} of {len(requests)} requests")
            results |= {result.request_id: result for result in arrived}
            if progress is not None:
                progress(len(results), len(requests))
        failures = [result for result in results.values() if isinstance(result, Failed)]
        if len(failures) == len(requests):
            raise EngineError(f"the engine could serve none of {len(requests)} requests: {failures[0].reason}")
        groups = []
        for index, prompt in enumerate(prompts):
            mine = [results[request.id] for request in requests[index * samples : (index + 1) * samples]]
            completions = [result for result in mine if isinstance(result, Completion)]
            if completions:
                groups.append(Group(prompt, completions, self._texts(completions)))
        return groups, failures

    def _texts(self, completions: Iterable[Completion]) -> list[str]:
        ids = [completion.token_ids.tolist() for completion in completions]
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def score(self, groups: list[Group]) -> None:
        """Fill in rewards and their named parts, in one call of the reward for all completions."""
        samples = [
            Sample(
                prompt=group.prompt.text,
                completion=text,
                answer=group.prompt.answer,
                columns=group.prompt.columns,
                finished=completion.finish_reason == "stop",
            )
            for group in groups
            for completion, text in zip(group.completions, group.texts, strict=True)
        ]
        scores = iter(self.reward(samples))
        for group in groups:
            mine = [next(scores) for _ in group.completions]
            group.rewards = np.array([score.value for score in mine], np.float64)
            names = dict.fromkeys(name for score in mine for name in score.parts)
            group.reward_parts = {name: np.array([score.parts.get(name, np.nan) for score in mine]) for name in names}

    def estimate_advantages(self, groups: list[Group]) -> None:
        """Fill in advantages; KL in the reward is subtracted first."""
        rewards = [np.asarray(group.rewards) for group in groups]
        if self.penalty is not None:
            rewards = [reward - cost for reward, cost in zip(rewards, self.penalty(groups), strict=True)]
        for group, advantages in zip(groups, self.advantage.estimate(rewards), strict=True):
            group.advantages = advantages

    def state_dict(self) -> dict[str, Any]:
        return {"rollouts": self.rollouts, "sampler": self.sampler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rollouts = state["rollouts"]
        self.sampler.load_state_dict(state["sampler"])


def derive_seed(*parts: object) -> int:
    """A seed in [0, 2**63) that depends on every part and on nothing else."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
