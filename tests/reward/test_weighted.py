import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from dppo_lightning.base.errors import ConfigError, RewardError
from dppo_lightning.reward import ExactMatch, RegexMatch, RewardFunction, Sample, Score, WeightedSum
from tests.helpers.rewards import Scored


def parted(value: float) -> Scored:
    """Give every completion the same score, with a part."""
    return Scored(lambda sample: Score(value, {"half": value / 2}))


NUMBER = st.floats(-1e6, 1e6)


@given(st.lists(st.tuples(NUMBER, NUMBER), min_size=1, max_size=5))
def test_the_sum_is_weighted_and_each_member_is_a_part(members: list[tuple[float, float]]):
    names = [f"member{index}" for index in range(len(members))]
    reward = WeightedSum([parted(value) for value, _ in members], [weight for _, weight in members], names)
    score = reward([Sample("", "")])[0]
    assert score.value == pytest.approx(math.fsum(value * weight for value, weight in members), rel=1e-9, abs=1e-3)
    assert [score.parts[name] for name in names] == [value for value, _ in members]
    assert [score.parts[f"{name}/half"] for name in names] == [value / 2 for value, _ in members]


def test_members_are_named_for_their_classes_by_default():
    reward = WeightedSum([ExactMatch(), RegexMatch("7")], [1, -0.25])
    assert reward([Sample("", "77", "7")]) == [Score(-0.25, {"ExactMatch": 0, "RegexMatch": 1})]


def test_sums_can_be_nested():
    inner = WeightedSum([ExactMatch()], [2], ["exact"])
    outer = WeightedSum([inner], [3], ["inner"])
    assert outer([Sample("", "7", "7")]) == [Score(6, {"inner": 2, "inner/exact": 1})]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rewards": [], "weights": []}, "rewards is empty"),
        ({"weights": [1]}, "weights has 1 entries for 2 rewards"),
        ({"names": ["a"]}, "names has 1 entries for 2 rewards"),
        ({"weights": [1, math.nan]}, "weights must be finite, got nan for RegexMatch"),
        ({"weights": [math.inf, 1]}, "weights must be finite, got inf for ExactMatch"),
        ({"names": ["a", "a"]}, "two rewards are named 'a'"),
        ({"rewards": [ExactMatch(), ExactMatch()]}, "two rewards are named 'ExactMatch': give different names"),
        ({"names": ["a", ""]}, "names must not be empty"),
        ({"names": ["a", "a/b"]}, "got 'a/b'"),
    ],
)
def test_what_does_not_fit_together_is_refused(arguments: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        WeightedSum(**{"rewards": [ExactMatch(), RegexMatch("7")], "weights": [1, 1]} | arguments)


def test_a_members_bad_number_names_the_member():
    with pytest.raises(RewardError, match="Scored returned reward = inf"):
        WeightedSum([parted(math.inf)], [0])([Sample("", "")])


def test_a_configuration_file_can_name_it():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(RewardFunction, "reward")
    config = parser.parse_object(
        {
            "reward": {
                "class_path": "dppo_lightning.reward.WeightedSum",
                "init_args": {
                    "rewards": [
                        {"class_path": "dppo_lightning.reward.ExactMatch", "init_args": {"ignore_case": True}},
                        {"class_path": "dppo_lightning.reward.RegexMatch", "init_args": {"pattern": "^<think>"}},
                        {
                            "class_path": "dppo_lightning.reward.PythonReward",
                            "init_args": {"function": "tests.reward.cases.length", "arguments": {"scale": 0.5}},
                        },
                        {"class_path": "dppo_lightning.reward.ReasoningGymReward", "init_args": {"score": "lenient"}},
                    ],
                    "weights": [1, 0.1, 0, 0],
                    "names": ["answer", "format", "length", "gym"],
                },
            }
        }
    )
    reward = parser.instantiate_classes(config).reward
    assert isinstance(reward, WeightedSum)
    assert [type(member).__name__ for member in reward.rewards] == [
        "ExactMatch",
        "RegexMatch",
        "PythonReward",
        "ReasoningGymReward",
    ]
    assert reward.weights == [1, 0.1, 0, 0]
