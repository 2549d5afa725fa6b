"""GroupFlight: a group while it is generated and rewarded; and the seeds of its requests."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dppo_lightning.advantage import without_signal
from dppo_lightning.base.records import Completion, Group, Prompt
from dppo_lightning.base.saved import load_completion, load_group, save_completion, save_group
from dppo_lightning.generate.engine import Failed


def derive_seed(*parts: object) -> int:
    """A seed in [0, 2**63) that depends on every part and on nothing else."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass
class GroupFlight:
    """A group in the making.

    Attributes:
        serial: Number of the group within the run; the seeds of its requests depend on it.
        prompt: What is asked.
        rollout: First optimizer step of the rollout that it is reserved for; None: whichever takes it.
        attempt: How often some of its requests were submitted anew.
        waiting: Request id -> (sample, weight version at submission) of requests without a result.
        completions: Sample -> completion.
        failed: Sample -> what the engine could not serve.
        submitted, finished: When the first request was submitted and the last result came, in seconds.
        group: Built when the last result came; None when no request could be served.
        rewarded: Done when the group has its rewards.
        settled: Whether nothing more will change: rewarded, or not servable at all. Set by ``GroupPool.collect``.
    """

    serial: int
    prompt: Prompt
    rollout: int | None
    attempt: int = 0
    waiting: dict[str, tuple[int, int]] = field(default_factory=dict)
    completions: dict[int, Completion] = field(default_factory=dict)
    failed: dict[int, Failed] = field(default_factory=dict)
    submitted: float = field(default_factory=time.perf_counter)
    finished: float | None = None
    group: Group | None = None
    rewarded: Future[float] | None = None
    settled: bool = False

    @property
    def results(self) -> int:
        """Requests that have a result."""
        return len(self.completions) + len(self.failed)

    @property
    def usable(self) -> bool:
        """Whether it can be trained on."""
        return self.settled and self.group is not None

    def accept(self, result: Completion | Failed) -> None:
        """Take one request's result; the last one makes the group."""
        sample, _ = self.waiting.pop(result.request_id)
        if isinstance(result, Failed):
            self.failed[sample] = result
        else:
            self.completions[sample] = result
        if self.waiting:
            return
        self._end()

    def _end(self) -> None:
        self.finished = time.perf_counter()
        if self.completions:
            self.group = Group(self.prompt, [self.completions[sample] for sample in sorted(self.completions)], [])

    def oldest_version(self) -> int | None:
        """Weight version of its oldest token, of those still to come too; None when it has and will have none."""
        versions = [int(completion.versions[0]) for completion in self.completions.values() if len(completion)]
        return min([*versions, *(version for _, version in self.waiting.values())], default=None)

    def has_signal(self) -> bool:
        """Whether its rewards differ."""
        assert self.group is not None
        return not without_signal(np.asarray(self.group.rewards))

    def state_dict(self) -> dict[str, Any]:
        """Return what a run that goes on needs of the group; tokens of requests in flight are not in it."""
        return {
            "serial": self.serial,
            "prompt": self.prompt.id,
            "rollout": self.rollout,
            "attempt": self.attempt,
            "settled": self.settled,
            "completions": {sample: save_completion(completion) for sample, completion in self.completions.items()},
            "failed": {sample: (failed.request_id, failed.reason) for sample, failed in self.failed.items()},
            "group": save_group(self.group) if self.settled and self.group is not None else None,
            "ended": self.finished is not None,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], prompts: Mapping[str, Prompt]) -> GroupFlight:
        """Make the group whose ``state_dict`` this is; its times count from now."""
        flight = cls(state["serial"], prompts[state["prompt"]], state["rollout"], state["attempt"])
        flight.completions = {n: load_completion(saved) for n, saved in state["completions"].items()}
        flight.failed = {n: Failed(*saved) for n, saved in state["failed"].items()}
        if state["ended"]:
            flight._end()
        if state["settled"]:
            flight.settled = True
            if state["group"] is not None:
                flight.group = load_group(state["group"], prompts)
                flight.rewarded = Future()
                flight.rewarded.set_result(0.0)  # seconds of the reward, in the session that is over
        return flight
