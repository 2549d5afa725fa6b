"""Every reward with samples that it can score; the contract test runs over all of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import reasoning_gym

from dppo_lightning.reward import (
    CodeReward,
    ExactMatch,
    MathReward,
    PythonReward,
    ReasoningGymReward,
    RegexMatch,
    RewardFunction,
    Sample,
    WeightedSum,
)

COMPLETIONS = (
    "7",
    " 7\n",
    "the answer is 7",
    "<answer>7</answer>",
    "8",
    "",
    "é \N{SNOWMAN} 七",
    "\\boxed{",
    "7 or 8?",
    "1/0",
)


@dataclass(frozen=True)
class Case:
    name: str
    reward: RewardFunction
    samples: Sequence[Sample]


def gym_entry(task: str = "chain_sum", seed: int = 5) -> dict:
    """A question of a task, as ReasoningGymPrompts would put it into a prompt's columns."""
    return reasoning_gym.create_dataset(task, size=1, seed=seed)[0]


def gym_sample(completion: str, task: str = "chain_sum", seed: int = 5) -> Sample:
    """A sample of a reasoning-gym task with the given completion."""
    entry = gym_entry(task, seed)
    return Sample(entry["question"], completion, entry["answer"], {"task": task, "entry": entry})


def length(samples: Sequence[Sample], scale: float = 1.0) -> list[float]:
    """A function that PythonReward is tested with."""
    return [scale * len(sample.completion) for sample in samples]


TEXT = [Sample("3 + 4 =", completion, "7") for completion in COMPLETIONS]
GYM = [
    gym_sample(completion.replace("7", gym_entry(task)["answer"]), task)
    for task in ("chain_sum", "countdown", "spell_backward", "prime_factorization")
    for completion in COMPLETIONS
]

CODE = [
    Sample("a + b", completion, None, {"tests": [{"input": "3\n4\n", "output": "7"}]})
    for completion in ("print(int(input()) + int(input()))", "print(8)", "é \\", "")
]

CASES = [
    Case("exact", ExactMatch(), TEXT),
    Case("exact-case", ExactMatch(strip=False, ignore_case=True), TEXT),
    Case("regex", RegexMatch(r"\d"), TEXT),
    Case("regex-compare", RegexMatch(r"(\d)", compare=True), TEXT),
    Case("math", MathReward(), TEXT),
    Case("python", PythonReward("tests.reward.cases:length", {"scale": 0.5}), TEXT),
    Case("gym", ReasoningGymReward(), GYM),
    Case("gym-extract", ReasoningGymReward(extract="<answer>(.*?)</answer>", score="solved"), GYM),
    Case("gym-strict", ReasoningGymReward(score="strict"), GYM),
    Case("gym-lenient", ReasoningGymReward(score="lenient"), GYM),
    Case("code", CodeReward(test_timeout=60), CODE),
    Case("sum", WeightedSum([ExactMatch(), ReasoningGymReward()], [1.0, -0.5]), GYM),
]
