"""EngineProcess against a child that may die at every message. Restarts of vLLM itself: test_restart.py."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import chain, repeat
from typing import Any, NoReturn

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dppo_lightning.base.errors import EngineError
from dppo_lightning.base.records import Completion
from dppo_lightning.generate.engine import Request
from dppo_lightning.generate.vllm.child_process import ChildDied
from dppo_lightning.generate.vllm.supervision import EngineProcess
from tests.helpers.engines import ask


class FragileChild:
    """Stands in for a ChildProcess with a worker behind it.

    Args:
        deaths: Asked at every message in either direction: whether the worker dies now.
    """

    def __init__(self, deaths: Iterator[bool]) -> None:
        self.deaths = deaths
        self.starts = 0
        self._begin()

    def _begin(self) -> None:
        self.alive, self.paused, self.weights = True, False, 0
        self.sent: list[tuple[str, Any]] = []
        self.in_flight: dict[str, Request] = {}
        self.starts += 1

    def _survive(self) -> None:
        self.alive = self.alive and not next(self.deaths)
        if not self.alive:
            raise ChildDied("the test's process stopped: killed")

    def send(self, kind: str, value: Any = None) -> None:
        self._survive()
        if kind == "submit":
            self.in_flight.update((request.id, request) for request in value)
            self._generate()
            return
        if kind == "update":
            self.weights = value
        elif kind in ("pause", "resume"):
            self.paused = kind == "pause"
        elif kind == "abort":
            self._finish([name for name in self.in_flight if name in value], "abort")
        self.sent.append(("ready" if kind == "start" else kind, None))

    def _generate(self) -> None:
        """One completion, which a worker may well finish before it reads the next message."""
        if self.in_flight and not self.paused:
            self._finish(list(self.in_flight)[:1], "length")

    def _finish(self, names: list[str], reason: Any) -> None:
        requests = [self.in_flight.pop(name) for name in names]
        self.sent.append(("results", [answer(request, self.weights, reason) for request in requests]))

    def receive(self, timeout: float | None) -> tuple[str, Any] | None:
        self._survive()
        if not self.sent:
            self._generate()
        return self.sent.pop(0) if self.sent else None

    def unread(self) -> Iterator[tuple[str, Any]]:
        while self.sent:
            yield self.sent.pop(0)

    def restart(self) -> None:
        self._begin()

    def end(self, reason: str) -> ChildDied:
        self.alive = False
        return ChildDied(f"the test's process stopped: {reason}")

    def give_up(self, message: str) -> NoReturn:
        raise EngineError(f"{message} (log: here)")

    def close(self) -> None:
        self.alive = False


def answer(request: Request, version: int, reason: Any) -> Completion:
    """The only token of a completion is the request's seed."""
    return Completion(
        request.id, np.array([request.seed]), np.zeros(1, np.float32), reason, np.array([version], np.int64)
    )


def start(deaths: Iterator[bool], max_restarts: int = 1000) -> EngineProcess:
    process = EngineProcess(FragileChild(chain([False, False], deaths)), "settings", 1.0, max_restarts)  # type: ignore[arg-type]
    process.wait_until_ready()
    return process


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.sampled_from(["submit", "poll", "load", "pause", "resume", "abort"]), max_size=25),
    st.lists(st.booleans() | st.just(False), max_size=60),
)
def test_whenever_it_dies_each_request_is_answered_once_with_the_weights_in_force(
    actions: list[str], deaths: list[bool]
) -> None:
    process = start(chain(deaths, repeat(False)))
    version, paused, requests = 0, False, {}
    oldest: dict[str, int] = {}  # by request, the oldest version that may answer it
    aborted: set[str] = set()
    answers: dict[str, Completion] = {}

    def poll() -> None:
        for completion in process.poll(timeout=0):
            name = completion.request_id
            assert isinstance(completion, Completion)
            assert name not in answers
            answers[name] = completion
            assert completion.token_ids.tolist() == [requests[name].seed]
            assert oldest[name] <= completion.versions[0] <= version
            assert completion.finish_reason == "length" or name in aborted
            assert completion.finish_reason == "abort" or not paused

    for place, action in enumerate(actions):
        if action == "submit":
            new = [ask(f"{place}/{i}", seed=100 * place + i) for i in range(3)]
            requests.update((request.id, request) for request in new)
            oldest.update(dict.fromkeys((request.id for request in new), version))
            process.submit(new)
        elif action == "poll":
            poll()
        elif action == "load":
            poll()  # what the old weights have answered
            version += 1
            process.load(version)
        elif action == "abort":
            names = list(requests)[::2]
            aborted.update(names)
            process.abort(names)
        elif action == "pause":
            process.pause()
            poll()  # what was generated before
            paused = True
        else:
            process.resume()
            paused = False
    paused = False
    process.resume()
    while len(process.outstanding):
        poll()
    poll()
    assert answers.keys() == requests.keys()


