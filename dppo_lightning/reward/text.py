"""Rewards that compare text: ExactMatch and RegexMatch, and the helpers that other rewards share with them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dppo_lightning.base.errors import ConfigError, RewardError
from dppo_lightning.base.records import Prompt
from dppo_lightning.reward.base import RewardFunction, Sample


class ExactMatch(RewardFunction):
    """Reward of 1 when the completion is the reference answer, else 0.

    Args:
        strip: Ignore white space around both.
        ignore_case: Ignore the difference between upper and lower case.

    Raises:
        RewardError: When scoring: a prompt has no reference answer.
    """

    def __init__(self, strip: bool = True, ignore_case: bool = False) -> None:
        self.strip = strip
        self.ignore_case = ignore_case

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return [
            float(self._normal(sample.completion) == self._normal(reference_answer(sample, "ExactMatch")))
            for sample in samples
        ]

    def check(self, prompts: Sequence[Prompt]) -> dict[int, str]:
        return without_answer(prompts, blank_counts=not self.strip)

    def _normal(self, text: str) -> str:
        text = text.strip() if self.strip else text
        return text.casefold() if self.ignore_case else text


class RegexMatch(RewardFunction):
    """Reward of 1 when a regular expression is found in the completion, else 0.

    Args:
        pattern: Regular expression of Python; ``(?s)`` at its start lets ``.`` match line ends, ``(?i)`` ignores case.
        compare: Demand that group 1 of the last match is the prompt's reference answer too, white space around both
            ignored.

    Raises:
        ConfigError: The pattern is invalid, or has no group to compare.
        RewardError: When scoring with ``compare``: a prompt has no reference answer.
    """

    def __init__(self, pattern: str, compare: bool = False) -> None:
        self.pattern = compile_pattern("pattern", pattern, needs_group=compare)
        self.compare = compare

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return [float(self._matches(sample)) for sample in samples]

    def check(self, prompts: Sequence[Prompt]) -> dict[int, str]:
        return without_answer(prompts) if self.compare else {}

    def _matches(self, sample: Sample) -> bool:
        if not self.compare:
            return self.pattern.search(sample.completion) is not None
        answer = reference_answer(sample, "RegexMatch with compare")
        return last_group(self.pattern, sample.completion) == answer.strip()


def without_answer(prompts: Sequence[Prompt], blank_counts: bool = False) -> dict[int, str]:
    """Problems of the prompts that have no reference answer, place -> phrase, as ``RewardFunction.check`` returns them.

    Args:
        prompts: Prompts to look at.
        blank_counts: Whether white space is an answer.
    """
    problems = {}
    for place, prompt in enumerate(prompts):
        if prompt.answer is None:
            problems[place] = "has no answer"
        elif not (prompt.answer if blank_counts else prompt.answer.strip()):
            problems[place] = "has an empty answer"
    return problems


def reference_answer(sample: Sample, reward: str) -> str:
    """Return the sample's reference answer.

    Args:
        sample: The sample.
        reward: Name of the reward that needs the answer, for the message.

    Raises:
        RewardError: The sample has none.
    """
    if sample.answer is None:
        raise RewardError(
            f"{reward} needs a reference answer, and prompt {sample.prompt[-60:]!r} has none: "
            "let the prompt source read one, or choose another reward"
        )
    return sample.answer


def compile_pattern(argument: str, pattern: str, needs_group: bool) -> re.Pattern[str]:
    """Compile a user's regular expression.

    Raises:
        ConfigError: The expression is invalid, or a needed group is not there; names the argument.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{argument} {pattern!r} is not a regular expression: {error}") from None
    if needs_group and compiled.groups == 0:
        raise ConfigError(f"{argument} {pattern!r} has no group: put the answer's part in parentheses, as in '= (.+)'")
    return compiled


def last_group(pattern: re.Pattern[str], text: str) -> str | None:
    """Group 1 of the last match, without the white space around it; None when there is no match, or no such group."""
    matches = list(pattern.finditer(text))
    return None if not matches or matches[-1][1] is None else matches[-1][1].strip()
