"""One controller: what it hands out arrives, an error anywhere is an error everywhere, and the dead are noticed."""

from __future__ import annotations

import pytest

from dppo_lightning.base.errors import ConfigError, RankError
from dppo_lightning.scaling.ranks import Ranks
from tests.helpers.processes import PATIENCE
from tests.helpers.rank_pool import RankPool
from tests.scaling.rank_jobs import exchange, mistake, slow_but_alive, suspended, wait_for


def test_a_single_process_needs_no_group() -> None:
    with Ranks() as ranks:
        assert (ranks.rank, ranks.world_size, ranks.local_rank) == (0, 1, 0)
        assert ranks.hand_out(["mine"]) == "mine"
        assert ranks.from_controller(3) == 3
        assert ranks.collect("a") == ["a"]
        assert ranks.all_gather("a") == ["a"]
        ranks.agree({"a": 1}, "configuration")
        ranks.all_ranks_ok()
        with pytest.raises(RankError, match=r"^rank 0: KeyError: 'a'$"):
            ranks.all_ranks_ok(KeyError("a"))
        with pytest.raises(RankError, match=r"^rank 0: ValueError: empty$"):
            ranks.hand_out(ValueError("empty"))
        with pytest.raises(RankError, match="2 shares for 1 ranks"):
            ranks.hand_out([1, 2])


def test_each_rank_gets_its_share(two_ranks: RankPool) -> None:
    first, second = two_ranks.run(exchange)
    for rank, found in enumerate((first, second)):
        assert found["share"]["for"] == rank
        assert found["share"]["ids"].tolist() == list(range(rank))
        assert found["decision"] == "decided"
        assert found["all_gather"] == [0, 1]
        assert found["identity"] == (rank, 2, rank, rank == 0)
        assert found["threads"] == [["heartbeat", "heartbeat watch"], []]
    assert first["collected"] == [0, 10]
    assert second["collected"] is None


@pytest.mark.parametrize(
    ("kind", "name", "text"),
    [
        ("on rank 1", "RankError", "rank 1: EngineError: the engine died"),
        ("on the controller", "RankError", "rank 0: ValueError: no prompts"),
        ("too few shares", "RankError", "rank 0: ValueError: 1 shares for 2 ranks"),
        ("another configuration", "ConfigError", "rank 1 has another configuration than rank 0: seed is 7, not 0; "),
        ("another version", "ConfigError", "rank 1 has another code version than rank 0: '0.1', not '0.0'; "),
    ],
)
def test_a_mistake_is_the_same_line_on_every_rank(kind: str, name: str, text: str, two_ranks: RankPool) -> None:
    first, second = two_ranks.run(mistake, kind)
    assert first[:2] == second[:2]
    assert first[0] == name
    assert first[1].startswith(text)
    assert "\n" not in first[1]
    if kind == "on rank 1":
        assert (first[2], second[2]) == ("NoneType", "EngineError")


def test_a_difference_of_mappings_names_the_key() -> None:
    ranks = Ranks()
    ranks.all_gather = lambda value: [value, {"a": 1, "c": "x" * 200}]  # type: ignore[method-assign,assignment,misc]
    with pytest.raises(ConfigError, match="rank 1 has another config than rank 0: b is not set, not 2; start"):
        ranks.agree({"a": 1, "b": 2, "c": "x" * 200}, "config")


def test_a_run_that_was_suspended_goes_on(two_ranks: RankPool) -> None:
    assert two_ranks.run(suspended) == [[0, 1], [0, 1]]


def test_a_rank_that_takes_long_is_not_dead(two_ranks: RankPool) -> None:
    (said, silent), (heard, _) = two_ranks.run(slow_but_alive)
    assert said == heard == "still here"
    assert silent >= 5000


@pytest.mark.parametrize(
    ("dying", "how", "line"),
    [
        (1, "stops", "error: rank 1 has died (no sign of life for 1000 s): rank 0 ends"),
        (0, "stops", "error: rank 0 has died (no answer for 1000 s): rank 1 ends"),
        (1, "fails", "error: rank 1: EngineError: out of memory: rank 0 ends"),
        (0, "fails", "error: rank 0: EngineError: out of memory: rank 1 ends"),
    ],
)
def test_a_rank_that_dies_ends_the_others(dying: int, how: str, line: str, capfd: pytest.CaptureFixture[str]) -> None:
    pool = RankPool(2)
    try:
        pool.start()
        waiting = pool.processes[1 - dying]
        for pipe in pool.pipes:
            pipe.send((wait_for, (dying, how), {}))
        waiting.join(PATIENCE)
        assert waiting.exitcode == 1
    finally:
        pool.stop()
    assert line in capfd.readouterr().err
