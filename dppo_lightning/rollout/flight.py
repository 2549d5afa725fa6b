"""GroupFlight: one prompt's completions on their way from the engine through the reward."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from dppo_lightning.advantage import without_signal
from dppo_lightning.records import Completion, Group, Prompt
from dppo_lightning.rollout.engine import Failed


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
        failed: What the engine could not serve.
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
    failed: list[Failed] = field(default_factory=list)
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
            self.failed.append(result)
        else:
            self.completions[sample] = result
        if self.waiting:
            return
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
