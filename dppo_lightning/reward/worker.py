"""RewardWorker: rewards groups while others are still generated."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

import numpy as np

from dppo_lightning.base.errors import RewardError
from dppo_lightning.base.records import Failure, Group
from dppo_lightning.base.special_tokens import Decoder
from dppo_lightning.base.timeline import Span, Timeline
from dppo_lightning.reward.base import RewardFunction, Sample, Score
from dppo_lightning.reward.calling import Outcome, Unit
from dppo_lightning.reward.cell_process import Closed
from dppo_lightning.reward.failures import FailureBound
from dppo_lightning.reward.pool import Caller, RewardPool
from dppo_lightning.reward.rewarding import Rewarding

log = logging.getLogger(__name__)

SHOWN_FAILURES = 3
"""Number of completions that could not be scored which the log shows; all are in the run's completions.jsonl."""

BATCH, LARGEST = 64, 256
"""Completions from which on no further group is added to a call, while few wait and while many do."""


@dataclass
class _Job:
    group: Group
    overlong_penalty: float
    done: Future[float]


class RewardWorker:
    """Caller of a run's reward, from one thread for each worker process.

    Groups that arrive during a call are gathered, and scored by the next in one go. Decoding the text belongs to the
    work. Which groups are scored together, and by whom, changes nothing.

    Args:
        reward: Reward function to call.
        decoder: Decoder that turns token ids into the text that rewards see.
        settings: Settings of the calls.
        timeline: Timeline that gets a span for each call.

    Raises:
        ConfigError: The reward cannot be sent to another process.
    """

    def __init__(self, reward: RewardFunction, decoder: Decoder, settings: Rewarding, timeline: Timeline) -> None:
        self.reward = reward
        self.decoder = decoder
        self.settings = settings
        self.timeline = timeline
        self.pool = RewardPool(reward, settings)
        self.bound = FailureBound(reward.label, settings.max_failed_share)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._busy = 0
        self._waiting = 0  # completions in the queue
        self._shown = 0  # failures in the log
        self._late_at: dict[int, float] = {}  # of calls in this process: thread -> when it has taken too long

    def submit(self, group: Group, overlong_penalty: float = 0.0) -> Future[float]:
        """Have the group's texts, rewards and reward parts filled in.

        Args:
            group: Group that is not rewarded yet.
            overlong_penalty: Number subtracted from the reward of a completion that was cut by the length limit.

        Returns:
            Future of the group's share of the call's seconds; it holds the error if the reward itself is wrong.
        """
        job = _Job(group, overlong_penalty, Future())
        with self._lock:
            self._waiting += len(group.completions)
            if self._busy == len(self._threads) < self.pool.callers:
                self._busy += 1
                # A daemon: a reward that never returns must not keep the process from ending.
                thread = threading.Thread(target=self._serve, name="rewards", daemon=True)
                self._threads.append(thread)
                thread.start()
        self._jobs.put(job)
        return job.done

    def wait(self, pending: list[Future[float]], timeout: float) -> None:
        """Wait up to ``timeout`` seconds for the first of ``pending``.

        Raises:
            RewardError: A call in this process, where nothing can end it, has taken too long.
        """
        if pending and timeout > 0:
            wait(pending, timeout, FIRST_COMPLETED)
        if any(time.monotonic() > late for late in list(self._late_at.values())):
            limit = f"data.rewarding.timeout={self.settings.timeout:g} s"
            raise RewardError(
                f"{self.reward.label} has taken longer than {limit} for a completion: give "
                "it a time limit of its own, raise this one, or use data.rewarding.isolation: process, where such a "
                "completion is given up"
            )

    def check(self, groups: Sequence[Group]) -> dict[str, float]:
        """Look at all groups of a rollout or an evaluation.

        Returns:
            Number of their completions that could not be scored, as metrics for each kind of failure.

        Raises:
            RewardError: There are too many.
        """
        return self.bound.check(groups)

    def close(self) -> None:
        """End the worker processes; a thread ends once its present call returns."""
        for _ in self._threads:
            self._jobs.put(None)
        self._threads = []
        self.pool.close()

    def _serve(self) -> None:
        caller = self.pool.caller()
        job = self._jobs.get()
        while jobs := self._gathered(job):
            self._score(caller, jobs)
            with self._lock:
                self._busy -= 1
            job = self._jobs.get()
            with self._lock:
                self._busy += 1
        caller.close()

    def _gathered(self, job: _Job | None) -> list[_Job]:
        """Take a group and those that wait behind it; none when the worker was closed."""
        jobs, completions = [], 0
        limit = min(max(BATCH, self._waiting // self.pool.callers), LARGEST)
        while job is not None:
            jobs.append(job)
            completions += len(job.group.completions)
            with self._lock:
                self._waiting -= len(job.group.completions)
            if completions >= limit:
                break
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
        else:
            if jobs:
                self._jobs.put(None)  # for the next look
        return jobs

    def _score(self, caller: Caller, jobs: list[_Job]) -> None:
        started = time.perf_counter()
        completions = sum(len(job.group.completions) for job in jobs)
        try:
            if self.settings.isolation == "none":
                self._late_at[threading.get_ident()] = time.monotonic() + self.settings.timeout * completions
            groups = [self._samples(job.group) for job in jobs]
            units = [unit for samples in groups for unit in self._units(samples)]
            together = not any(self.reward.runs(job.group.prompt) for job in jobs)
            if not together and self.settings.isolation == "none":
                raise RewardError(
                    f"{self.reward.label} may execute what the model writes, which the trainer's process never does: "
                    "set data.rewarding.isolation: process"
                )
            outcomes = iter(caller.score(units, together))
            for job, samples in zip(jobs, groups, strict=True):
                self._write(job, [(unit, next(outcomes)) for unit in self._units(samples)])
        except Closed:
            return
        except BaseException as error:  # any error must reach the thread that waits for the result
            for job in jobs:
                job.done.set_exception(error)
            return
        finally:
            self._late_at.pop(threading.get_ident(), None)
        ended = time.perf_counter()
        self.timeline.add(Span("reward", started, ended))
        each = (ended - started) / max(completions, 1)
        for job in jobs:
            job.done.set_result(each * len(job.group.completions))

    def _units(self, samples: list[Sample]) -> list[Unit]:
        return [samples] if self.reward.whole_groups else [[sample] for sample in samples]

    def _write(self, job: _Job, outcomes: list[tuple[Unit, Outcome]]) -> None:
        """Fill in a group's rewards; one that failed gets the configured value, and no parts."""
        scores: list[Score] = []
        failures: list[Failure | None] = []
        for unit, outcome in outcomes:
            if isinstance(outcome, Failure):
                self._show(unit, outcome)
            failures += [outcome if isinstance(outcome, Failure) else None] * len(unit)
            scores += [Score(self.settings.failure_value)] * len(unit) if isinstance(outcome, Failure) else outcome
        job.group.failures = failures
        write_rewards(job.group, scores, job.overlong_penalty)
        with self._lock:
            self.bound.add(failures)

    def _show(self, unit: Unit, failure: Failure) -> None:
        """Say in the log what the first completions were that could not be scored."""
        with self._lock:
            self._shown += 1
        if self._shown <= SHOWN_FAILURES:
            log.warning(f"{self.reward.label} could not score {unit[0].completion[:200]!r} ({failure})")

    def _samples(self, group: Group) -> list[Sample]:
        ids = [completion.token_ids.tolist() for completion in group.completions]
        group.texts, raw_texts = self.decoder.texts(ids), self.decoder.raw_texts(ids)
        ended = [completion.finish_reason == "stop" for completion in group.completions]
        inner = [row[:-1] if stopped else row for row, stopped in zip(ids, ended, strict=True)]
        group.raw_texts = [
            raw if self.decoder.leaves_out(row) else None for row, raw in zip(inner, raw_texts, strict=True)
        ]
        return [
            Sample(
                prompt=group.prompt.text,
                completion=text,
                answer=group.prompt.answer,
                columns=group.prompt.columns,
                finished=stopped,
                token_ids=tuple(row),
                raw_completion=raw,
            )
            for row, text, raw, stopped in zip(ids, group.texts, raw_texts, ended, strict=True)
        ]


def write_rewards(group: Group, scores: list[Score], overlong_penalty: float) -> None:
    """Fill in a group's rewards and their named parts; the penalty, where there is one, is the part "overlong"."""
    names = dict.fromkeys(name for score in scores for name in score.parts)
    parts = {name: np.array([score.parts.get(name, np.nan) for score in scores]) for name in names}
    rewards = np.array([score.value for score in scores], np.float64)
    if overlong_penalty:
        cut = np.array([completion.finish_reason == "length" for completion in group.completions], np.float64)
        parts["overlong"] = -overlong_penalty * cut
        rewards += parts["overlong"]
    group.reward_parts = parts
    group.rewards = rewards
