"""A run that was saved and resumed goes on as if nothing had happened, on as many ranks or on another number."""

from __future__ import annotations

from pathlib import Path

import pytest

from dppo_lightning.base.errors import DataError
from dppo_lightning.base.records import Sequence
from dppo_lightning.scaling.resume import is_universal, ranks_of, reshape
from tests.helpers.rank_pool import RankPool
from tests.helpers.training import STRATEGIES, largest_difference, refused_training, train

Steps = list[list[Sequence]]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resume_on_the_same_ranks_is_bit_equal(
    strategy: str, two_ranks: RankPool, tiny_policy_dir: str, steps: Steps, tmp_path: Path
) -> None:
    through, _ = two_ranks.run(train, tiny_policy_dir, steps, strategy, "adamw", 2)
    half = tmp_path / "half.ckpt"
    stopped, _ = two_ranks.run(train, tiny_policy_dir, steps, strategy, "adamw", 2, max_steps=3, save=half)
    resumed, _ = two_ranks.run(train, tiny_policy_dir, steps, strategy, "adamw", 2, resume=half)
    assert largest_difference(stopped.last, through.last) > 1e-4
    assert largest_difference(resumed.last, through.last) == 0
    assert resumed.of("train/loss").tolist() == through.of("train/loss").tolist()[3:]


def test_resume_with_another_number_of_micro_batches(tiny_policy_dir: str, steps: Steps, tmp_path: Path) -> None:
    """Three micro-batches are half a step of the run that goes on."""
    through = train(tiny_policy_dir, steps, "one", "adamw")
    train(tiny_policy_dir, steps, "one", "adamw", 1, max_steps=3, save=tmp_path / "half.ckpt")
    resumed = train(tiny_policy_dir, steps, "one", "adamw", 2, resume=tmp_path / "half.ckpt")
    assert largest_difference(resumed.last, through.last) < 1e-6


@pytest.mark.parametrize("strategy", [pytest.param("zero2", marks=pytest.mark.slow), "zero3"])
def test_resume_on_one_rank_from_two(
    strategy: str, two_ranks: RankPool, one_rank: RankPool, tiny_policy_dir: str, steps: Steps, tmp_path: Path
) -> None:
    through, _ = two_ranks.run(train, tiny_policy_dir, steps, strategy, "adamw", 1)
    half = tmp_path / "half.ckpt"
    two_ranks.run(train, tiny_policy_dir, steps, strategy, "adamw", 1, max_steps=3, save=half)
    assert ranks_of(half) == 2
    (refused,) = one_rank.run(refused_training, tiny_policy_dir, steps, strategy, "adamw", 2, resume=half)
    assert "was written by 2 ranks and this run has 1" in refused
    whole = reshape(half, tmp_path / "whole.ckpt")
    assert is_universal(whole)
    assert not is_universal(half)
    (resumed,) = one_rank.run(train, tiny_policy_dir, steps, strategy, "adamw", 2, resume=whole)
    assert largest_difference(resumed.last, through.last) < 1e-6


def test_reshape_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no checkpoint of a ZeRO run"):
        reshape(tmp_path / "none.ckpt", tmp_path / "out.ckpt")
    folder = tmp_path / "some.ckpt" / "checkpoint"
    folder.mkdir(parents=True)
    (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"no checkpoint")
    with pytest.raises(DataError, match="exists already"):
        reshape(tmp_path / "some.ckpt", tmp_path)
    with pytest.raises(DataError, match="could not convert"):
        reshape(tmp_path / "some.ckpt", tmp_path / "out.ckpt")