def test_what_is_generated_after_a_death_carries_the_version_that_was_loaded() -> None:
    process = start(repeat(False))
    process.load(7)
    process.child.alive = False
    process.submit([ask("a"), ask("b")])
    results = process.poll(None)
    while len(process.outstanding):
        results += process.poll(None)
    assert [result.versions.tolist() for result in results] == [[7], [7]]
    assert process.child.starts == 2


def test_what_it_had_sent_before_it_died_is_kept() -> None:
    process = start(repeat(False))
    process.load(1)
    process.submit([ask("a")])
    process.child.alive = False
    process.load(2)
    assert [result.versions.tolist() for result in process.poll(None)] == [[1]]
    assert process.child.starts == 2


def test_a_paused_process_is_paused_again() -> None:
    process = start(repeat(False))
    process.pause()
    process.submit([ask("a")])
    process.child.alive = False
    assert process.poll(None) == []
    assert (process.child.starts, process.child.paused, len(process.outstanding)) == (2, True, 1)
    process.resume()
    assert [result.request_id for result in process.poll(None)] == ["a"]


def test_a_request_that_is_to_be_aborted_when_it_dies_is_aborted() -> None:
    process = start(repeat(False))
    process.pause()
    process.submit([ask("a"), ask("b")])
    process.child.alive = False
    process.abort(["a"])
    assert [(result.request_id, result.finish_reason) for result in process.poll(None)] == [("a", "abort")]
    process.resume()
    assert [(result.request_id, result.finish_reason) for result in process.poll(None)] == [("b", "length")]


@pytest.mark.parametrize("most", [0, 1, 3])
def test_it_is_given_up_after_that_many_restarts_in_a_row(most: int, caplog: pytest.LogCaptureFixture) -> None:
    process = start(repeat(True), max_restarts=most)
    caplog.set_level(logging.WARNING)
    with pytest.raises(EngineError, match=r"^the test's process stopped: killed.*\(log: here\)$") as caught:
        process.submit([ask("a")])
    assert (f"it died {most + 1} times in a row (max_restarts {most})" in str(caught.value)) == (most > 0)
    assert process.child.starts == 1 + most
    assert len(caplog.records) == most
    assert all("\n" not in record.getMessage() for record in caplog.records)


def test_a_completion_ends_the_row_of_deaths() -> None:
    process = start(repeat(False), max_restarts=1)
    for i in range(5):
        process.child.alive = False
        process.submit([ask(f"{i}")])
        assert len(process.poll(None)) == 1
    process.child.alive = False
    process.pause()
    process.child.alive = False
    with pytest.raises(EngineError, match="2 times in a row"):
        process.resume()


def test_the_first_process_is_not_started_again() -> None:
    child = FragileChild(iter([False, True]))
    process = EngineProcess(child, "settings", 1.0, max_restarts=3)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="killed"):
        process.wait_until_ready()
    assert child.starts == 1


def test_without_the_weights_in_force_it_is_given_up_until_the_next_load() -> None:
    process = start(repeat(False))
    process.load(1)
    process.forget_weights("they are half-written")
    process.submit([ask("a")])
    assert [result.versions.tolist() for result in process.poll(None)] == [[1]]
    process.load(2)
    process.child.alive = False
    process.submit([ask("b")])
    assert [result.versions.tolist() for result in process.poll(None)] == [[2]]
    process.forget_weights("they are half-written")
    process.child.alive = False
    with pytest.raises(EngineError, match="cannot be started again: they are half-written"):
        process.submit([ask("c")])


def test_a_process_that_does_not_answer_is_replaced() -> None:
    process = start(repeat(False))
    restart, process.child.send = process.child.send, lambda kind, value=None: None
    process.child.restart = lambda: (process.child._begin(), setattr(process.child, "send", restart))
    process.pause()
    assert (process.child.starts, process.child.paused) == (2, True)
