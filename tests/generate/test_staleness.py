"""Generation runs ahead of training, within the bound: the stream on a scripted engine with a clock of its own."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from dppo_lightning.base.errors import ConfigError, EngineError, RewardError, SyncError
from dppo_lightning.base.records import Completion, Prompt
from dppo_lightning.generate.engine import EngineSpec, Failed, Request, Sampling
from dppo_lightning.generate.flight import GroupFlight
from dppo_lightning.generate.schedule import Schedule, Selection, Streaming
from dppo_lightning.generate.scripted import ScriptedEngine
from dppo_lightning.generate.stream import Rollout, RolloutStream
from dppo_lightning.reward.base import RewardFunction, Sample
from dppo_lightning.reward.rewarding import Rewarding
from dppo_lightning.train.datamodule import RolloutDataModule
from tests.helpers.models import END
from tests.helpers.rewards import Failing, Scored, Waiting, score_at_once
from tests.helpers.streams import give_weights, make_stream, numbered_prompts, shuffled

PROMPTS = numbered_prompts(5)
SAMPLES = 2


def distinct_characters(sample: Sample) -> float:
    return float(len(set(sample.completion)))


def by(of: Callable[[Sample], float] = distinct_characters) -> Scored:
    return Scored(of)


@dataclass
class Training:
    """A training loop without a policy: takes rollouts, lets time pass, gives the engine new weights."""

    stream: RolloutStream
    engine: ScriptedEngine
    steps: int
    train_seconds: Sequence[float]
    rollouts: list[Rollout] = field(default_factory=list)
    most_in_flight: int = 0
    most_groups: int = 0

    def run(self) -> list[Rollout]:
        seconds = itertools.cycle(self.train_seconds)
        step = 0
        while step < self.steps:
            self.sync(step)
            rollout = self.stream.next_rollout(step)
            self.rollouts.append(rollout)
            for _ in range(rollout.window.steps):
                self.engine.advance(next(seconds))
                self.look()
                self.stream.pump()
                self.look()
            step += rollout.window.steps
        return self.rollouts

    def sync(self, version: int) -> None:
        give_weights(self.stream, version)
        self.look()

    def look(self) -> None:
        self.most_in_flight = max(self.most_in_flight, self.stream.inbox.in_flight)
        self.most_groups = max(self.most_groups, len(self.stream.pool))


@pytest.fixture(scope="module")
def begin(tokenizer: PreTrainedTokenizerBase) -> Callable[..., Training]:
    def make(
        delays: Sequence[float] = (0.0,),
        train_seconds: Sequence[float] = (1.0,),
        steps: int = 6,
        prompts: int = 3,
        steps_per_rollout: int = 1,
        streaming: Streaming = Streaming(),  # noqa: B008
        selection: Selection = Selection(),  # noqa: B008
        reward: RewardFunction | None = None,
        **changes: Any,
    ) -> Training:
        each = itertools.cycle(delays)
        engine = ScriptedEngine(vocabulary=95, delay=lambda request: next(each), **changes)
        stream = make_stream(
            engine,
            tokenizer,
            PROMPTS,
            reward=reward or by(),
            samples_per_prompt=SAMPLES,
            schedule=Schedule(prompts, steps_per_rollout, steps),
            streaming=streaming,
            selection=selection,
        )
        if isinstance(stream.worker.reward, Scored):
            score_at_once(stream)  # so that a schedule decides everything
        return Training(stream, engine, steps, train_seconds)

    return make


delays = st.lists(st.floats(0, 20), min_size=1, max_size=9)
trains = st.lists(st.floats(0, 10), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(
    delays=delays,
    train_seconds=trains,
    ahead=st.integers(0, 3),
    steps_per_rollout=st.integers(1, 2),
    late=st.sampled_from(["wait", "drop"]),
    partial=st.sampled_from(["keep", "discard"]),
    oversampling=st.sampled_from([0.0, 0.7]),
    resampling=st.sampled_from([0.0, 1.0]),
)
def test_no_token_is_older_than_the_bound_and_the_queue_is_bounded(
    begin: Any,
    delays: list[float],
    train_seconds: list[float],
    ahead: int,
    steps_per_rollout: int,
    late: Any,
    partial: Any,
    oversampling: float,
    resampling: float,
) -> None:
    bound = ahead * steps_per_rollout
    training = begin(
        delays,
        train_seconds,
        steps_per_rollout=steps_per_rollout,
        streaming=Streaming(bound, late, partial),
        selection=Selection(resampling, oversampling),
        reward=by(lambda sample: float(sample.completion[:1] > "P")),
    )
    rollouts = training.run()
    assert sum(rollout.window.steps for rollout in rollouts) == 6
    for rollout in rollouts:
        versions = [c.versions for group in rollout.groups for c in group.completions]
        assert all(rollout.window.start - bound <= v.min() and v.max() <= rollout.window.start for v in versions)
        assert all((np.diff(v) >= 0).all() for v in versions)
        assert all(len(group.completions) == SAMPLES for group in rollout.groups)
        assert len(rollout.groups) <= rollout.window.prompts
        if not resampling:
            assert len(rollout.groups) == rollout.window.prompts
    serials = [int(c.request_id.split("/")[1]) for r in rollouts for group in r.groups for c in group.completions[:1]]
    assert len(set(serials)) == len(serials)  # no group is trained on twice
    if late == "wait":
        assert serials == sorted(serials) or resampling
    most = (1 + ahead) * int(np.ceil(3 * steps_per_rollout * (1 + oversampling)))
    assert training.most_groups <= most
    assert training.most_in_flight <= most * SAMPLES


@settings(max_examples=25, deadline=None)
@given(delays=delays, other=delays, ahead=st.integers(0, 2))
def test_when_a_step_waits_nothing_is_lost_and_the_order_does_not_depend_on_time(
    begin: Any, delays: list[float], other: list[float], ahead: int
) -> None:
    def trained(delays: list[float]) -> list[Any]:
        rollouts = begin(delays, streaming=Streaming(ahead)).run()
        return [[g.prompt.id for g in r.groups] for r in rollouts]

    assert trained(delays) == trained(other)
    assert list(itertools.chain(*trained(delays))) == [prompt.id for prompt in shuffled(PROMPTS).draw(18)]


@settings(max_examples=25, deadline=None)
@given(delays=delays, other=delays, resampling=st.sampled_from([0.0, 0.5, 2.0]))
def test_on_policy_everything_repeats_whatever_finishes_first(
    begin: Any, delays: list[float], other: list[float], resampling: float
) -> None:
    def trained(delays: list[float]) -> list[Any]:
        training = begin(
            delays, selection=Selection(resampling), reward=by(lambda sample: float(sample.completion[:1] > "P"))
        )
        return [
            [
                (g.prompt.id, g.texts, [row["advantage"] for row in g.records()], [c.request_id for c in g.completions])
                for g in r.groups
            ]
            for r in training.run()
        ]

    assert trained(delays) == trained(other)


def test_generation_goes_on_while_the_policy_trains(begin: Any) -> None:
    """A second a completion, a second a step: taking turns takes two seconds a step, side by side one."""

    def seconds(ahead: int) -> float:
        training = begin([1.0], [1.0], steps=10, streaming=Streaming(ahead))
        training.run()
        return training.engine.now

    assert seconds(0) == pytest.approx(20)
    assert seconds(1) == pytest.approx(11)  # the first rollout has nothing to overlap with


def test_an_update_meets_completions_half_way(begin: Any) -> None:
    """Six tokens in three seconds, new weights each second: two tokens with each version."""
    training = begin([3.0], [1.0], steps=5, prompts=1, streaming=Streaming(3))
    rollouts = training.run()
    versions = [c.versions.tolist() for r in rollouts for g in r.groups for c in g.completions]
    assert [0, 0, 1, 1, 2, 2] in versions or [1, 1, 2, 2, 3, 3] in versions
    discarded = begin([3.0], [1.0], steps=5, prompts=1, streaming=Streaming(3, partial="discard")).run()
    assert all(len(set(c.versions.tolist())) == 1 for r in discarded for g in r.groups for c in g.completions)


def test_a_refused_update_loses_no_completion_that_it_interrupted(begin: Any) -> None:
    training = begin([1.0], streaming=Streaming(1, partial="discard"))
    training.sync(0)
    window = next(training.stream.schedule.upcoming(0))
    training.stream.generate(window)
    with pytest.raises(SyncError), training.stream.updating(1):
        raise SyncError("refused")
    assert training.stream.pool.version == 0
    assert len(training.stream.next_rollout(0).groups) == 3


def test_a_straggler_is_dropped_when_it_has_become_too_old(begin: Any) -> None:
    """One completion takes a hundred seconds. A step that waits takes as long; else others go first."""
    delays = [0.5] * 8 + [100.0] + [0.5] * 100
    waiting = begin(delays, [1.0], streaming=Streaming(1))
    waiting.run()
    dropping = begin(delays, [1.0], streaming=Streaming(1, late="drop"))
    rollouts = dropping.run()
    assert [len(rollout.groups) for rollout in rollouts] == [3] * 6
    assert sum(rollout.counts["stream/stale"] for rollout in rollouts) > 0
    assert dropping.engine.now < 50 < 100 < waiting.engine.now


def test_oversampling_aborts_the_stragglers(begin: Any) -> None:
    training = begin([1, 1, 1, 1, 1, 1, 50, 50], steps=2, selection=Selection(oversampling=0.3))
    first, second = training.run()
    assert (len(first.groups), len(second.groups)) == (3, 3)
    assert first.counts["stream/aborted"] == 2  # four groups of two were asked
    assert training.engine.now < 50


def test_groups_without_signal_are_replaced_up_to_the_bound(begin: Any) -> None:
    flat = by(lambda sample: 1.0)
    first, *_ = begin(steps=1, selection=Selection(resampling=2.0), reward=flat).run()
    assert first.groups == []
    assert (first.counts["stream/without_signal"], first.counts["stream/resampled"]) == (9, 6)
    calls = itertools.count()
    first, *_ = begin(
        steps=1, selection=Selection(resampling=2.0), reward=by(lambda sample: float(max(3, next(calls))))
    ).run()
    assert len(first.groups) == 3
    assert all(np.ptp(group.rewards) > 0 for group in first.groups)


def test_rewards_that_differ_by_less_than_a_millionth_are_no_signal(begin: Any) -> None:
    def groups(step: float) -> int:
        order = itertools.count()
        reward = by(lambda sample: 1.0 + step * (next(order) % 2))
        return len(begin(steps=1, selection=Selection(resampling=0.1), reward=reward).run()[0].groups)

    assert (groups(5e-7), groups(2e-6)) == (0, 3)


def test_overlong_completions_are_penalised_on_request(begin: Any) -> None:
    rollout, *_ = begin(
        steps=1, selection=Selection(overlong="penalise", overlong_penalty=0.25), reward=by(lambda s: 1.0)
    ).run()
    assert {float(reward) for group in rollout.groups for reward in group.rewards} == {0.75}
    assert {float(part) for group in rollout.groups for part in group.reward_parts["overlong"]} == {-0.25}


def test_a_sampler_is_told_of_every_group(begin: Any) -> None:
    training = begin(
        steps=2, selection=Selection(resampling=1.0), reward=by(lambda sample: float(sample.prompt == "*1"))
    )
    told: list[tuple[str, float]] = []
    training.stream.sampler.record = lambda prompt, rate: told.append((prompt.text, rate))
    rollouts = training.run()
    without = sum(rollout.counts["stream/without_signal"] for rollout in rollouts)
    assert len(told) == without
    assert {rate for text, rate in told if text == "*1"} <= {1.0}
    assert {rate for text, rate in told if text != "*1"} == {0.0}


def test_groups_in_flight_are_begun_again_after_an_interruption(begin: Any) -> None:
    def begun(training: Training) -> set[Any]:
        return {(request.id, request.seed) for request in training.engine.in_flight}

    first = begin([*[5.0] * 6, 50.0], streaming=Streaming(2))
    first.sync(0)
    first.stream.next_rollout(0)
    before, state = begun(first), first.stream.state_dict()
    second = begin([5.0], streaming=Streaming(2))
    second.stream.load_state_dict(state, 1)
    give_weights(second.stream, 1)
    second.stream.generate(next(second.stream.schedule.upcoming(1)))
    assert before
    assert before <= begun(second)


def test_a_checkpoint_of_other_prompts_is_refused(begin: Any) -> None:
    flight = GroupFlight(0, Prompt("train/99", (1,), "?"), rollout=0)
    state = begin().stream.state_dict() | {"flights": [flight.state_dict()]}
    with pytest.raises(ConfigError, match=r"other prompts: 'train/99' is not among data\.prompts"):
        begin().stream.load_state_dict(state, 0)


def test_a_reward_that_takes_long_does_not_stop_generation(begin: Any) -> None:
    """The reward of the first group waits until the whole next rollout has been generated."""
    generated = threading.Event()
    training = begin([1.0], streaming=Streaming(2), reward=Waiting(generated))
    training.sync(0)
    stream, engine = training.stream, training.engine
    window = next(stream.schedule.upcoming(0))
    stream.generate(window)
    for _ in range(20):
        engine.advance(1.0)
        stream.pump()
    assert stream.inbox.in_flight == 0  # the groups of three rollouts, and not one is rewarded
    assert len(stream.pool) == 9
    assert not any(flight.settled for flight in stream.pool)
    generated.set()
    assert len(stream.next_rollout(0).groups) == 3
    stream.close()


def test_a_reward_that_never_returns_stops_the_run(begin: Any) -> None:
    for_ever = threading.Event()
    training = begin(reward=Waiting(for_ever))
    training.stream.worker.settings = Rewarding(isolation="none", timeout=0.05)
    with pytest.raises(RewardError, match=r"Waiting has taken longer than data\.rewarding\.timeout=0\.05 s"):
        training.run()
    for_ever.set()


def test_what_a_reward_raises_on_its_thread_reaches_the_caller(begin: Any) -> None:
    with pytest.raises(RewardError, match=r"6 of 6 completions.*rewards\.py:\d+: ZeroDivisionError: no"):
        begin(reward=Failing(ZeroDivisionError("no"))).run()


def test_the_bound_is_checked_beside_being_kept(begin: Any) -> None:
    class Liar(ScriptedEngine):
        """Answers with weights of long ago."""

        def poll(self, timeout: float | None = None) -> list[Completion | Failed]:
            found = super().poll(timeout)
            return [replace(one, versions=one.versions - 5) for one in found if isinstance(one, Completion)]

    training = begin()
    liar = Liar(vocabulary=95)
    liar.start(EngineSpec("none", stop_token_ids=(END,)))
    training.stream.inbox.engine = training.engine = liar
    with pytest.raises(EngineError, match=r"is 5 steps old at step 0, above data\.streaming.max_staleness=0"):
        training.run()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (lambda: Streaming(-1), "max_staleness must be >= 0, got -1"),
        (lambda: Selection(resampling=-1), "resampling must be >= 0"),
        (lambda: Selection(oversampling=float("inf")), "oversampling must be >= 0 and finite"),
        (lambda: Selection(overlong_penalty=float("nan")), "overlong_penalty must be >= 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: Callable[[], object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        settings()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (
            {"streaming": Streaming(2), "steps_per_rollout": 4},
            "max_staleness=2 with data.steps_per_rollout=4 never lets generation run ahead: set it to 0, or to 4",
        ),
        ({"selection": Selection(1.0), "samples_per_prompt": 1}, "resampling needs data.samples_per_prompt >= 2"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(data: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        RolloutDataModule(None, by(), ScriptedEngine(), **data)  # type: ignore[arg-type]


def test_an_engine_may_not_deliver_what_was_not_asked(begin: Any) -> None:
    training = begin()
    training.sync(0)
    training.engine.submit([Request("stray", (1, 2), Sampling(max_new_tokens=1), 0)])
    with pytest.raises(EngineError, match="delivered 'stray', which is not in flight"):
        training.stream.next_rollout(0)
