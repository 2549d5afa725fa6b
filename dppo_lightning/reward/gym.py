"""ReasoningGymReward: reasoning-gym's own scorers, and strict and lenient accuracy as parts."""

from __future__ import annotations

import inspect
import math
import re
import sys
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import cache
from typing import Any, Literal, get_args

from dppo_lightning.base.errors import ConfigError, RewardError, one_line, require
from dppo_lightning.base.records import Prompt
from dppo_lightning.reward.base import RewardFunction, Sample, Score
from dppo_lightning.reward.text import compile_pattern, last_group

Scorer = Callable[[str | None, Mapping[str, Any]], float]
Measure = Literal["gym", "solved", "strict", "lenient"]


class ReasoningGymReward(RewardFunction):
    """Reward that scores answers to the prompts of ReasoningGymPrompts with the scorer of their task.

    The parts "strict" (the answer equals the reference answer) and "lenient" (the completion contains it: the last
    number in it, or a word) separate what a model knows from whether it keeps to the format. Prompts that have no
    reference answer, as those of some puzzles, have no parts.

    Some of the library's scorers evaluate the answer as an expression; an answer to such a task is scored in a process
    of its own.

    Args:
        extract: Regular expression; group 1 of its last match in the completion is the answer. A completion without a
            match gets 0. With None the whole completion is the answer, white space around it ignored. "lenient" always
            reads the whole completion.
        score: Measure that is the reward. "gym": the task's scorer, in [0, 1], where a wrong answer may get partial
            credit. "solved": 1 when that scorer gives 1, else 0. "strict" and "lenient": the part of that name.

    Raises:
        ConfigError: ``extract`` is no regular expression with a group, ``score`` is unknown, or reasoning-gym is not
            installed.
        RewardError: When scoring: a prompt does not have what ReasoningGymPrompts gives.
    """

    def __init__(self, extract: str | None = None, score: Measure = "gym") -> None:
        if score not in get_args(Measure):
            raise ConfigError(f"score must be one of {', '.join(get_args(Measure))}, got {score!r}")
        require("reasoning_gym")
        self.extract = None if extract is None else compile_pattern("extract", extract, needs_group=True)
        self.measure = score
        self._scorers: dict[str, Scorer] = {}

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        return [self._score(sample) for sample in samples]

    def prepare(self) -> None:
        require("reasoning_gym")

    def runs(self, prompt: Prompt) -> bool:
        task = prompt.columns.get("task")
        return isinstance(task, str) and self._scorer(task) is not None and evaluates(task)

    def check(self, prompts: Sequence[Prompt]) -> dict[int, str]:
        found = {place: self._problem(prompt) for place, prompt in enumerate(prompts)}
        problems = {place: what for place, what in found.items() if what is not None}
        tried: set[str] = set()
        for place, prompt in enumerate(prompts):
            # What one entry went through, as a table that makes lists of tuples, every one of its task did; and some
            # scorers take 40 ms.
            if place in problems or prompt.columns["task"] in tried:
                continue
            task, entry = prompt.columns["task"], prompt.columns["entry"]
            tried.add(task)
            try:
                _check_entry(self._scorer(task), task, entry)
            except RewardError as error:
                problems[place] = f"is broken: {error}"
        return problems

    def _problem(self, prompt: Prompt) -> str | None:
        task, entry = prompt.columns.get("task"), prompt.columns.get("entry")
        if not isinstance(task, str) or not isinstance(entry, Mapping):
            return "lacks the columns 'task' and 'entry' that ReasoningGymPrompts gives"
        try:
            self._scorer(task)
        except RewardError:
            return f"is of the task {task!r}, which reasoning-gym cannot score"
        lacking = [name for name in ("question", "answer", "metadata") if name not in entry]
        if lacking:
            return f"has an entry without {', '.join(lacking)}"
        if self.measure in ("strict", "lenient") and prompt.answer is None and entry.get("answer") is None:
            return f"has no answer, which score={self.measure!r} needs"
        return None

    def _score(self, sample: Sample) -> Score:
        task, entry = _task_and_entry(sample)
        scorer = self._scorer(task)
        parts = self._parts(sample, entry)
        if self.measure in ("strict", "lenient"):
            if not parts:
                raise RewardError(
                    f"score={self.measure!r} needs a reference answer, and a prompt of {task!r} has none: use 'gym'"
                )
            return Score(parts[self.measure], parts)
        answer = self._answer(sample)
        value = 0.0 if answer is None else _scored(scorer, answer, task, entry)
        return Score(float(value >= 1 - 1e-9) if self.measure == "solved" else value, parts)

    def _answer(self, sample: Sample) -> str | None:
        return sample.completion.strip() if self.extract is None else last_group(self.extract, sample.completion)

    def _parts(self, sample: Sample, entry: Mapping[str, Any]) -> dict[str, float]:
        reference = sample.answer if sample.answer is not None else entry.get("answer")
        if reference is None:
            return {}
        answer = self._answer(sample)
        strict = answer is not None and is_answer(answer, str(reference))
        return {"strict": float(strict), "lenient": float(strict or contains_answer(sample.completion, str(reference)))}

    def _scorer(self, task: str) -> Scorer:
        if task not in self._scorers:
            try:
                self._scorers[task] = require("reasoning_gym").get_score_answer_fn(task)
            except (ValueError, AssertionError) as error:
                raise RewardError(
                    f"reasoning-gym has no scorer for task {task!r} ({one_line(error)}): choose another"
                ) from error
        return self._scorers[task]


