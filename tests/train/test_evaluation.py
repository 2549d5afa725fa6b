"""avg@k and pass@k against numbers made by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dppo_lightning.train.metrics import check_names, heldout_metrics
from tests.helpers.records import make_group


def test_three_prompts_by_hand() -> None:
    groups = [
        make_group([1, 0, 0, 1], [2, 4, 6, 8]),  # two of four
        make_group([0, 0.5, 0, 0.5], [1, 1, 1, 1]),  # half right is not solved
        make_group([1, 1, 1, 1], [3, 3, 3, 3]),
    ]
    assert heldout_metrics(groups, solved_at=1.0) == {
        "heldout/reward": pytest.approx((0.5 + 0.25 + 1) / 3),
        "heldout/avg_at_k": pytest.approx((0.5 + 0 + 1) / 3),
        "heldout/pass_at_k": pytest.approx(2 / 3),
        "heldout/length": pytest.approx((20 + 4 + 12) / 12),
        "heldout/not_scored": 0,
    }


def test_solved_at_is_inclusive() -> None:
    values = heldout_metrics([make_group([0.5, 0.499])], solved_at=0.5)
    assert values["heldout/avg_at_k"] == 0.5
    assert values["heldout/pass_at_k"] == 1


def test_every_prompt_counts_the_same_even_when_some_of_its_requests_failed() -> None:
    values = heldout_metrics([make_group([1, 1, 1]), make_group([0])], solved_at=1.0)
    assert values["heldout/reward"] == values["heldout/avg_at_k"] == values["heldout/pass_at_k"] == 0.5


def test_parts_are_means_over_the_completions_that_report_them() -> None:
    groups = [
        make_group([1, 0], correct=[1, 0], format=[0.25, np.nan]),
        make_group([0, 0], correct=[0, 0]),
    ]
    values = heldout_metrics(groups, solved_at=1.0)
    assert values["heldout/part/correct"] == 0.25
    assert values["heldout/part/format"] == 0.25
    check_names(values)


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=6))
def test_pass_at_k_is_at_least_avg_at_k_and_equal_to_it_for_one_sample(solved: list[list[bool]]) -> None:
    values = heldout_metrics([make_group([float(one) for one in mine]) for mine in solved], solved_at=1.0)
    assert values["heldout/avg_at_k"] == pytest.approx(sum(sum(mine) / len(mine) for mine in solved) / len(solved))
    assert values["heldout/pass_at_k"] == pytest.approx(sum(any(mine) for mine in solved) / len(solved))
    assert values["heldout/pass_at_k"] >= values["heldout/avg_at_k"] - 1e-12
    first = heldout_metrics([make_group([float(mine[0])]) for mine in solved], solved_at=1.0)
    assert first["heldout/pass_at_k"] == first["heldout/avg_at_k"]
