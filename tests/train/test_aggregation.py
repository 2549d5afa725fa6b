"""Aggregation weights against sums written out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.train.objective import sequence_weights

LOSSES = [[1.0, 2.0, 4.0], [], [8.0]]
COUNTS = np.array([3, 0, 1])


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token-mean", (1 + 2 + 4 + 8) / 4),
        ("seq-mean-token-sum", ((1 + 2 + 4) + 8) / 2),
        ("seq-mean-token-mean", ((1 + 2 + 4) / 3 + 8) / 2),
        ("seq-sum-constant", ((1 + 2 + 4) / 10 + 8 / 10) / 2),
    ],
)
def test_the_weighted_sum_is_the_published_mean(aggregation: str, expected: float) -> None:
    weights = sequence_weights(aggregation, COUNTS, constant_length=10)
    total = sum(weight * sum(losses) for weight, losses in zip(weights, LOSSES, strict=True))
    assert total == pytest.approx(expected)


@given(counts=st.lists(st.integers(0, 50), max_size=20))
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-sum-constant"])
def test_weights_are_finite_and_zero_for_empty_sequences(aggregation: str, counts: list[int]) -> None:
    weights = sequence_weights(aggregation, np.array(counts, int), constant_length=7)
    assert np.isfinite(weights).all()
    assert not weights[np.array(counts, int) == 0].any()


def test_a_constant_length_is_required_where_it_divides() -> None:
    with pytest.raises(ConfigError, match="constant_length"):
        sequence_weights("seq-sum-constant", COUNTS)
