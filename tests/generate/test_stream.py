"""Generate, reward, advantage: the stream on an engine that answers from a script."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from dppo_lightning.base.errors import ConfigError, EngineError, RewardError
from dppo_lightning.base.records import Group, Prompt
from dppo_lightning.generate.engine import Request, Sampling
from dppo_lightning.generate.flight import derive_seed
from dppo_lightning.generate.schedule import Schedule
from dppo_lightning.generate.scripted import ScriptedEngine
from dppo_lightning.generate.stream import Rollout, RolloutStream
from dppo_lightning.prompts.sampler import Shuffled
from dppo_lightning.reward.base import Sample, Score
from tests.helpers.models import END
from tests.helpers.rewards import Scored
from tests.helpers.streams import give_weights, make_stream, numbered_prompts, shuffled

PROMPTS = numbered_prompts(6)
SAMPLING = Sampling(max_new_tokens=5)


class Spy(ScriptedEngine):
    """Keeps the requests that it was given."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.requests: list[Request] = []

    def submit(self, requests: Sequence[Request]) -> None:
        self.requests.extend(requests)
        super().submit(requests)


def take(stream: RolloutStream, step: int = 0, progress: Any = None) -> Rollout:
    """The rollout of a step, generated with that step's weights."""
    give_weights(stream, step)
    return stream.next_rollout(step, progress)


@pytest.fixture(scope="module")
def stream_of(tokenizer: PreTrainedTokenizerBase) -> Callable[..., RolloutStream]:
    """A stream of six prompts, four a rollout, three samples each, on a started engine."""

    def make(engine: ScriptedEngine | None = None, prompts: int = 4, **changes: Any) -> RolloutStream:
        arguments: dict[str, Any] = {
            "reward": Scored(lambda sample: float(len(set(sample.completion)))),
            "sampling": SAMPLING,
            "samples_per_prompt": 3,
            "schedule": Schedule(prompts, steps_per_rollout=1, max_steps=100),
        }
        return make_stream(engine or Spy(vocabulary=95), tokenizer, PROMPTS, **(arguments | changes))

    return make


def contents(groups: list[Group]) -> list[Any]:
    """Everything that a rollout's groups say, comparable."""
    return [
        (
            dataclasses.astuple(group.prompt),
            [(c.request_id, c.token_ids.tolist(), c.logp.tolist(), c.finish_reason) for c in group.completions],
            group.texts,
            np.asarray(group.rewards).tolist(),
            [row["advantage"] for row in group.records()],
        )
        for group in groups
    ]


def spelled(text: str) -> list[int]:
    """Token ids of a text: the character tokenizer starts at the space."""
    return [ord(character) - 32 for character in text]


def test_every_prompt_is_asked_as_often_as_wanted_and_nothing_is_asked_twice(stream_of: Any) -> None:
    stream = stream_of()
    rollouts = [take(stream, step) for step in range(2)]
    requests = stream.inbox.engine.requests
    assert len({request.id for request in requests}) == len({request.seed for request in requests}) == 2 * 4 * 3
    assert all(0 <= request.seed < 2**63 for request in requests)
    assert all(request.sampling == SAMPLING for request in requests)
    groups = [group for rollout in rollouts for group in rollout.groups]
    asked = [request.prompt_token_ids for request in requests]
    assert asked == [group.prompt.token_ids for group in groups for _ in range(3)]
    assert [list(mine) for _, mine in itertools.groupby(request.group for request in requests)] == [
        [request.group] * 3 for request in requests[::3]
    ]


def test_a_pool_smaller_than_a_rollout_gives_a_prompt_twice_with_other_seeds(stream_of: Any) -> None:
    stream = stream_of(prompts=2, sampler=shuffled(PROMPTS[:1]))
    first, second = take(stream).groups
    assert first.prompt == second.prompt
    assert [c.token_ids.tolist() for c in first.completions] != [c.token_ids.tolist() for c in second.completions]


