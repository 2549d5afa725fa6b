"""GroupPool: the groups that are being generated and rewarded, and those that are ready and not taken yet."""

from __future__ import annotations

import queue
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

from dppo_lightning.base.records import Completion, Prompt
from dppo_lightning.base.timeline import Span, Timeline
from dppo_lightning.generate.engine import Failed, Request, Sampling
from dppo_lightning.generate.flight import GroupFlight, derive_seed
from dppo_lightning.generate.inbox import Inbox
from dppo_lightning.reward.worker import RewardWorker

PATIENCE = 0.05
"""Seconds to wait for the engine while rewards are being computed, and the other way round."""


@dataclass
class Share:
    """The groups that one rollout may take, counted as they change: an arrival makes nobody look at all of them.

    Attributes:
        flights: By serial number, in the order in which they were begun.
        settled: How many of them are settled.
        usable: How many of those can be trained on.
        results: Requests of theirs that have a result.
        waiting: Requests of theirs without one.
    """

    flights: dict[int, GroupFlight] = field(default_factory=dict)
    settled: int = 0
    usable: int = 0
    results: int = 0
    waiting: int = 0

    def remove(self, flight: GroupFlight) -> None:
        """Forget a group as it is now."""
        del self.flights[flight.serial]
        self.settled -= flight.settled
        self.usable -= flight.usable
        self.results -= flight.results
        self.waiting -= len(flight.waiting)


class GroupPool:
    """Groups in the making, by their serial numbers.

    What happens to one group costs the same however many there are.

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
        self._shares: defaultdict[int | None, Share] = defaultdict(Share)
        self._scoring = 0  # groups that wait for their reward
        self._ended: queue.SimpleQueue[GroupFlight] = queue.SimpleQueue()  # rewarded, or without a group; not settled

    def __len__(self) -> int:
        return len(self._flights)

    def __iter__(self) -> Iterator[GroupFlight]:
        return iter(list(self._flights.values()))

    def share(self, rollout: int | None) -> Share:
        """The groups that are reserved for the rollout of step ``rollout``; None: those that any may take."""
        return self._shares.get(rollout) or Share()

    def begin(self, serial: int, prompt: Prompt, rollout: int | None, attempt: int = 0) -> None:
        """Ask a prompt."""
        flight = GroupFlight(serial, prompt, rollout, attempt)
        self._flights[serial] = self._shares[rollout].flights[serial] = flight
        self._submit(flight, range(self.samples))

    def revive(self, flight: GroupFlight) -> None:
        """Go on with a group of a run that was interrupted: ask again, with the same seeds, for what it lacks."""
        self._flights[flight.serial] = flight
        share = self._shares[flight.rollout]
        share.flights[flight.serial] = flight
        share.results += flight.results
        if flight.settled:
            share.settled += 1
            share.usable += flight.usable
        elif flight.finished is not None:
            self._finish(flight)
        else:
            missing = set(range(self.samples)) - flight.completions.keys() - flight.failed.keys()
            self._submit(flight, sorted(missing))

    def remove(self, flights: Iterable[GroupFlight]) -> int:
        """Forget groups; requests of theirs that are still in flight are aborted and counted."""
        unwanted: list[str] = []
        for flight in flights:
            del self._flights[flight.serial]
            share = self._shares[flight.rollout]
            share.remove(flight)
            self._scoring -= flight.rewarded is not None and not flight.settled
            if not share.flights:
                del self._shares[flight.rollout]
            unwanted += flight.waiting
            flight.waiting.clear()
        self.inbox.discard(unwanted)
        return len(unwanted)

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
        unwanted: list[str] = []
        for flight in self:
            if flight.waiting:
                stopped.append((flight, [sample for sample, _ in flight.waiting.values()]))
                self._shares[flight.rollout].waiting -= len(flight.waiting)
                unwanted += flight.waiting
                flight.waiting.clear()
                flight.attempt += 1
        self.inbox.discard(unwanted)
        return stopped

    def restart(self, stopped: list[tuple[GroupFlight, list[int]]]) -> None:
        """Submit again, with the same seeds, what was interrupted."""
        for flight, samples in stopped:
            self._submit(flight, samples)

    def collect(self, wait: float) -> list[GroupFlight]:
        """Take what the engine and the reward have finished, waiting up to ``wait`` seconds for the first of it.

        Returns:
            The groups that have settled by it, in the order of their serial numbers.

        Raises:
            EngineError: The engine died.
            RewardError: The reward takes longer than it may; or whatever a reward has raised.
        """
        if self.inbox.in_flight:
            self.inbox.collect(min(wait, PATIENCE) if self._scoring else wait)
            wait = 0.0
        settled = self.settle(min(wait, PATIENCE) if self._scoring else 0.0)
        self.worker.wait([], 0.0)  # is it in time?
        return settled

    def settle(self, wait: float = 0.0) -> list[GroupFlight]:
        """As ``collect``, without looking at the engine."""
        settled: list[GroupFlight] = []
        try:
            while True:
                flight = self._ended.get(timeout=wait) if wait > 0 else self._ended.get_nowait()
                wait = 0.0
                if self._flights.get(flight.serial) is not flight:
                    continue  # forgotten while it was being rewarded
                if flight.rewarded is not None:
                    self._scoring -= 1
                    flight.rewarded.result()
                flight.settled = True
                share = self._shares[flight.rollout]
                share.settled += 1
                share.usable += flight.usable
                settled.append(flight)
        except queue.Empty:
            return sorted(settled, key=lambda flight: flight.serial)

    def _submit(self, flight: GroupFlight, samples: Iterable[int]) -> None:
        group = f"train/{flight.serial}"
        again = f"/{flight.attempt}" if flight.attempt else ""  # an id must not be in flight twice
        names = {sample: f"{group}/{sample}{again}" for sample in samples}
        flight.waiting |= {name: (sample, self.version) for sample, name in names.items()}
        self._shares[flight.rollout].waiting += len(names)
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
        share = self._shares[flight.rollout]
        share.results += 1
        share.waiting -= 1
        if flight.finished is None:
            return
        rollout = -1 if flight.rollout is None else flight.rollout
        self.timeline.add(Span("generate", flight.submitted, flight.finished, rollout, flight.oldest_version() or 0))
        self._finish(flight)

    def _finish(self, flight: GroupFlight) -> None:
        """Send a group that has all its results to the reward."""
        if flight.group is None:
            self._ended.put(flight)
            return
        self._scoring += 1
        flight.rewarded = self.worker.submit(flight.group, self.overlong_penalty)
        flight.rewarded.add_done_callback(lambda _: self._ended.put(flight))  # on the reward's thread
