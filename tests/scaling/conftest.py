"""Two ranks that all tests of this folder share, and the sequences that they train on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dppo_lightning.base.records import Sequence
from tests.helpers.rank_pool import RankPool
from tests.helpers.training import record


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def one_rank() -> Iterator[RankPool]:
    pool = RankPool(1)
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def steps(tiny_policy_dir: str) -> list[list[Sequence]]:
    return record(tiny_policy_dir)
