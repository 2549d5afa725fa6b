"""The same parameters after a step and after six, whatever the ranks, the strategy and the split into micro-batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dppo_lightning.batch import Sequence
from scaling.pool import RankPool
from scaling.training import record, train

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
TOLERANCE = {"sgd": 1e-6, "adamw": 1e-4}


@pytest.fixture(scope="module")
def steps(tiny_policy_dir: str) -> list[list[Sequence]]:
    return record(tiny_policy_dir)


Expected = dict[tuple[str, int], tuple[dict[str, Tensor], list[dict[str, float]]]]


@pytest.fixture(scope="module")
def expected(tiny_policy_dir: str, steps: list[list[Sequence]]) -> Expected:
    """Of one process and one micro-batch: by optimizer and number of steps."""
    return {
        (optimizer, many): train(tiny_policy_dir, steps, "one", optimizer, max_steps=many)[:2]
        for optimizer in TOLERANCE
        for many in (1, 6)
    }


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_the_steps_move_the_weights(expected: Expected, tiny_policy_dir: str) -> None:
    """Or else the other tests compare nothing."""
    for optimizer in TOLERANCE:
        moved = largest_difference(expected[optimizer, 1][0], expected[optimizer, 6][0])
        assert moved > 20 * TOLERANCE[optimizer]
        assert any(row["train/masked_share"] > 0 for row in expected[optimizer, 6][1] if "train/masked_share" in row)


@pytest.mark.parametrize("accumulate", [2, 3])
def test_one_process_with_several_micro_batches(
    accumulate: int, expected: Expected, tiny_policy_dir: str, steps: list[list[Sequence]]
) -> None:
    for optimizer, tolerance in TOLERANCE.items():
        weights, *_ = train(tiny_policy_dir, steps, "one", optimizer, accumulate)
        assert largest_difference(weights, expected[optimizer, 6][0]) < tolerance


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("optimizer", TOLERANCE)
@pytest.mark.parametrize(("accumulate", "many"), [(1, 1), (1, 6), (2, 6), (3, 6)])
def test_two_ranks(
    strategy: str,
    optimizer: str,
    accumulate: int,
    many: int,
    expected: Expected,
    two_ranks: RankPool,
    tiny_policy_dir: str,
    steps: list[list[Sequence]],
) -> None:
    first, _ = two_ranks.run(train, tiny_policy_dir, steps, strategy, optimizer, accumulate, many)
    weights, rows, _ = first
    wanted, wanted_rows = expected[optimizer, many]
    assert largest_difference(weights, wanted) < TOLERANCE[optimizer]
    names = ("train/loss", "train/grad_norm", "train/tokens", "train/masked_share", "train/ratio_max", "train/entropy")
    for name in names:
        mine = torch.tensor([row[name] for row in rows if name in row])
        torch.testing.assert_close(
            mine, torch.tensor([row[name] for row in wanted_rows if name in row]), rtol=1e-3, atol=1e-5, msg=name
        )
