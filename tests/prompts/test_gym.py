"""ReasoningGymPrompts, against the library itself."""

from __future__ import annotations

import json
import random
import sys
from typing import Any

import numpy as np
import pytest
import reasoning_gym
from hypothesis import given, settings
from hypothesis import strategies as st

from dppo_lightning.base.errors import ConfigError, DataError
from dppo_lightning.prompts import ReasoningGymPrompts

SMALL = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def entries(examples: Any) -> list[dict[str, Any]]:
    return [example.columns["entry"] for example in examples]


@pytest.mark.parametrize("task", ["chain_sum", "spell_backward", "arc_1d", "rearc", "list_functions", "pool_matrix"])
def test_the_tasks_own_scorer_gives_full_marks_to_the_answer(task: str) -> None:
    sets = ReasoningGymPrompts(task, train=3, heldout=3).load()
    score = reasoning_gym.get_score_answer_fn(task)
    for example in (*sets.train, *sets.heldout):
        entry = example.columns["entry"]
        assert example.columns["task"] == entry["metadata"]["source_dataset"] == task
        assert (example.prompt, example.answer) == (entry["question"], entry["answer"])
        assert score(example.answer, entry) == 1.0
        json.dumps(entry)


def test_parameters_reach_the_task() -> None:
    sets = ReasoningGymPrompts("chain_sum", train=30, heldout=5, parameters=SMALL).load()
    assert {entry["metadata"]["num_terms"] for entry in entries(sets.train)} == {2}


@settings(max_examples=25, deadline=None)
@given(train=st.integers(50, 200), heldout=st.integers(0, 60), seed=st.integers(0, 2**40))
def test_held_out_questions_differ_are_not_trained_on_and_do_not_depend_on_train(
    train: int, heldout: int, seed: int
) -> None:
    sets = ReasoningGymPrompts("chain_sum", 1000, heldout, seed, SMALL).load()
    held = [example.prompt for example in sets.heldout]
    assert len(held) == len(set(held)) == heldout
    assert not {example.prompt for example in sets.train} & set(held)
    assert len(sets.train) <= 1000
    fewer = ReasoningGymPrompts("chain_sum", train, heldout, seed, SMALL).load()
    assert fewer.heldout == sets.heldout
    assert entries(fewer.train) == entries(sets.train)[: len(fewer.train)]


@pytest.mark.parametrize("task", ["chain_sum", "list_functions", "pool_matrix", "acre"])
def test_questions_depend_on_the_seed_alone_and_leave_the_global_generators_alone(task: str) -> None:
    random.seed(1)
    np.random.seed(1)
    first = ReasoningGymPrompts(task, train=80, heldout=4).load()
    after = random.random(), np.random.random()
    random.seed(2)
    second = ReasoningGymPrompts(task, train=80, heldout=4).load()
    random.seed(1)
    np.random.seed(1)
    assert after == (random.random(), np.random.random())
    assert first == second


def test_neighbouring_seeds_share_almost_nothing() -> None:
    questions = [
        {example.prompt for example in ReasoningGymPrompts("spell_backward", 200, 0, seed).load().train}
        for seed in (0, 1)
    ]
    assert len(questions[0] & questions[1]) < 20


def test_chat_template_and_lower_case() -> None:
    source = ReasoningGymPrompts(
        "spell_backward", 20, 5, template="{question} Answer:", chat=True, system="Be brief.", lowercase=True
    )
    for example in source.load().train:
        assert example.messages is not None
        system, user = example.messages
        entry = example.columns["entry"]
        assert system == {"role": "system", "content": "Be brief."}
        assert user == {"role": "user", "content": f"{entry['question']} Answer:"}
        assert entry["question"] == entry["question"].lower()
        assert example.answer == entry["answer"] == entry["metadata"]["word"][::-1].lower()


def test_a_task_without_a_reference_answer_has_none() -> None:
    (example,) = ReasoningGymPrompts("graph_color", 1, 0).load().train
    assert example.answer is None
    assert example.columns["entry"]["answer"] is None


@pytest.mark.parametrize(
    ("task", "parameters", "problem"),
    [
        ("chain_sm", {}, "no task 'chain_sm': did you mean chain_sum"),
        ("zzzz", {}, "no task 'zzzz': there are ab, acre"),
        ("composite", {}, "name one of the tasks"),
        ("chain_sum", {"terms": 3}, "no parameter 'terms': it has min_terms, max_terms"),
        ("chain_sum", {"size": 3}, "must not hold 'size'"),
        ("chain_sum", {"min_terms": 0}, "refuses its parameters: min_terms must be positive"),
        ("chain_sum", {"min_terms": "two"}, "refuses its parameters: "),
    ],
)
def test_a_wrong_task_or_parameter_is_named_in_one_line(task: str, parameters: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        ReasoningGymPrompts(task, 1, 1, parameters=parameters).load()
    assert "\n" not in str(caught.value)


def test_a_task_with_too_few_questions_says_how_many_it_gave() -> None:
    with pytest.raises(DataError, match=r"gave 4 different questions in 300 draws, fewer than heldout=10"):
        ReasoningGymPrompts("coin_flip", 10, 10, parameters={"min_trials": 1, "max_trials": 1}).load()


def test_a_task_whose_questions_are_all_held_out_has_nothing_to_train_on() -> None:
    with pytest.raises(DataError, match="all 10 training questions are held out"):
        ReasoningGymPrompts("coin_flip", 10, 4, parameters={"min_trials": 1, "max_trials": 1}).load()


def test_a_generator_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __getitem__(self, place: int) -> dict[str, Any]:
            raise RuntimeError("no puzzle found\nafter 100 tries")

    monkeypatch.setattr(reasoning_gym, "create_dataset", lambda *args, **kwargs: Broken())
    with pytest.raises(DataError, match=r"'chain_sum' cannot make question 0: no puzzle found$"):
        ReasoningGymPrompts("chain_sum", 1, 0).load()


@pytest.mark.parametrize("wrong", [{"train": 0}, {"heldout": -1}, {"seed": -1}, {"system": "a"}, {"template": "a"}])
def test_settings_that_do_not_fit_fail_when_the_source_is_built(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ReasoningGymPrompts("chain_sum", **wrong)


def test_without_reasoning_gym_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(ConfigError, match=r"reasoning_gym is not installed: pip install 'dppo-lightning\[reasoning\]'"):
        ReasoningGymPrompts("chain_sum").load()
