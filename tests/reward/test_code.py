"""CodeReward: programs that pass tests, that do not, and that cheat."""

from __future__ import annotations

from typing import Any

import pytest

from dppo_lightning.base.errors import ConfigError, RewardError
from dppo_lightning.base.records import Prompt
from dppo_lightning.reward import CodeReward, Sample
from dppo_lightning.reward.base import unreadable
from dppo_lightning.reward.code import equal

ADD = [{"arguments": [1, 2], "expected": 3}, {"arguments": [-1, 1], "expected": 0}]
ECHO = [{"input": "3\n4\n", "output": "7\n"}, {"input": "1\n1\n", "output": "2"}]


def value(completion: str, columns: dict[str, Any], **settings: Any) -> float:
    return CodeReward(**settings)([Sample("?", completion, None, columns)])[0].value


@pytest.mark.parametrize(
    ("completion", "passed"),
    [
        ("print(int(input()) + int(input()))", 1.0),
        ("```python\nprint(int(input()) + int(input()))\n```", 1.0),
        ("No:\n```\nprint(0)\n```\nbut\n```py\nprint(int(input()) + int(input()), '  ')\nprint()\n``` is right", 1.0),
        ("print(7)", 0.5),
        ("print(7); raise SystemExit(1)", 0.0),
        ("print(7) if", 0.0),
        ("", 0.0),
    ],
)
def test_what_a_program_prints_is_compared(completion: str, passed: float) -> None:
    assert value(completion, {"tests": ECHO}, score="share") == passed
    assert value(completion, {"tests": ECHO}) == float(passed == 1)


@pytest.mark.parametrize(
    ("completion", "passed"),
    [
        ("def add(a, b): return a + b", 1.0),
        ("def add(a, b):\n print('talk')\n return float(a + b)", 1.0),
        ("def add(a, b): return 3", 0.5),
        ("def add(a, b): return {1: object()}", 0.0),
        ("def plus(a, b): return a + b", 0.0),
        ("import sys; sys.exit(0)", 0.0),
        ("class Any:\n def __eq__(self, other): return True\ndef add(a, b): return Any()", 0.0),
    ],
)
def test_what_a_function_returns_is_compared(completion: str, passed: float) -> None:
    assert value(completion, {"tests": ADD, "entry_point": "add"}, score="share") == passed


@pytest.mark.parametrize(
    ("completion", "passed"),
    [
        ("    return a + b\n", 1.0),
        ("    return a * b\n", 0.0),
        ("    import os; os._exit(0)", 0.0),
        ("    raise SystemExit(0)", 0.0),
        ("    return a + b\nimport os; os._exit(0)", 0.0),
    ],
)
def test_statements_must_run_to_their_end(completion: str, passed: float) -> None:
    columns = {"prefix": "def add(a, b):\n", "tests": ["assert add(1, 2) == 3\nassert add(2, 2) == 4"]}
    assert value(completion, columns) == passed


def test_a_test_that_takes_too_long_is_not_passed_and_the_next_is_run() -> None:
    program = "a, b = input(), input()\nwhile a == '3': pass\nprint(2)"
    assert value(program, {"tests": ECHO}, score="share", test_timeout=5) == 0.5
    assert value("while True: pass", {"tests": ECHO}, score="share", test_timeout=0.3) == 0


def test_endless_output_is_wrong() -> None:
    assert value("while True: print('x' * 1000)", {"tests": ECHO}, test_timeout=0.3) == 0


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        (1, 1.0, True),
        (0.1 + 0.2, 0.3, True),
        (1, True, False),
        ([1, [2.0]], [1, [2]], True),
        ([1], [1, 2], False),
        ({"a": 1}, {"a": 1}, True),
        ({"a": 1}, {"b": 1}, False),
        ("1", 1, False),
        (None, None, True),
    ],
)
def test_values_are_compared_as_json_is(found: Any, expected: Any, same: bool) -> None:
    assert equal(found, expected) is same


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({}, "has no column 'tests'"),
        ({"tests": []}, "has no column 'tests'"),
        ({"tests": "assert True"}, "has no column 'tests'"),
        ({"tests": [{"input": "1"}]}, "has a test 0 that is neither"),
        ({"tests": [{"input": 1, "output": "1"}]}, "has a test 0 that is neither"),
        ({"tests": ADD}, "no column 'entry_point'"),
        ({"tests": [{"arguments": 1, "expected": 1}], "entry_point": "f"}, "whose arguments are no list"),
    ],
)
def test_prompts_that_cannot_be_scored_are_found(columns: dict[str, Any], problem: str) -> None:
    prompt = Prompt("p", (1,), "?", None, columns)
    assert problem in unreadable([prompt], CodeReward())[0]
    with pytest.raises(RewardError, match=problem):
        value("print()", columns)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"score": "some"}, "score must be one of all, share"),
        ({"test_timeout": 0}, "test_timeout must be > 0"),
        ({"extract": "x"}, "has no group"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        CodeReward(**settings)
