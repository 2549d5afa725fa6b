"""MathReward: grades mathematics with math-verify."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from dppo_lightning.base.errors import RewardError, require
from dppo_lightning.base.records import Prompt
from dppo_lightning.reward.base import RewardFunction, Sample
from dppo_lightning.reward.text import reference_answer, without_answer


class MathReward(RewardFunction):
    r"""Reward of 1 when the completion's final result equals the reference answer as mathematics, else 0.

    The result is found by math-verify: the last ``\boxed{}``, else a formula or a number. Reference answers are
    numbers or LaTeX, with or without ``$`` or ``\boxed{}``; ``\frac{1}{2}``, 0.5 and 1/2 are equal.

    Raises:
        ConfigError: math-verify is not installed.
        RewardError: When scoring: a prompt's reference answer is missing or no mathematics.
    """

    def __init__(self) -> None:
        require("math_verify")
        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that we keep the time limits

    def prepare(self) -> None:
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        self._equal(self._parse("$1$"), self._parse("$2$"))  # its parser builds tables when it is first used

    def score(self, samples: Sequence[Sample]) -> list[float]:
        answers = [reference_answer(sample, "MathReward") for sample in samples]
        references = {answer: self._readable(answer) for answer in dict.fromkeys(answers)}
        return [
            float(self._equal(references[answer], self._parse(sample.completion)))
            for answer, sample in zip(answers, samples, strict=True)
        ]

    def check(self, prompts: Sequence[Prompt]) -> dict[int, str]:
        problems = without_answer(prompts)
        answers = {prompt.answer for place, prompt in enumerate(prompts) if place not in problems}
        bad = {answer for answer in answers if answer is not None and not self._reference(answer)}
        unread = {
            place: f"has the answer {prompt.answer!r}, which is no mathematics"
            for place, prompt in enumerate(prompts)
            if prompt.answer in bad
        }
        return problems | unread

    def _readable(self, answer: str) -> list[Any]:
        parsed = self._reference(answer)
        if not parsed:
            raise RewardError(
                f"MathReward cannot read the reference answer {answer!r} as mathematics: mend or remove that prompt, "
                "or use ExactMatch"
            )
        return parsed

    def _reference(self, answer: str) -> list[Any]:
        # Without delimiters math-verify sees numbers only: "x^2+1" and "\sqrt{2}" would be found empty.
        delimited = "$" in answer or "\\boxed" in answer
        return self._parse(answer if delimited else f"${answer}$") or self._parse(answer)

    # math-verify's own time limits are kept by the signal that a worker needs for its own.

    def _parse(self, text: str) -> list[Any]:
        return require("math_verify").parse(text, parsing_timeout=None)

    def _equal(self, reference: list[Any], result: list[Any]) -> bool:
        return bool(require("math_verify").verify(reference, result, timeout_seconds=None))