def _task_and_entry(sample: Sample) -> tuple[str, Mapping[str, Any]]:
    task, entry = sample.columns.get("task"), sample.columns.get("entry")
    if not isinstance(task, str) or not isinstance(entry, Mapping):
        raise RewardError(
            f"ReasoningGymReward needs the columns 'task' (a name) and 'entry' (a mapping), and prompt "
            f"{sample.prompt[-60:]!r} has {sorted(sample.columns)}: take the prompts from ReasoningGymPrompts"
        )
    return task, entry


def _scored(scorer: Scorer, answer: str, task: str, entry: Mapping[str, Any]) -> float:
    try:
        value = float(scorer(answer, entry))
    except MemoryError:
        raise
    except Exception:
        # The scorers parse the model's text with int, json, sympy and more, and many let their errors through: an
        # answer that cannot be parsed is a wrong answer, and must not end a run. Only a broken entry is an error.
        _check_entry(scorer, task, entry)
        return 0.0
    return value if math.isfinite(value) else 0.0


def _check_entry(scorer: Scorer, task: str, entry: Mapping[str, Any]) -> None:
    try:
        scorer(entry.get("answer"), entry)
    except Exception as error:
        raise RewardError(
            f"task {task!r} cannot score even its own answer ({one_line(error, typed=True)}): its column 'entry' was "
            "changed, take the prompts from ReasoningGymPrompts"
        ) from error


@cache
def evaluates(task: str) -> bool:
    """Tell whether the scorer of a task may evaluate an answer: whether its source names what does."""
    scorer = require("reasoning_gym").get_score_answer_fn(task)
    modules = [sys.modules[kind.__module__] for kind in type(scorer.__self__).__mro__ if kind not in (object, ABC)]
    return any(_EVALUATING.search(inspect.getsource(module)) for module in modules if hasattr(module, "__file__"))


_EVALUATING = re.compile(r"\b(eval|exec|compile)\(|\b(sympy|pickle|yaml|subprocess|importlib)\b")


# Latin letters only: a number inside "x12" or "12th" is not one, a number between Chinese characters is.
# A minus after a digit, a letter or a bracket is an operator: "5-3" ends with 3.
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_./])(?:(?<![A-Za-z0-9_)])-)?"
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+|/0*[1-9][0-9]*)?(?![A-Za-z0-9_])"
)


def is_answer(text: str, answer: str) -> bool:
    """Tell whether the text equals the answer, white space around both ignored (strict accuracy)."""
    return text.strip() == answer.strip()


def contains_answer(text: str, answer: str) -> bool:
    """Tell whether the text has the answer in it (lenient accuracy).

    An answer that is a number must equal the last number in the text ("1,000" and "1000.0" are equal); any other must
    occur in the text and not as a part of a longer word.
    """
    answer = answer.strip()
    if is_answer(text, answer):
        return True
    number = _value(answer)
    if number is not None:
        numbers = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
        return bool(numbers) and _value(numbers[-1]) == number
    return answer != "" and re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text) is not None


def _value(text: str) -> Fraction | None:
    """Number that the whole text is, or None."""
    if _NUMBER.fullmatch(text) is None:
        return None
    try:
        return Fraction(text.replace(",", ""))
    except ValueError:  # Python refuses integers of more than 4,300 digits; a model may write one
        return None
