"""Advantage estimators against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dppo_lightning.advantage import AdvantageEstimator, GroupMean, GroupMeanStd, LeaveOneOut
from dppo_lightning.errors import ConfigError

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


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
def test_a_group_of_equal_rewards_teaches_nothing(estimator: AdvantageEstimator) -> None:
    assert not estimator.estimate([np.ones(4)])[0].any()


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
def test_one_sample_is_no_group(estimator: AdvantageEstimator) -> None:
    estimator.check(2)
    with pytest.raises(ConfigError, match=r"samples_per_prompt to at least 2, got 1"):
        estimator.check(1)
