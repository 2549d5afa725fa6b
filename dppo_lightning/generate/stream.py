"""RolloutStream: the first three of the five verbs, generate -> reward -> advantage.

Requests are in flight for as many rollouts as the age bound allows. Nothing here runs on a thread of its own but the
reward: the engine generates in its own process, and the stream looks at what has arrived when it is asked for a rollout
(``next_rollout``) and now and then while the policy trains (``pump``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from math import ceil, floor
from time import perf_counter
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dppo_lightning.advantage import AdvantageEstimator
from dppo_lightning.base.errors import ConfigError, EngineError
from dppo_lightning.base.records import Completion, Group, Prompt
from dppo_lightning.base.special_tokens import Decoder
from dppo_lightning.base.timeline import Span, Timeline
from dppo_lightning.generate.engine import Failed, Request, RolloutEngine, Sampling
from dppo_lightning.generate.flight import GroupFlight, derive_seed
from dppo_lightning.generate.inbox import Inbox, Progress
from dppo_lightning.generate.pool import PATIENCE, GroupPool, Share
from dppo_lightning.generate.schedule import Rollout, Schedule, Selection, Streaming, Window
from dppo_lightning.prompts.sampler import PromptSampler, draw
from dppo_lightning.reward.base import RewardFunction
from dppo_lightning.reward.rewarding import Rewarding
from dppo_lightning.reward.worker import RewardWorker

RewardPenalty = Callable[[list[Group]], list[np.ndarray]]
"""For each group what is subtracted from its [G] rewards before the advantage (KL to the reference, in reward)."""


class RolloutStream:
    """Turns prompts into groups that can be trained on.

    Args:
        engine: Started.
        sampler: Gives the training prompts; started.
        tokenizer: Turns token ids into the text that rewards see.
        reward: Scores completions.
        advantage: Turns rewards into advantages.
        sampling: How training completions are drawn.
        samples_per_prompt: Completions of each prompt.
        seed: Of the run; each request's seed is derived from (run seed, group, prompt, sample).
        schedule: Which rollout belongs to which steps.
        streaming: How far generation runs ahead.
        selection: Which completions are trained on.
        penalty: Subtracted from the rewards before the advantage.
        solved_at: A completion counts as solved when its reward is at least this.
        rewarding: Where and how the reward is called.
        timeline: Where spans are added.
        stop_token_ids: Ids that end a completion; like the tokenizer's own they are no part of its text.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        sampler: PromptSampler,
        tokenizer: PreTrainedTokenizerBase,
        reward: RewardFunction,
        advantage: AdvantageEstimator,
        sampling: Sampling,
        samples_per_prompt: int,
        seed: int,
        schedule: Schedule,
        streaming: Streaming = Streaming(),  # noqa: B008  # frozen
        selection: Selection = Selection(),  # noqa: B008  # frozen
        penalty: RewardPenalty | None = None,
        solved_at: float = 1.0,
        rewarding: Rewarding = Rewarding(),  # noqa: B008  # frozen
        timeline: Timeline | None = None,
        stop_token_ids: tuple[int, ...] = (),
    ) -> None:
        self.sampler = sampler
        self.advantage = advantage
        self.seed = seed
        self.schedule = schedule
        self.streaming = streaming
        self.selection = selection
        self.penalty = penalty
        self.solved_at = solved_at
        self.timeline = timeline or Timeline()
        self.inbox = Inbox(engine)
        self.worker = RewardWorker(reward, Decoder(tokenizer, stop_token_ids), rewarding, self.timeline)
        overlong = selection.overlong_penalty if selection.overlong == "penalise" else 0.0
        self.pool = GroupPool(self.inbox, self.worker, sampling, samples_per_prompt, seed, overlong, self.timeline)
        self.serial = 0  # groups begun in this run
        self._next: int | None = None  # first step of the rollout that is taken next; None before the first
        self._reserved: set[int] = set()  # rollouts whose groups were begun
        self._replaced: Counter[int] = Counter()  # by rollout: groups begun in place of others
        self._rejected: list[GroupFlight] = []  # without signal, since the last rollout
        self._version = 0  # weight version that the age bound is counted from
        self._resumed_at: int | None = None  # weight version that the engine lacks after a state was loaded
        self._revived: list[GroupFlight] = []  # begun before an interruption of the run, and not asked for again yet

    def next_rollout(self, step: int, progress: Progress | None = None) -> Rollout:
        """Generate, reward, and estimate advantages: the rollout whose first optimizer step is ``step``.

        Raises:
            EngineError: The engine died, or could serve no request.
            RewardError: The reward failed, or takes longer than it may.
        """
        started = perf_counter()
        window = next(self.schedule.upcoming(step))
        self._next = step
        self.generate(window)
        self._look_at(self.pool.settle())
        self.pool.counts["stream/ready"] = self._share(step).settled
        while not self._complete(window):
            self._collect(wait=1.0)
            if progress is not None:
                mine = self._share(step)
                progress(mine.results, mine.results + mine.waiting)
        rollout = self._take(window)
        self.estimate_advantages(rollout.groups)
        rollout.seconds["wait"] = perf_counter() - started
        self.timeline.add(Span("wait", started, perf_counter(), step))
        return rollout

    def generate(self, window: Window) -> None:
        """Have in flight what may be trained on in the rollouts from ``window`` on, as far as the age bound allows."""
        revived, self._revived = self._revived, []
        for flight in revived:
            self.pool.revive(flight)
        bound = self.streaming.max_staleness
        # the first that is too far ahead ends it: a long run has many more
        allowed = takewhile(lambda w: w.start - self._version <= bound, self.schedule.upcoming(window.start))
        wanted = {w.start: ceil(w.prompts * (1 + self.selection.oversampling)) for w in allowed}
        if self.streaming.late == "drop":
            # Reserved groups are never too old: they are begun with weights within the bound of their rollout.
            self.pool.drop_older_than(window.start - bound)
            self._begin(max(0, sum(wanted.values()) - len(self.pool)), rollout=None)
            return
        for start, count in wanted.items():
            if start not in self._reserved:
                self._reserved.add(start)
                self._begin(count, rollout=start)

    def _begin(self, count: int, rollout: int | None) -> None:
        for prompt in draw(self.sampler, count) if count else []:
            self.pool.begin(self.serial, prompt, rollout)
            self.serial += 1

    def settle(self) -> None:
        """Wait until every group that was begun has its completions and rewards, so that a checkpoint has them."""
        while any(not flight.settled for flight in self.pool):
            self._collect(wait=1.0)

    def pump(self) -> None:
        """Look at what has arrived, without waiting, so that rewards are computed and groups replaced meanwhile."""
        if len(self.pool):
            self._collect(wait=0.0)

    def _collect(self, wait: float) -> None:
        self._look_at(self.pool.collect(wait))

    def _look_at(self, settled: list[GroupFlight]) -> None:
        for flight in settled:
            if self.selection.resampling and flight.usable and not flight.has_signal():
                self._replace(flight)

    def _replace(self, flight: GroupFlight) -> None:
        """Put another prompt's group in the place of one without signal, while there is room."""
        self.pool.remove([flight])
        self.pool.counts["stream/without_signal"] += 1
        self._rejected.append(flight)
        rollout = self._next if flight.rollout is None else flight.rollout
        window = None if rollout is None else next(self.schedule.upcoming(rollout), None)
        if window is not None and self._replaced[window.start] < floor(self.selection.resampling * window.prompts):
            self._replaced[window.start] += 1
            self.pool.counts["stream/resampled"] += 1
            self._begin(1, flight.rollout)

    def _complete(self, window: Window) -> bool:
        """Whether the rollout has the groups that it needs, or no more are to come."""
        mine = self._share(window.start)
        return mine.usable >= window.prompts or mine.settled == len(mine.flights)

    def _share(self, step: int) -> Share:
        """The groups that the rollout of step ``step`` may take."""
        return self.pool.share(None if self.streaming.late == "drop" else step)

    def _take(self, window: Window) -> Rollout:
        """The groups that were complete first, in the order of their prompts; what was reserved beside them ends."""
        settled = [flight for flight in self._share(window.start).flights.values() if flight.settled]
        usable = sorted((f for f in settled if f.usable), key=lambda f: (f.finished, f.serial))
        chosen = sorted(usable[: window.prompts], key=lambda f: f.serial)
        failures = [failed for flight in settled for failed in flight.failed.values()]
        if not chosen and failures and not self._rejected:
            raise EngineError(f"the engine could serve none of {len(failures)} requests: {failures[0].reason}")
        self._check_age(chosen, window.start)
        self.pool.remove(chosen + [flight for flight in settled if flight.group is None])
        if self.streaming.late == "wait":
            self.pool.counts["stream/aborted"] = self.pool.remove([*self._share(window.start).flights.values()])
        not_scored = self.worker.check([f.group for f in chosen + self._rejected if f.group is not None])
        self._record(chosen + self._rejected)
        seconds = {
            "generate": max((f.finished or 0.0 for f in chosen), default=0.0)
            - min((f.submitted for f in chosen), default=0.0),
            "reward": sum(f.rewarded.result() for f in chosen + self._rejected if f.rewarded is not None),
        }
        counts = (
            {name: float(self.pool.counts[name]) for name in COUNTED}
            | {"stream/in_flight": float(self.inbox.in_flight)}
            | not_scored
        )
        self.pool.counts.clear()
        self._rejected, self._next = [], window.start + window.steps
        self._reserved.discard(window.start)
        del self._replaced[window.start]
        return Rollout([f.group for f in chosen if f.group is not None], window, len(failures), seconds, counts)

    def _check_age(self, flights: list[GroupFlight], step: int) -> None:
        """The bound holds by construction; it is checked all the same, for a stale token teaches wrong things."""
        for flight in flights:
            oldest = flight.oldest_version()
            if oldest is not None and step - oldest > self.streaming.max_staleness:
                raise EngineError(
                    f"a token of group {flight.serial} is {step - oldest} steps old at step {step}, above "
                    f"data.streaming.max_staleness={self.streaming.max_staleness}: please report this"
                )

    def _record(self, flights: list[GroupFlight]) -> None:
        """Tell the sampler how often each prompt was solved."""
        for flight in sorted(flights, key=lambda flight: flight.serial):
            assert flight.group is not None
            solved = np.asarray(flight.group.rewards) >= self.solved_at
            self.sampler.record(flight.prompt, float(solved.mean()))

    def estimate_advantages(self, groups: list[Group]) -> None:
        """Fill in advantages; KL in the reward is subtracted first."""
        rewards = [np.asarray(group.rewards) for group in groups]
        if self.penalty is not None:
            rewards = [reward - cost for reward, cost in zip(rewards, self.penalty(groups), strict=True)]
        for group, advantages in zip(groups, self.advantage.per_token(groups, rewards), strict=True):
            group.advantages = advantages

    @contextmanager
    def updating(self, version: int) -> Iterator[None]:
        """Around a weight update of the engine; afterwards more rollouts may be within the age bound."""
        stopped = self.pool.interrupt() if self.streaming.partial == "discard" else []
        try:
            yield
            self.pool.version = version
            within = self._next is not None and version < self._next
            if not (within and version == self._resumed_at):
                self._version = version
            # else a run goes on within a rollout, and what may be in flight is what was when it was saved
            self._resumed_at = None
        finally:
            if self.inbox.engine.health().alive:  # also after a refused update: nobody else would ask for them again
                self.pool.restart(stopped)
        coming = None if self._next is None else next(self.schedule.upcoming(self._next), None)
        if self.streaming.max_staleness and coming is not None:
            self.generate(coming)

    def sample(
        self, prompts: list[Prompt], samples: int, sampling: Sampling, label: str, progress: Progress | None = None
    ) -> list[Group]:
        """Beside training: complete and reward prompts, and wait for it; ``label`` enters the seeds.

        A prompt none of whose requests could be served has no group.

        Raises:
            EngineError: The engine died, or could serve none at all.
        """
        requests = [
            Request(
                id=f"{label}/{index}/{sample}",
                prompt_token_ids=prompt.token_ids,
                sampling=sampling,
                seed=derive_seed(self.seed, label, index, prompt.id, sample),
                group=f"{label}/{index}",
            )
            for index, prompt in enumerate(prompts)
            for sample in range(samples)
        ]
        results = self.inbox.fetch(requests, progress)
        failures = [result for result in results.values() if isinstance(result, Failed)]
        if failures and len(failures) == len(requests):
            raise EngineError(f"the engine could serve none of {len(requests)} requests: {failures[0].reason}")
        groups = []
        for index, prompt in enumerate(prompts):
            mine = [results[request.id] for request in requests[index * samples : (index + 1) * samples]]
            completions = [result for result in mine if isinstance(result, Completion)]
            if completions:
                groups.append(Group(prompt, completions, []))
        pending = [self.worker.submit(group) for group in groups]
        for future in pending:
            while not future.done():
                self.worker.wait([future], PATIENCE)
                self.pump()
            future.result()
        self.worker.check(groups)
        return groups

    def close(self) -> None:
        """End the reward's workers."""
        self.worker.close()

    def state_dict(self) -> dict[str, Any]:
        """Return prompt order, groups that are not trained on, and counts; requests in flight are asked again."""
        flights = [flight.state_dict() for flight in [*self.pool, *self._revived]]
        return {
            "serial": self.serial,
            "sampler": self.sampler.state_dict(),
            "version": self._version,
            "next": self._next,
            "reserved": sorted(self._reserved),
            "replaced": dict(self._replaced),
            "counts": dict(self.pool.counts),
            "flights": sorted(flights, key=lambda flight: flight["serial"]),
            "rejected": [flight.state_dict() for flight in self._rejected],
        }

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """Take up a state.

        Args:
            state: State that ``state_dict`` returned.
            step: Optimizer steps taken when it was saved; the engine is given the weights of that step next.

        Raises:
            ConfigError: It names a prompt that is not among the training prompts.
        """
        prompts = {prompt.id: prompt for prompt in self.sampler.prompts}
        for saved in [*state["flights"], *state["rejected"]]:
            if saved["prompt"] not in prompts:
                name = saved["prompt"]
                raise ConfigError(f"the checkpoint was made with other prompts: {name!r} is not among data.prompts")
        self.serial, self._version, self._next = state["serial"], state["version"], state["next"]
        self._resumed_at = step
        self._reserved, self._replaced = set(state["reserved"]), Counter(state["replaced"])
        self.pool.counts = Counter(state["counts"])
        self.sampler.load_state_dict(state["sampler"])
        self._revived = [GroupFlight.from_state(saved, prompts) for saved in state["flights"]]
        self._rejected = [GroupFlight.from_state(saved, prompts) for saved in state["rejected"]]


COUNTED = ("stream/ready", "stream/without_signal", "stream/resampled", "stream/aborted", "stream/stale")
