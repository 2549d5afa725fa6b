"""A step without a token to train on leaves the weights where they are, under every strategy."""

from __future__ import annotations

import pytest

from dppo_lightning.base.records import Sequence
from tests.helpers.rank_pool import RankPool
from tests.helpers.training import STRATEGIES, largest_difference, train


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_momentum_and_decay_move_nothing(
    strategy: str, accumulate: int, two_ranks: RankPool, tiny_policy_dir: str, steps: list[list[Sequence]]
) -> None:
    run, _ = two_ranks.run(train, tiny_policy_dir, [steps[0], []], strategy, "adamw", accumulate, max_steps=2)
    assert run.of("train/tokens").tolist() == [sum(sequence.tokens for sequence in steps[0]), 0]
    assert largest_difference(run.first, run.last) == 0
    moved, _ = two_ranks.run(train, tiny_policy_dir, [steps[0], steps[1]], strategy, "adamw", accumulate, max_steps=2)
    assert largest_difference(moved.first, moved.last) > 1e-4
