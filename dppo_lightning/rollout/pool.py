"""GroupPool: the groups that are being generated and rewarded, and those that are ready and not taken yet."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial

from dppo_lightning.batch import Completion, Prompt
from dppo_lightning.rewards.worker import RewardWorker
from dppo_lightning.rollout.engine import Failed, Request, Sampling
from dppo_lightning.rollout.flight import GroupFlight
from dppo_lightning.rollout.inbox import Inbox
from dppo_lightning.timeline import Span, Timeline

PATIENCE = 0.05
"""Seconds to wait for the engine while rewards are being computed, and the other way round."""


class GroupPool:
    """Groups in the making, by their serial numbers.

    Args:
        inbox: Of the engine.
        worker: Of the reward.
        sampling: How completions are drawn.
        samples: Completions of each prompt.
        seed: Of the run.
        overlong_penalty: See RewardWorker.submit.
        timeline: Where spans are added.

    Attributes:
        version: Weight version of the engine; new requests count as that old.
        counts: What happened since it was last cleared.
    """

    def __init__(
        self,
        inbox: Inbox,
        worker: RewardWorker,
        sampling: Sampling,
        samples: int,
        seed: int,
        overlong_penalty: float,
        timeline: Timeline,
    ) -> None:
        self.inbox = inbox
        self.worker = worker
        self.sampling = sampling
        self.samples = samples
        self.seed = seed
        self.overlong_penalty = overlong_penalty
        self.timeline = timeline
        self.version = 0
        self.counts: Counter[str] = Counter()
        self._flights: dict[int, GroupFlight] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def __iter__(self) -> Iterator[GroupFlight]:
        return iter(list(self._flights.values()))

    def of(self, rollout: int) -> list[GroupFlight]:
        """Groups that the rollout of step ``rollout`` may take."""
        return [flight for flight in self if flight.rollout in (None, rollout)]

    def begin(self, serial: int, prompt: Prompt, rollout: int | None, attempt: int = 0) -> None:
        """Ask a prompt."""
        flight = GroupFlight(serial, prompt, rollout, attempt)
        self._flights[serial] = flight
        self._submit(flight, range(self.samples))

    def remove(self, flights: Iterable[GroupFlight]) -> int:
        """Forget groups; requests of theirs that are still in flight are aborted and counted."""
        aborted = 0
        for flight in flights:
            del self._flights[flight.serial]
            aborted += self._abort(flight)
        return aborted

    def drop_older_than(self, version: int) -> None:
        """Generate anew, with the same seeds, every group with a token that is older."""
        for flight in self:
            oldest = flight.oldest_version()
            if oldest is not None and oldest < version:
                self.counts["stream/stale"] += 1
                self.remove([flight])
                self.begin(flight.serial, flight.prompt, flight.rollout, flight.attempt + 1)

    def interrupt(self) -> list[tuple[GroupFlight, list[int]]]:
        """Abort all that is being generated; what ``restart`` needs to begin it again."""
        stopped = []
        for flight in self:
            samples = [sample for sample, _ in flight.waiting.values()]
            if self._abort(flight):
                flight.attempt += 1
                stopped.append((flight, samples))
        return stopped

    def restart(self, stopped: list[tuple[GroupFlight, list[int]]]) -> None:
        """Submit again, with the same seeds, what was interrupted."""
        for flight, samples in stopped:
            self._submit(flight, samples)

    def collect(self, wait: float) -> None:
        """Take what the engine and the reward have finished, waiting up to ``wait`` seconds for the first of it.

        Raises:
            EngineError: The engine died.
            RewardError: The reward failed, or takes longer than it may.
        """
        scoring = [flight.rewarded for flight in self if flight.rewarded is not None and not flight.rewarded.done()]
        if self.inbox.in_flight:
            self.inbox.collect(min(wait, PATIENCE) if scoring else wait)
            wait = 0.0
        self.worker.wait(scoring, min(wait, PATIENCE))

    def _submit(self, flight: GroupFlight, samples: Iterable[int]) -> None:
        group = f"train/{flight.serial}"
        again = f"/{flight.attempt}" if flight.attempt else ""  # an id must not be in flight twice
        names = {sample: f"{group}/{sample}{again}" for sample in samples}
        flight.waiting |= {name: (sample, self.version) for sample, name in names.items()}
        requests = [
            Request(
                id=name,
                prompt_token_ids=flight.prompt.token_ids,
                sampling=self.sampling,
                seed=derive_seed(self.seed, group, flight.prompt.id, sample),
                group=group,
            )
            for sample, name in names.items()
        ]
        self.inbox.submit(requests, partial(self._arrive, flight))

    def _arrive(self, flight: GroupFlight, result: Completion | Failed) -> None:
        """A request's result; the group's last one sends it to the reward."""
        flight.accept(result)
        if flight.finished is None:
            return
        rollout = -1 if flight.rollout is None else flight.rollout
        self.timeline.add(Span("generate", flight.submitted, flight.finished, rollout, flight.oldest_version() or 0))
        if flight.group is not None:
            flight.rewarded = self.worker.submit(flight.group, self.overlong_penalty)

    def _abort(self, flight: GroupFlight) -> int:
        count = len(flight.waiting)
        self.inbox.discard(flight.waiting)
        flight.waiting.clear()
        return count


def derive_seed(*parts: object) -> int:
    """A seed in [0, 2**63) that depends on every part and on nothing else."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
