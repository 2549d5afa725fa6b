"""RewardWorker: rewards groups while others are still generated."""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

import numpy as np

from dppo_lightning.base.errors import RewardError
from dppo_lightning.base.records import Group
from dppo_lightning.base.special_tokens import Decoder
from dppo_lightning.base.timeline import Span, Timeline
from dppo_lightning.reward.base import RewardFunction, Sample, Score


@dataclass
class _Job:
    group: Group
    overlong_penalty: float
    done: Future[float]


class RewardWorker:
    """Caller of a reward function from one thread, so that the function needs no locks.

    Groups that arrive during a call are gathered, and scored by the next call in one go. A reward that must run on the
    main thread (``RewardFunction.main_thread``) is called at once by ``submit``. Decoding the text belongs to the work.

    Args:
        reward: Reward function to call.
        decoder: Decoder that turns token ids into the text that rewards see.
        timeout: Seconds that one call may take, > 0.
        timeline: Timeline that gets a span for each call.
    """

    def __init__(self, reward: RewardFunction, decoder: Decoder, timeout: float, timeline: Timeline) -> None:
        self.reward = reward
        self.decoder = decoder
        self.timeout = timeout
        self.timeline = timeline
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._busy_since: float | None = None

    def submit(self, group: Group, overlong_penalty: float = 0.0) -> Future[float]:
        """Have the group's texts, rewards and reward parts filled in.

        Args:
            group: Group that is not rewarded yet.
            overlong_penalty: Number subtracted from the reward of a completion that was cut by the length limit.

        Returns:
            Future of the group's share of the call's seconds; it holds the reward's error if the reward raised one.
        """
        job = _Job(group, overlong_penalty, Future())
        if self.reward.main_thread:
            self._score([job])
            return job.done
        if self._thread is None:
            # A daemon: a reward that never returns must not keep the process from ending.
            self._thread = threading.Thread(target=self._serve, name="rewards", daemon=True)
            self._thread.start()
        self._jobs.put(job)
        return job.done

    def wait(self, pending: list[Future[float]], timeout: float) -> None:
        """Wait up to ``timeout`` seconds for the first of ``pending``.

        Raises:
            RewardError: The present call of the reward has taken longer than ``timeout`` of the worker.
        """
        if pending and timeout > 0:
            wait(pending, timeout, FIRST_COMPLETED)
        since = self._busy_since
        if since is not None and time.monotonic() - since > self.timeout:
            raise RewardError(
                f"{type(self.reward).__name__} has not returned for {self.timeout:g} s: give it a time limit of its "
                "own, or raise data.reward_timeout"
            )

    def close(self) -> None:
        """Let the thread end once its present call returns."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread = None

    def _serve(self) -> None:
        while True:
            jobs = [self._jobs.get()]
            while not self._jobs.empty():
                jobs.append(self._jobs.get())
            real = [job for job in jobs if job is not None]
            if real:
                self._score(real)
            if len(real) < len(jobs):
                return

    def _score(self, jobs: list[_Job]) -> None:
        self._busy_since, started = time.monotonic(), time.perf_counter()
        try:
            counts = [len(job.group.completions) for job in jobs]
            scores = self.reward([sample for job in jobs for sample in self._samples(job.group)])
            place = 0
            for job, count in zip(jobs, counts, strict=True):
                write_rewards(job.group, scores[place : place + count], job.overlong_penalty)
                place += count
        except BaseException as error:  # any error must reach the thread that waits for the result
            for job in jobs:
                job.done.set_exception(error)
            return
        finally:
            self._busy_since = None
        ended = time.perf_counter()
        self.timeline.add(Span("reward", started, ended))
        each = (ended - started) / max(len(scores), 1)
        for job, count in zip(jobs, counts, strict=True):
            job.done.set_result(each * count)

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
