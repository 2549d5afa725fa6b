"""What a reward cannot score is found before a run, with its row."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from dppo_lightning.base.errors import DataError, RewardError
from dppo_lightning.base.records import Prompt
from dppo_lightning.reward import (
    ExactMatch,
    MathReward,
    PythonReward,
    ReasoningGymReward,
    RegexMatch,
    RewardFunction,
    Sample,
    WeightedSum,
)
from dppo_lightning.reward.base import scorable, unreadable
from tests.reward.cases import CASES, Case, gym_entry


def prompts(*answers: str | None) -> list[Prompt]:
    return [Prompt(f"train/{i}", (1,), "?", answer, where=f"a.jsonl, line {i}") for i, answer in enumerate(answers)]


def gym_prompt(entry: Any, answer: str | None = "1", task: Any = "chain_sum") -> Prompt:
    return Prompt("train/0", (1,), "?", answer, {"task": task, "entry": entry})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_a_reward_can_score_passes_its_check(case: Case) -> None:
    asked = [Prompt(str(i), (1,), s.prompt, s.answer, s.columns) for i, s in enumerate(case.samples)]
    assert unreadable(asked, case.reward) == {}
    assert unreadable([], case.reward) == {}


ANSWERS = ("7", None, "", " \n", "x")


@pytest.mark.parametrize(
    ("reward", "bad"),
    [
        (ExactMatch(), {1: "has no answer", 2: "has an empty answer", 3: "has an empty answer"}),
        (ExactMatch(strip=False), {1: "has no answer", 2: "has an empty answer"}),
        (RegexMatch("(.)", compare=True), {1: "has no answer", 2: "has an empty answer", 3: "has an empty answer"}),
        (RegexMatch("."), {}),
        (
            WeightedSum(
                [RegexMatch("."), ExactMatch(strip=False), RegexMatch("(.)", True)], [1, 1, 0], ["a", "b", "c"]
            ),
            {
                1: "has no answer (b) and has no answer (c)",
                2: "has an empty answer (b) and has an empty answer (c)",
                3: "has an empty answer (c)",
            },
        ),
    ],
)
def test_missing_and_empty_answers_are_found(reward: RewardFunction, bad: dict[int, str]) -> None:
    found = unreadable(prompts(*ANSWERS), reward)
    assert found == bad


@pytest.mark.parametrize("reward", [ExactMatch(), RegexMatch("(.)", compare=True), MathReward()])
def test_a_prompt_that_passes_can_be_scored_and_one_without_an_answer_cannot(reward: RewardFunction) -> None:
    asked = prompts(*ANSWERS, "\\", "1/2")
    found = unreadable(asked, reward)
    for place, prompt in enumerate(asked):
        if place not in found:
            reward([Sample("?", "7", prompt.answer)])
        elif prompt.answer is None:
            with pytest.raises(RewardError):
                reward([Sample("?", "7", prompt.answer)])


def test_answers_that_are_no_mathematics_are_found() -> None:
    found = unreadable(prompts("7", "\\", None, "\\frac12", "\\"), MathReward())
    assert found == {
        1: r"has the answer '\\', which is no mathematics",
        2: "has no answer",
        4: r"has the answer '\\', which is no mathematics",
    }


def test_prompts_that_reasoning_gym_cannot_score_are_found() -> None:
    entry = gym_entry()
    whole = gym_prompt(entry)
    asked = [
        whole,
        dataclasses.replace(whole, columns={}),
        gym_prompt("text"),
        gym_prompt(entry, task="no_such_task"),
        gym_prompt({"question": "?"}),
        whole,
    ]
    found = unreadable(asked, ReasoningGymReward())
    assert sorted(found) == [1, 2, 3, 4]
    assert found[4] == "has an entry without answer, metadata"
    puzzle = gym_prompt(gym_entry("graph_color"), None, "graph_color")
    assert unreadable([puzzle], ReasoningGymReward()) == {}
    assert "has no answer" in unreadable([puzzle], ReasoningGymReward(score="strict"))[0]
    task = "prime_factorization"
    broken = gym_prompt(gym_entry(task) | {"answer": "nonsense"}, None, task)
    assert unreadable([broken], ReasoningGymReward())[0].startswith(f"is broken: task {task!r} cannot score")


class Own:
    """A reward of a user's own, with a check."""

    def __call__(self, samples: Sequence[Sample], least: int = 2) -> list[float]:
        return [0.0 for _ in samples]

    def check(self, prompts: Sequence[Prompt], least: int = 2) -> Mapping[int, str]:
        return {i: "is short" for i, prompt in enumerate(prompts) if len(prompt.answer or "") < least}


own = Own()


def test_a_python_reward_may_bring_a_check() -> None:
    reward = PythonReward("tests.reward.test_check:own", {"least": 3})
    assert unreadable(prompts("aaa", "aa"), reward) == {1: "is short"}
    assert unreadable(prompts(None), PythonReward("tests.reward.cases:length")) == {}


class Wrong(RewardFunction):
    def __init__(self, result: Any) -> None:
        self.result = result

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return []

    def check(self, prompts: Sequence[Prompt]) -> Mapping[int, str]:
        if isinstance(self.result, Exception):
            raise self.result
        return self.result  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("result", "problem"),
    [
        (None, "Wrong.check returned None: return a mapping"),
        ({9: "far"}, "Wrong.check returned"),
        ({0: 1}, "Wrong.check returned"),
        (["bad"], "Wrong.check returned"),
        (KeyError("x"), "Wrong.check raised KeyError"),
    ],
)
def test_a_check_that_is_wrong_itself_is_named(result: Any, problem: str) -> None:
    with pytest.raises(RewardError, match=problem):
        unreadable(prompts("1"), Wrong(result))


def test_a_refusal_lists_rows_in_one_line_and_says_what_to_change() -> None:
    with pytest.raises(DataError) as caught:
        scorable(prompts("1", *[None] * 7), ExactMatch(), "refuse", "heldout")
    message = str(caught.value)
    assert message.startswith(
        "7 of 8 held-out prompts cannot be scored by ExactMatch: a.jsonl, line 1 has no answer; a."
    )
    assert "line 5 has no answer; and 2 more" in message
    assert "data.unreadable_answers: drop" in message
    assert "\n" not in message


def test_what_is_left_out_by_choice_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        kept = scorable(prompts("1", None, "2"), ExactMatch(), "drop", "train")
    assert [prompt.id for prompt in kept] == ["train/0", "train/2"]
    assert "left out: 1 of 3 training prompts cannot be scored by ExactMatch: a.jsonl, line 1" in caplog.text
    assert scorable(prompts(None), ExactMatch(), "drop", "heldout") == []
    with pytest.raises(DataError, match="nothing is left to train on, 1 of 1"):
        scorable(prompts(None), ExactMatch(), "drop", "train")
