"""Rewarding: where completions are scored, what one may cost, and what becomes of those that cannot be scored."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Literal, get_args

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.base.records import FailureKind

FAILURES: dict[FailureKind, str] = {
    "timeout": "took longer than data.rewarding.timeout",
    "memory": "asked for more memory than data.rewarding.memory_mib",
    "died": "ended the process that scored them",
    "raised": "made the reward raise an error",
}
"""Ways in which a completion cannot be scored."""


@dataclass(frozen=True)
class Rewarding:
    """How completions are scored.

    Args:
        isolation: Place where the reward is called. "process": in worker processes that have limits and no keys.
            "none": in the trainer's process, for a function that only reads what the model wrote and needs what a
            worker does not have: a network, keys, a GPU, or objects that cannot be sent to another process.
        workers: Number of worker processes, >= 1; None: one for each processor, at most 4. Scores do not depend on it.
        timeout: Seconds that scoring one completion may take, > 0.
        memory_mib: Memory that scoring may take beyond what the loaded reward takes, in MiB, >= 16.
        failure_value: Reward of a completion that cannot be scored, finite.
        max_failed_share: Share of completions in [0, 1] that may fail before the run stops; 1 never stops it. It is
            looked at for each rollout and each evaluation, and while they go on for the last 256 completions.
        concurrency: Number of completions, >= 1, that an asynchronous reward is given at a time in one process.

    Raises:
        ConfigError: A value is out of range.
    """

    isolation: Literal["process", "none"] = "process"
    workers: int | None = None
    timeout: float = 10.0
    memory_mib: int = 1024
    failure_value: float = 0.0
    max_failed_share: float = 0.5
    concurrency: int = 16

    def __post_init__(self) -> None:
        kinds = get_args(Literal["process", "none"])
        for name, right, rule in (
            ("isolation", self.isolation in kinds, f"one of {', '.join(kinds)}"),
            ("workers", self.workers is None or self.workers >= 1, ">= 1 or null"),
            ("timeout", 0 < self.timeout < math.inf, "> 0 and finite"),
            ("memory_mib", self.memory_mib >= 16, ">= 16"),
            ("failure_value", math.isfinite(self.failure_value), "finite"),
            ("max_failed_share", 0 <= self.max_failed_share <= 1, "in [0, 1]"),
            ("concurrency", self.concurrency >= 1, ">= 1"),
        ):
            if not right:
                raise ConfigError(f"data.rewarding.{name} must be {rule}, got {getattr(self, name)!r}")

    @property
    def processes(self) -> int:
        """Number of worker processes."""
        return self.workers or min(4, len(os.sched_getaffinity(0)))
