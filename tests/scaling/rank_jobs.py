"""What ranks do in the tests of Ranks."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import numpy as np

from dppo_lightning.errors import ConfigError, DPPOError, EngineError, RankError
from dppo_lightning.scaling.ranks import Ranks


def exchange() -> dict[str, Any]:
    with Ranks() as ranks:
        mine = ranks.rank
        found = {
            "share": ranks.hand_out([{"for": rank, "ids": np.arange(rank)} for rank in range(2)] if not mine else None),
            "decision": ranks.from_controller("decided" if not mine else None),
            "collected": ranks.collect(10 * mine),
            "everyone": ranks.everyone(mine),
            "identity": (ranks.rank, ranks.world_size, ranks.local_rank, ranks.is_controller),
        }
        ranks.all_ranks_ok()
        ranks.agree({"trainer": {"max_steps": 3}}, "configuration")
        alive = [thread.name for thread in threading.enumerate()]
    after = [thread.name for thread in threading.enumerate()]
    return found | {"threads": [[name for name in names if "heartbeat" in name] for names in (alive, after)]}


def mistake(kind: str) -> tuple[str, str, str]:
    """Type and text of the error, and the name of its cause."""
    ranks = Ranks()
    error: DPPOError
    try:
        if kind == "on rank 1":
            ranks.all_ranks_ok(EngineError("the engine\ndied") if ranks.rank == 1 else None)
        elif kind == "on the controller":
            ranks.hand_out(ValueError("no prompts") if ranks.is_controller else None)
        elif kind == "too few shares":
            ranks.hand_out([1] if ranks.is_controller else None)
        elif kind == "another configuration":
            ranks.agree({"seed": 0, "model": {"lr": 1e-6}} if ranks.is_controller else {"seed": 7}, "configuration")
        elif kind == "another version":
            ranks.agree(f"0.{ranks.rank}", "code version")
    except (RankError, ConfigError) as caught:
        error = caught
    ranks.close(RankError("known to all"))
    return type(error).__name__, str(error), type(error.__cause__).__name__


def wait_for(dying: int, how: str) -> None:
    """One rank stops, or fails; the other waits for it."""
    with Ranks(silence=2.0) as ranks:
        ranks.everyone("here")
        if ranks.rank != dying:
            ranks.collect("for ever")
            ranks.everyone("for ever")
        elif how == "stops":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            raise EngineError("out of\nmemory")


def slow_but_alive() -> str:
    """Longer than the silence that a dead rank is given."""
    with Ranks(silence=1.0) as ranks:
        if ranks.rank == 1:
            time.sleep(2.5)
        return ranks.from_controller("still here")
