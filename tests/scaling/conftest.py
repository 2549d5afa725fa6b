"""Two ranks that all tests of this folder share, and the sequences that they train on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from scaling.pool import RankPool


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.stop()
