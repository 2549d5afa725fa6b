"""The same parameters after a step and after six, whatever the ranks, the strategy and the split into micro-batches."""

from __future__ import annotations

import pytest
import torch

from dppo_lightning.base.records import Sequence
from tests.helpers.rank_pool import RankPool
from tests.helpers.training import STRATEGIES, Trained, largest_difference, train

TOLERANCE = {"sgd": 1e-6, "adamw": 1e-4}
METRICS = ("train/loss", "train/grad_norm", "train/tokens", "train/masked_share", "train/ratio_max", "train/entropy")

Steps = list[list[Sequence]]


@pytest.fixture(scope="module")
def expected(tiny_policy_dir: str, steps: Steps) -> dict[str, Trained]:
    """One process's training with one micro-batch a step, by optimizer."""
    return {optimizer: train(tiny_policy_dir, steps, "one", optimizer) for optimizer in TOLERANCE}


def assert_same(run: Trained, wanted: Trained, optimizer: str) -> None:
    assert largest_difference(run.first, wanted.first) < TOLERANCE[optimizer]
    assert largest_difference(run.last, wanted.last) < TOLERANCE[optimizer]
    for name in METRICS:
        torch.testing.assert_close(run.of(name), wanted.of(name), rtol=1e-3, atol=1e-5, msg=name)


def test_the_steps_move_the_weights(expected: dict[str, Trained]) -> None:
    """Or else the other tests compare nothing."""
    for optimizer, run in expected.items():
        assert largest_difference(run.first, run.last) > 20 * TOLERANCE[optimizer]
        assert run.of("train/masked_share").max() > 0


@pytest.mark.parametrize("optimizer", TOLERANCE)
@pytest.mark.parametrize("accumulate", [2, 3])
def test_one_process_with_several_micro_batches(
    accumulate: int, optimizer: str, expected: dict[str, Trained], tiny_policy_dir: str, steps: Steps
) -> None:
    assert_same(train(tiny_policy_dir, steps, "one", optimizer, accumulate), expected[optimizer], optimizer)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("optimizer", TOLERANCE)
@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_two_ranks(
    strategy: str,
    optimizer: str,
    accumulate: int,
    expected: dict[str, Trained],
    two_ranks: RankPool,
    tiny_policy_dir: str,
    steps: Steps,
) -> None:
    run, other = two_ranks.run(train, tiny_policy_dir, steps, strategy, optimizer, accumulate)
    assert_same(run, expected[optimizer], optimizer)
    torch.testing.assert_close(other.of("train/loss"), run.of("train/loss"))


CLIP = 5.0
"""Limit of the gradient's norm, below that of every step."""


@pytest.fixture(scope="module")
def clipped(tiny_untied_dir: str, steps: Steps) -> Trained:
    """One process's training, with an output projection of its own, that only the head uses."""
    return train(tiny_untied_dir, steps, "one", clip=CLIP)


@pytest.fixture(scope="module")
def free(tiny_untied_dir: str, steps: Steps) -> Trained:
    """The same training without clipping."""
    return train(tiny_untied_dir, steps, "one")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradient_clipping(
    strategy: str, clipped: Trained, free: Trained, two_ranks: RankPool, tiny_untied_dir: str, steps: Steps
) -> None:
    assert clipped.of("train/grad_norm").min() > CLIP
    run, _ = two_ranks.run(train, tiny_untied_dir, steps, strategy, clip=CLIP, accumulate=2)
    assert_same(run, clipped, "sgd")
    assert largest_difference(free.first, clipped.first) > 1e-5


@pytest.fixture(scope="module")
def held_back(tiny_policy_dir: str, steps: Steps) -> Trained:
    """One process's training with KL to a reference."""
    return train(tiny_policy_dir, steps, "one", beta=0.1, probe=scored)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_kl_to_a_reference(
    strategy: str, held_back: Trained, two_ranks: RankPool, tiny_policy_dir: str, steps: Steps
) -> None:
    """The reference scores the same sequences as in one process, although it may be in shards; so does the policy."""
    runs = two_ranks.run(train, tiny_policy_dir, steps, strategy, beta=0.1, probe=scored)
    assert_same(runs[0], held_back, "sgd")
    for run in runs:
        for mine, theirs in zip(run.found, held_back.found, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def scored(module: object) -> list[torch.Tensor]:
    """Log-probs of a recorded step under the reference and under the trained policy; the projection of rollout time."""
    sequences = module.data.steps[0]  # type: ignore[attr-defined]
    policy, scorer = module.policy, module.scorer  # type: ignore[attr-defined]
    scores = (scorer.reference_share([sequences]), scorer.policy_share([sequences]))
    found = [torch.cat(list(map(torch.from_numpy, score))) for score in scores]
    policy.head.remember_rollout()
    return [*found, policy.head.rollout_weight]