def test_the_same_seed_gives_the_same_rollouts_and_another_seed_others(stream_of: Any) -> None:
    def three(seed: int) -> list[Any]:
        stream = stream_of(seed=seed)
        return [contents(take(stream, step).groups) for step in range(3)]

    assert three(1) == three(1)
    mine, other = three(1), three(2)
    assert [group[0] for group in mine[0]] == [group[0] for group in other[0]]  # the prompt order is the sampler's
    for a, b in zip(itertools.chain(*mine), itertools.chain(*other), strict=True):
        assert [c[1] for c in a[1]] != [c[1] for c in b[1]]


@given(
    st.tuples(st.integers(0, 2**32), st.sampled_from(["train/0", "train/1"]), st.integers(0, 9), st.integers(0, 9)),
    st.tuples(st.integers(0, 2**32), st.sampled_from(["train/0", "train/1"]), st.integers(0, 9), st.integers(0, 9)),
)
def test_a_seed_depends_on_every_part_and_on_nothing_else(a: tuple[object, ...], b: tuple[object, ...]) -> None:
    assert 0 <= derive_seed(*a) < 2**63
    assert (derive_seed(*a) == derive_seed(*b)) == (a == b)


def test_seeds_do_not_change_between_processes() -> None:
    digest = hashlib.blake2b(b"(0, 'train/0', 0, 'train/17', 2)", digest_size=8).hexdigest()
    assert derive_seed(0, "train/0", 0, "train/17", 2) == int(digest, 16) // 2


@settings(deadline=None)
@given(st.permutations(range(12)))
def test_groups_are_in_prompt_order_whatever_finishes_first(stream_of: Any, order: list[int]) -> None:
    place = {f"train/{index}/{sample}": index * 3 + sample for index in range(4) for sample in range(3)}
    at_once = take(stream_of(Spy(vocabulary=95)))
    late = take(stream_of(Spy(vocabulary=95, delay=lambda request: 1.0 + order[place[request.id]])))
    assert contents(late.groups) == contents(at_once.groups)


def test_progress_counts_up_to_what_was_asked(stream_of: Any) -> None:
    seen: list[tuple[int, int]] = []
    order = itertools.count(1)
    engine = Spy(vocabulary=95, delay=lambda request: float(next(order)))
    take(stream_of(engine, prompts=2), progress=lambda done, total: seen.append((done, total)))
    assert sorted(seen) == seen
    assert {done for done, _ in seen} >= {1, 2, 3, 4, 5, 6}
    assert {total for _, total in seen} == {6}


def test_failed_requests_shrink_their_group_and_are_counted(stream_of: Any) -> None:
    drawn = shuffled(PROMPTS).draw(4)
    failures = {"train/1/0": "too long", **{f"train/2/{sample}": "too long" for sample in range(3)}}
    rollout = take(stream_of(Spy(vocabulary=95, failures=failures)))
    assert rollout.failed == 4
    assert [group.prompt for group in rollout.groups] == [drawn[0], drawn[1], drawn[3]]
    assert [[c.request_id for c in group.completions] for group in rollout.groups] == [
        ["train/0/0", "train/0/1", "train/0/2"],
        ["train/1/1", "train/1/2"],
        ["train/3/0", "train/3/1", "train/3/2"],
    ]
    for group in rollout.groups:
        assert len(group.texts) == len(group.rewards) == len(group.advantages) == len(group.completions)
    assert rollout.tokens == 8 * 5


def test_when_nothing_can_be_served_the_reason_is_told(stream_of: Any) -> None:
    failures = {f"train/{index}/{sample}": "the moon is full" for index in range(2) for sample in range(3)}
    with pytest.raises(EngineError, match="none of 6 requests: the moon is full"):
        take(stream_of(Spy(vocabulary=95, failures=failures), prompts=2))


def test_an_engine_that_dies_half_way_is_an_error(stream_of: Any) -> None:
    with pytest.raises(EngineError, match="died"):
        take(stream_of(Spy(vocabulary=95, dies_after=3), prompts=2))


