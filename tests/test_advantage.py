"""Advantage estimators against their formulas."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dppo_lightning.advantage as package
from dppo_lightning.advantage import NO_SIGNAL, AdvantageEstimator, GroupBaseline, GroupMean, GroupMeanStd, LeaveOneOut
from dppo_lightning.base.errors import ConfigError
from dppo_lightning.base.records import Group, Prompt

ESTIMATORS = [GroupMean(), GroupMeanStd(), LeaveOneOut()]
REWARDS = [np.array([0.0, 1.0, 1.0, 0.0]), np.array([3.0, 0.0])]


def test_group_mean_subtracts_the_mean_and_divides_by_nothing() -> None:
    assert GroupMean().estimate(REWARDS)[0].tolist() == [-0.5, 0.5, 0.5, -0.5]
    assert GroupMean().estimate(REWARDS)[1].tolist() == [1.5, -1.5]


def test_group_mean_std_divides_by_the_sample_deviation() -> None:
    assert GroupMeanStd().estimate(REWARDS)[1] == pytest.approx([1.5 / np.sqrt(4.5), -1.5 / np.sqrt(4.5)])


def test_leave_one_out_subtracts_the_mean_of_the_others() -> None:
    rewards = np.array([1.0, 2.0, 6.0])
    assert LeaveOneOut().estimate([rewards])[0] == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5])


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
@given(rewards=st.lists(st.floats(-100, 100), min_size=2, max_size=16))
def test_advantages_of_a_group_sum_to_zero_and_keep_the_order(
    estimator: AdvantageEstimator, rewards: list[float]
) -> None:
    (advantages,) = estimator.estimate([np.array(rewards)])
    assert np.isfinite(advantages).all()
    assert advantages.sum() == pytest.approx(0, abs=1e-6)
    best = advantages[np.argmax(rewards)]
    assert best >= advantages.max() - 1e-9


def test_every_estimator_is_in_the_list() -> None:
    found = {value for value in vars(package).values() if isinstance(value, type)}
    bases = {AdvantageEstimator, GroupBaseline}
    assert {cls for cls in found if issubclass(cls, AdvantageEstimator)} - bases == {type(e) for e in ESTIMATORS}


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
@given(reward=st.floats(-1e6, 1e6) | st.just(0.1), count=st.integers(1, 64), data=st.data())
def test_a_group_of_equal_rewards_teaches_exactly_nothing(
    estimator: AdvantageEstimator, reward: float, count: int, data: st.DataObject
) -> None:
    """Equal as the stream has it: such a group is counted, filtered or generated anew as one without signal."""
    beside = np.array(data.draw(st.lists(st.floats(0, 0.4 * NO_SIGNAL), min_size=count, max_size=count)))
    for rewards in (np.full(count, reward), reward + beside):
        assert not estimator.estimate([rewards])[0].any() or np.ptp(rewards) >= NO_SIGNAL


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
@given(low=st.floats(-1e3, 1e3), step=st.floats(0.01, 1e3), each=st.integers(1, 7))
def test_a_reward_that_is_the_mean_of_its_group_has_exactly_no_advantage(
    estimator: AdvantageEstimator, low: float, step: float, each: int
) -> None:
    rewards = np.array([low] * each + [low + step] + [low + 2 * step] * each)
    advantages = estimator.estimate([rewards])[0]
    assert advantages[each] == 0
    assert np.array_equal(np.sign(advantages), [-1] * each + [0] + [1] * each)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
def test_the_smallest_difference_that_counts_has_a_sign(estimator: AdvantageEstimator) -> None:
    (advantages,) = estimator.estimate([np.array([0.0, 4 * NO_SIGNAL, 0.0, 4 * NO_SIGNAL])])
    assert np.sign(advantages).tolist() == [-1, 1, -1, 1]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
def test_one_sample_is_no_group(estimator: AdvantageEstimator) -> None:
    estimator.check(2)
    with pytest.raises(ConfigError, match=r"samples_per_prompt to at least 2, got 1"):
        estimator.check(1)


class Broken(AdvantageEstimator):
    """Returns what it is given."""

    def __init__(self, advantages: list[np.ndarray]) -> None:
        self.advantages = advantages

    def estimate(self, rewards: Sequence[np.ndarray]) -> list[np.ndarray]:
        return self.advantages


@pytest.mark.parametrize(
    ("advantages", "pattern"),
    [
        ([], r"Broken returned advantages of shapes \[\] for rewards of \[\(2,\)\]"),
        ([np.zeros(3)], r"shapes \[\(3,\)\] for rewards of \[\(2,\)\]"),
        ([1.0], r"shapes \[\(\)\]"),
        ([np.array([0.0, np.nan])], r"Broken returned an advantage that is not finite"),
    ],
)
def test_an_estimator_that_returns_something_else_is_named(advantages: list[np.ndarray], pattern: str) -> None:
    group = Group(Prompt("train/0", (1,), "a"), [], [])
    with pytest.raises(ConfigError, match=pattern):
        Broken(advantages).per_token([group], [np.zeros(2)])
