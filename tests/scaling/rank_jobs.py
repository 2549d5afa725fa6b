"""What ranks do in the tests of Ranks."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dppo_lightning.base.errors import ConfigError, DPPOError, EngineError, RankError
from dppo_lightning.scaling.ranks import Ranks
from tests.helpers.processes import state


def exchange() -> dict[str, Any]:
    with Ranks() as ranks:
        mine = ranks.rank
        found = {
            "share": ranks.hand_out([{"for": rank, "ids": np.arange(rank)} for rank in range(2)] if not mine else None),
            "decision": ranks.from_controller("decided" if not mine else None),
            "collected": ranks.collect(10 * mine),
            "all_gather": ranks.all_gather(mine),
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


class Clock:
    """Goes on by 100 s when the thread that counts asks it and ``moving`` says so, and stands still else.

    So only what another rank does or does not do makes it silent for long, never a machine that is busy.
    """

    def __init__(self, thread: str, moving: Callable[[], bool]) -> None:
        self.thread, self.moving, self.now = thread, moving, 0.0

    def __call__(self) -> float:
        if threading.current_thread().name == self.thread and self.moving():
            self.now += 100.0
        return self.now


def wait_for(dying: int, how: str) -> None:
    """One rank stops, or fails; the other waits for it, and its clock goes on once the first has stopped."""
    pids: list[int] = []
    # On rank 0 the thread that reads the signs of life finds them out; elsewhere that thread waits for rank 0's answer.
    clock = Clock("heartbeat watch" if dying == 0 else "heartbeat", lambda: bool(pids) and state(pids[dying]) == "T")
    with Ranks(silence=1000.0, interval=0.02, clock=clock) as ranks:
        pids += ranks.all_gather(os.getpid())
        if ranks.rank != dying:
            ranks.collect("for ever")
            ranks.all_gather("for ever")
        elif how == "stops":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            raise EngineError("out of\nmemory")


def slow_but_alive() -> tuple[str, float]:
    """The main threads do nothing for longer than the silence that a dead rank is given, by rank 0's clock.

    That clock goes on with each sign of life of rank 1 alone, which therefore has given them all the time.
    """
    beats = [0]

    def heard_another() -> bool:
        heartbeat = ranks_of.get("ranks") and ranks_of["ranks"]._heartbeat
        count = heartbeat._counts.get(1, 0) if heartbeat else 0
        before, beats[0] = beats[0], count
        return count > before

    ranks_of: dict[str, Ranks] = {}
    clock = Clock("heartbeat", heard_another)
    with Ranks(silence=1000.0, interval=0.02, clock=clock) as ranks:
        ranks_of["ranks"] = ranks
        while ranks.is_controller and clock.now < 5000.0:
            time.sleep(0.02)
        return ranks.from_controller("still here"), clock.now


def suspended() -> list[int]:
    """All processes of the run stand still for longer than the silence that a dead rank is given, and go on."""
    now = [0.0]
    # when they go on, rank 0 looks before rank 1 has given another sign of life
    interval = 0.02 if torch.distributed.get_rank() == 0 else 250.0
    with Ranks(silence=1000.0, interval=interval, clock=lambda: now[0]) as ranks:
        store = ranks._heartbeat._store  # type: ignore[union-attr]
        for later in (0.0, 10_000.0):
            now[0] = later
            before = store.add("beat/0", 0)
            while ranks.is_controller and store.add("beat/0", 0) < before + 5:
                time.sleep(0.02)
        return ranks.all_gather(ranks.rank)
