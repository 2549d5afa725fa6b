import dataclasses
import sys

import pytest
import reasoning_gym

from dppo_lightning.base.errors import ConfigError, RewardError
from dppo_lightning.reward import MathReward, ReasoningGymReward, RewardFunction, Sample, Score
from tests.reward.cases import gym_entry, gym_sample

ANSWER = gym_entry()["answer"]
TAG = "<answer>(.*?)</answer>"


def score(reward: RewardFunction, sample: Sample) -> Score:
    return reward([sample])[0]


@pytest.mark.parametrize("task", ["chain_sum", "countdown", "spell_backward", "sudoku", "knights_knaves"])
@pytest.mark.parametrize("measure", ["gym", "solved", "strict", "lenient"])
def test_the_tasks_own_answer_is_worth_1(task: str, measure: str):
    assert score(ReasoningGymReward(score=measure), gym_sample(gym_entry(task)["answer"], task)).value == 1


@pytest.mark.parametrize(
    ("completion", "strict", "lenient"),
    [(f" {ANSWER}\n", 1, 1), (f"The answer is {ANSWER}.", 0, 1), (f"{ANSWER} or 12345", 0, 0), ("", 0, 0)],
)
def test_knowing_the_answer_and_keeping_to_the_format_are_told_apart(completion: str, strict: float, lenient: float):
    sample = gym_sample(completion)
    scorer = reasoning_gym.get_score_answer_fn("chain_sum")
    expected = {"strict": strict, "lenient": lenient}
    assert score(ReasoningGymReward(), sample) == Score(scorer(completion.strip(), sample.columns["entry"]), expected)
    for measure in ("strict", "lenient"):
        assert score(ReasoningGymReward(score=measure), sample) == Score(expected[measure], expected)


def test_partial_credit_is_kept_unless_only_solutions_count():
    sample = gym_sample("1 + 1", "countdown")
    assert 0 < score(ReasoningGymReward(), sample).value < 0.1
    assert score(ReasoningGymReward(score="solved"), sample).value == 0


def test_another_solution_than_the_reference_is_solved_and_not_strict():
    entry = {"question": "?", "answer": "4*5 - 6", "metadata": {"numbers": [4, 5, 6], "target": 14}}
    result = score(ReasoningGymReward(), Sample("?", "5*4 - 6", "4*5 - 6", {"task": "countdown", "entry": entry}))
    assert result == Score(1, {"strict": 0, "lenient": 0})


@pytest.mark.parametrize(
    ("completion", "value", "strict", "lenient"),
    [
        (f"I think <answer> {ANSWER} </answer> is right", 1, 1, 1),
        (f"<answer>{ANSWER}1</answer> no: <answer>{ANSWER}</answer>", 1, 1, 1),
        (f"<answer>{ANSWER}</answer> 12345", 1, 1, 1),
        (f"<answer>{ANSWER}</answer> no: <answer>none</answer>", 0, 0, 1),
        (ANSWER, 0, 0, 1),
        ("", 0, 0, 0),
    ],
)
def test_the_last_extracted_answer_counts(completion: str, value: float, strict: float, lenient: float):
    result = score(ReasoningGymReward(extract=TAG), gym_sample(completion))
    assert result == Score(value, {"strict": strict, "lenient": lenient})


def test_no_extracted_answer_gets_no_partial_credit():
    assert score(ReasoningGymReward(extract=TAG), gym_sample("1 + 1", "countdown")).value == 0


def test_a_scorer_that_raises_on_the_completion_gives_0():
    sample = gym_sample("nonsense", "prime_factorization")
    with pytest.raises(ValueError, match="nonsense"):
        reasoning_gym.get_score_answer_fn("prime_factorization")("nonsense", sample.columns["entry"])
    assert score(ReasoningGymReward(), sample).value == 0


def test_a_scorer_that_raises_on_its_own_answer_is_an_error():
    sample = gym_sample("7", "chain_sum")
    broken = dataclasses.replace(sample, columns={"task": "chain_sum", "entry": {"question": "?"}})
    with pytest.raises(RewardError, match="task 'chain_sum' cannot score even its own answer"):
        score(ReasoningGymReward(), broken)


def test_a_puzzle_without_reference_answer_has_no_parts():
    sample = gym_sample("nonsense", "graph_color")
    assert sample.answer is None
    assert score(ReasoningGymReward(), sample).parts == {}
    with pytest.raises(RewardError, match="needs a reference answer"):
        score(ReasoningGymReward(score="strict"), sample)


@pytest.mark.parametrize("columns", [{}, {"task": "chain_sum"}, {"task": "chain_sum", "entry": "text"}])
def test_missing_columns_are_an_error(columns: dict):
    with pytest.raises(RewardError, match="take the prompts from ReasoningGymPrompts"):
        score(ReasoningGymReward(), Sample("?", "7", "7", columns))


@pytest.mark.parametrize("task", ["no_such_task", "composite"])
def test_a_task_without_scorer_is_an_error(task: str):
    with pytest.raises(RewardError, match=f"no scorer for task '{task}'"):
        score(ReasoningGymReward(), Sample("?", "7", "7", {"task": task, "entry": {}}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"extract": "("}, "extract '\\(' is not a regular expression"),
        ({"extract": "answer"}, "has no group"),
        ({"score": "exact"}, "score must be one of gym, solved, strict, lenient, got 'exact'"),
    ],
)
def test_wrong_settings_fail_at_construction(arguments: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        ReasoningGymReward(**arguments)


@pytest.mark.parametrize(("library", "reward"), [("reasoning_gym", ReasoningGymReward), ("math_verify", MathReward)])
def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, library: str, reward: type[RewardFunction]):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=rf"^{library} is not installed: pip install 'dppo-lightning\[reasoning\]'$"):
        reward()