def test_an_engine_that_loses_a_request_is_an_error_and_no_endless_wait(stream_of: Any) -> None:
    class Forgetful(ScriptedEngine):
        def submit(self, requests: Sequence[Request]) -> None:
            super().submit(requests[1:])

    with pytest.raises(EngineError, match="lost 2 requests, 'train/0/0' among them"):
        take(stream_of(Forgetful(vocabulary=95), prompts=2))


def test_each_reward_belongs_to_its_completion(stream_of: Any) -> None:
    """The script writes prompt and sample into the completion; the reward reads them back."""

    def script(request: Request, version: int) -> tuple[Sequence[int], Sequence[float]]:
        text = f"{request.prompt_token_ids[0]}{request.id[-1]}"
        return [*spelled(text), END], [-1.0] * (len(text) + 1)

    order = itertools.count(20, -1)
    reward = Scored(lambda sample: float(sample.completion))
    engine = Spy(script=script, delay=lambda request: float(next(order)))
    groups = take(stream_of(engine, reward=reward)).groups
    for group in groups:
        first = 10 * group.prompt.token_ids[0]
        assert np.asarray(group.rewards).tolist() == [first, first + 1, first + 2]
        assert [row["advantage"] for row in group.records()] == [-1, 0, 1]
        assert group.texts == [str(first), str(first + 1), str(first + 2)]
    samples = sorted(reward.seen, key=lambda sample: float(sample.completion))
    groups = sorted(groups, key=lambda group: group.texts)
    assert [sample.prompt for sample in samples] == [group.prompt.text for group in groups for _ in range(3)]
    assert [sample.answer for sample in samples] == [group.prompt.answer for group in groups for _ in range(3)]
    assert [sample.columns for sample in samples] == [group.prompt.columns for group in groups for _ in range(3)]


@pytest.mark.parametrize(("tokens", "text", "finished"), [([33, 34, END], "AB", True), ([33] * 9, "AAAAA", False)])
def test_a_reward_sees_text_without_special_tokens_and_whether_it_ended(
    tokens: list[int], text: str, finished: bool, stream_of: Any
) -> None:
    reward = Scored(lambda sample: 0.0)
    take(stream_of(Spy(script=lambda *_: (tokens, [-1.0] * len(tokens))), prompts=1, reward=reward))
    assert {(sample.completion, sample.finished) for sample in reward.seen} == {(text, finished)}


def test_reward_parts_are_nan_where_they_were_not_reported(stream_of: Any) -> None:
    def score(sample: Sample) -> float | Score:
        kind = next(kinds)
        return (0.25, Score(1.0, {"format": 0.5}), Score(2.0, {"format": 0.1, "length": 3.0}))[kind]

    kinds = itertools.cycle([0, 1, 2])
    groups = take(stream_of(prompts=2, reward=Scored(score))).groups
    for group in groups:
        assert np.asarray(group.rewards).tolist() == [0.25, 1.0, 2.0]
        assert set(group.reward_parts) == {"format", "length"}
        np.testing.assert_equal(group.reward_parts["format"], np.array([np.nan, 0.5, 0.1]))
        np.testing.assert_equal(group.reward_parts["length"], np.array([np.nan, np.nan, 3.0]))
        assert [row["parts"]["length"] for row in group.records()] == [None, None, 3.0]


def test_a_reward_that_is_no_number_is_refused(stream_of: Any) -> None:
    with pytest.raises(RewardError, match="Scored"):
        take(stream_of(reward=Scored(lambda sample: float("nan"))))


