"""What an arrival costs the stream does not grow with the number of groups: counted, not timed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import pytest
from transformers import PreTrainedTokenizerBase

from dppo_lightning.base.records import Completion, Prompt
from dppo_lightning.generate import pool
from dppo_lightning.generate.engine import Failed, Sampling
from dppo_lightning.generate.flight import GroupFlight
from dppo_lightning.generate.schedule import Schedule, Selection, Streaming, Window
from dppo_lightning.generate.scripted import ScriptedEngine
from dppo_lightning.generate.stream import RolloutStream
from dppo_lightning.reward.base import Sample
from tests.helpers.rewards import Scored, score_at_once
from tests.helpers.streams import give_weights, make_stream

SAMPLES = 2


class OneByOne(ScriptedEngine):
    """Delivers one result a call."""

    def __init__(self) -> None:
        super().__init__(vocabulary=90)
        self.ready: deque[Completion | Failed] = deque()

    def poll(self, timeout: float | None = None) -> list[Completion | Failed]:
        self.ready.extend(super().poll(timeout))
        return [self.ready.popleft()] if self.ready else []


def parity(sample: Sample) -> float:
    return float(sum(map(ord, sample.completion)) // 20 % 2)


class Watched(GroupFlight):
    """Counts how often anything is asked of a group."""

    looks = 0

    def __getattribute__(self, name: str) -> object:
        Watched.looks += 1
        return super().__getattribute__(name)


class Counted(Schedule):
    """Counts the rollouts that are looked at."""

    looks = 0

    def upcoming(self, step: int) -> Iterator[Window]:
        for window in super().upcoming(step):
            Counted.looks += 1
            yield window


def begin(
    tokenizer: PreTrainedTokenizerBase, schedule: Schedule, streaming: Streaming, selection: Selection
) -> RolloutStream:
    stream = make_stream(
        OneByOne(),
        tokenizer,
        [Prompt(f"train/{i}", (1 + i % 90,), "?") for i in range(100)],
        reward=Scored(parity),
        sampling=Sampling(max_new_tokens=4),
        samples_per_prompt=SAMPLES,
        schedule=schedule,
        streaming=streaming,
        selection=selection,
    )
    return score_at_once(stream)  # so that no thread decides how often the stream looks


@pytest.mark.parametrize("streaming", [Streaming(), Streaming(1), Streaming(1, "drop")], ids=["0", "1", "1, drop"])
@pytest.mark.parametrize("selection", [Selection(), Selection(resampling=1.0)], ids=["all", "resampled"])
def test_an_arrival_looks_at_as_many_groups_whatever_their_number(
    streaming: Streaming,
    selection: Selection,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool, "GroupFlight", Watched)

    def looks_per_completion(groups: int) -> float:
        stream = begin(tokenizer, Schedule(groups, 1, max_steps=2), streaming, selection)
        before, told = Watched.looks, []
        rollout = stream.next_rollout(0, lambda done, total: told.append((done, total)))
        assert len(rollout.groups) > groups // 4
        assert len(told) >= groups * SAMPLES
        return (Watched.looks - before) / len(told)

    few, many = looks_per_completion(10), looks_per_completion(300)
    assert many < 1.5 * few


@pytest.mark.parametrize("late", ["wait", "drop"])
def test_the_end_of_a_long_run_is_not_looked_at(late: str, tokenizer: PreTrainedTokenizerBase) -> None:
    schedule = Counted(prompts_per_step=2, steps_per_rollout=1, max_steps=10**9)
    stream = begin(tokenizer, schedule, Streaming(3, late), Selection())  # type: ignore[arg-type]
    Counted.looks = 0
    give_weights(stream, 0)
    assert len(stream.next_rollout(0).groups) == 2
    assert Counted.looks < 20
