"""A number that is not finite on one rank stops the step on every rank, under every strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dppo_lightning.base.errors import NonFiniteError
from dppo_lightning.base.records import Sequence
from tests.helpers.faults import Arms, Fault, Faulty
from tests.helpers.rank_pool import RankPool
from tests.helpers.training import STRATEGIES, largest_difference, train


def stopped(*arguments: Any, **keywords: Any) -> str:
    """The error that ``train`` ends in."""
    try:
        train(*arguments, **keywords)
    except NonFiniteError as error:
        return str(error)
    return "not stopped"


@pytest.mark.parametrize("fault", ["loss", "gradient"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_skipped_step_is_as_if_it_had_not_been(
    strategy: str, fault: Fault, two_ranks: RankPool, tiny_policy_dir: str, steps: list[list[Sequence]], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "accumulate": 2,
        "module_settings": {"on_nonfinite": "skip"},
        "default_root_dir": tmp_path,
    }
    faulty = {"region": Faulty(fault), "callbacks": [Arms((1,), rank=1)], "max_steps": 3}
    run, _ = two_ranks.run(
        train, tiny_policy_dir, [steps[0], steps[1], steps[3]], strategy, "adamw", **settings, **faulty
    )
    assert run.of("train/skipped").tolist() == [1.0]
    sound = {"region": Faulty(fault), "max_steps": 2}
    other, _ = two_ranks.run(train, tiny_policy_dir, [steps[0], steps[3]], strategy, "adamw", **settings, **sound)
    assert largest_difference(run.last, other.last) == 0
    assert largest_difference(run.first, run.last) > 1e-4
    seen = [torch.load(tmp_path / "nonfinite" / "step-1" / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert all(seen[0]["gradients"].values())
    assert seen[0]["gradients"].keys() == seen[1]["gradients"].keys()
    bad = [any(entry["nan"] + entry["inf"] for entry in rank["gradients"].values()) for rank in seen]
    assert any(bad) == (fault == "gradient")
    assert any("rank 1" in place for place in seen[1]["found"]) == (fault == "loss")
    assert not any("rank 1" in place for place in seen[0]["found"])


@pytest.mark.parametrize("fault", ["loss", "weights"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_rank_ends_in_the_same_line(
    strategy: str, fault: Fault, two_ranks: RankPool, tiny_policy_dir: str, steps: list[list[Sequence]], tmp_path: Path
) -> None:
    lines = two_ranks.run(
        stopped,
        tiny_policy_dir,
        steps,
        strategy,
        "adamw",
        region=Faulty(fault),
        callbacks=[Arms((1,), rank=1)],
        max_steps=3,
        default_root_dir=tmp_path,
    )
    assert lines[0] == lines[1]
    assert lines[0].startswith("optimizer step 1 was not taken")
    assert fault in lines[0]
    assert str(tmp_path / "nonfinite" / "step-1") in lines[0]