def test_a_penalty_lowers_the_advantage_and_not_the_reward(stream_of: Any) -> None:
    def penalty(groups: list[Group]) -> list[np.ndarray]:
        assert all(group.rewards is not None for group in groups)
        return [np.arange(3.0) * (1 + int(group.prompt.answer or 0)) for group in groups]

    groups = take(stream_of(reward=Scored(lambda sample: 4.0), penalty=penalty)).groups
    for group in groups:
        factor = 1 + int(group.prompt.answer or 0)
        assert np.asarray(group.rewards).tolist() == [4, 4, 4]
        assert [row["advantage"] for row in group.records()] == [factor, 0, -factor]


def test_held_out_sampling_disturbs_neither_seeds_nor_prompt_order(stream_of: Any) -> None:
    def rollouts(evaluate: bool) -> list[Any]:
        stream, found = stream_of(), []
        for step in range(3):
            if evaluate:
                stream.sample(PROMPTS[:2], 2, Sampling(max_new_tokens=3, temperature=0), "heldout")
            found.append(contents(take(stream, step).groups))
        return found

    assert rollouts(evaluate=True) == rollouts(evaluate=False)


def test_two_evaluations_of_one_policy_are_equal(stream_of: Any) -> None:
    stream = stream_of()
    texts = []
    for _ in range(2):
        take(stream)  # at step 0 both times: the script answers by weight version
        texts.append([group.texts for group in stream.sample(PROMPTS, 2, SAMPLING, "heldout")])
    assert texts[0] == texts[1]


class Dry(Shuffled):
    """Runs dry, or gives something else than what was asked for."""

    def __init__(self, gives: Callable[[list[Prompt]], Any]) -> None:
        super().__init__()
        self.gives = gives

    def draw(self, count: int) -> list[Prompt]:
        return self.gives(super().draw(count))


def stop(prompts: list[Prompt]) -> list[Prompt]:
    raise StopIteration


@pytest.mark.parametrize(
    ("gives", "reason"),
    [
        (lambda prompts: prompts[:1], r"Dry.draw\(4\) gave 1 prompts: a sampler gives as many as it is asked for"),
        (lambda prompts: [], r"Dry.draw\(4\) gave 0 prompts"),
        (lambda prompts: [*prompts, prompts[0]], r"Dry.draw\(4\) gave 5 prompts"),
        (stop, r"Dry.draw\(4\) gave 0 prompts"),
        (lambda prompts: None, r"Dry.draw\(4\) must return a list of prompts, got NoneType"),
        (iter, r"must return a list of prompts, got list_iterator"),
        (lambda prompts: [prompt.text for prompt in prompts], "must return a list of prompts, got a list with str"),
        (lambda prompts: [*prompts[:3], None], "must return a list of prompts, got a list with NoneType"),
    ],
)
def test_a_sampler_that_does_not_give_what_it_is_asked_for_is_refused(
    gives: Callable[[list[Prompt]], Any], reason: str, stream_of: Any
) -> None:
    sampler = Dry(gives)
    sampler.start(PROMPTS, 0)
    with pytest.raises(ConfigError, match=reason):
        take(stream_of(sampler=sampler))


def test_a_sampler_that_runs_dry_later_is_refused_then(stream_of: Any) -> None:
    sampler = Dry(lambda prompts: prompts if sampler.drawn <= 8 else prompts[1:])
    sampler.start(PROMPTS, 0)
    stream = stream_of(sampler=sampler)
    assert [len(take(stream, step).groups) for step in range(2)] == [4, 4]
    with pytest.raises(ConfigError, match=r"Dry.draw\(4\) gave 3 prompts"):
        take(stream, 2)


@settings(deadline=None, max_examples=20)
@given(done=st.integers(0, 4), prompts=st.integers(1, 8))
def test_a_restored_stream_goes_on_as_the_first_would_have(stream_of: Any, done: int, prompts: int) -> None:
    first = stream_of(prompts=prompts)
    for step in range(done):
        take(first, step)
    state = first.state_dict()
    rest = [contents(take(first, step).groups) for step in range(done, 5)]
    second = stream_of(prompts=prompts)
    second.load_state_dict(state, done)
    assert [contents(take(second, step).groups) for step in range(done, 5)] == rest
