"""Prompt samplers: every prompt once a pass, or those that teach most; and a place that can be restored."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.base.records import Prompt
from dppo_lightning.prompts import PassRateCurriculum, Shuffled

PROMPTS = [Prompt(f"train/{i}", (i,), str(i)) for i in range(7)]


def shuffled(seed: int) -> Shuffled:
    sampler = Shuffled()
    sampler.start(PROMPTS, seed)
    return sampler


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(0, 20), max_size=6), seed=st.integers(0, 100))
def test_every_prompt_comes_once_a_pass_however_it_is_drawn(counts: list[int], seed: int) -> None:
    sampler = shuffled(seed)
    drawn = [prompt.id for count in counts for prompt in sampler.draw(count)]
    assert drawn == [prompt.id for prompt in shuffled(seed).draw(sum(counts))]
    for start in range(0, len(drawn) - 6, 7):
        assert sorted(drawn[start : start + 7]) == [prompt.id for prompt in PROMPTS]


def test_passes_and_seeds_have_orders_of_their_own() -> None:
    ids = [prompt.id for prompt in shuffled(0).draw(14)]
    assert ids[:7] != ids[7:]
    assert ids[:7] != [prompt.id for prompt in shuffled(1).draw(7)]


def test_the_order_of_a_pass_is_drawn_once_however_often_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    original = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: (made.append(seed), original(seed))[1])
    sampler = shuffled(0)
    for _ in range(5):
        sampler.draw(1)
    assert made == [(0, 0)]
    sampler.draw(7)
    assert made == [(0, 0), (0, 1)]


@given(before=st.integers(0, 30), after=st.integers(1, 30))
def test_a_restored_sampler_goes_on_where_the_first_one_stood(before: int, after: int) -> None:
    first, second = shuffled(3), shuffled(3)
    first.draw(before)
    second.load_state_dict(first.state_dict())
    assert second.draw(after) == first.draw(after)


def curriculum(seed: int = 0, **settings: float) -> PassRateCurriculum:
    sampler = PassRateCurriculum(**settings)
    sampler.start(PROMPTS, seed)
    return sampler


def test_a_curriculum_draws_by_the_variance_of_the_reward() -> None:
    """The first of a weighted draw without replacement comes with its share of the weights: counted over many draws."""
    sampler = curriculum(prior=0.5, memory=0.0, floor=0.1)
    rates = {"train/0": 0.0, "train/1": 1.0, "train/2": 0.25, "train/3": 0.9}
    for prompt in PROMPTS[:4]:
        sampler.record(prompt, rates[prompt.id])
    weights = np.array([0.1, 0.1, 0.75, 0.36, 1, 1, 1])
    draws = 4000
    counts = np.zeros(7)
    for _ in range(draws):
        (prompt,) = sampler.draw(1)
        counts[int(prompt.id[6:])] += 1
    expected = draws * weights / weights.sum()
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()  # five standard deviations of a count


def test_a_curriculum_takes_no_prompt_twice_while_there_are_others() -> None:
    ids = [prompt.id for prompt in curriculum().draw(10)]
    assert sorted(ids[:7]) == [prompt.id for prompt in PROMPTS]
    assert len(set(ids[7:])) == 3


def test_a_pass_rate_is_a_running_mean() -> None:
    sampler = curriculum(memory=0.5)
    for rate in (1.0, 0.0, 0.0):
        sampler.record(PROMPTS[0], rate)
    assert sampler.pass_rates == {"train/0": 0.25}


@given(before=st.integers(0, 5), rate=st.floats(0, 1), after=st.integers(1, 9))
def test_a_restored_curriculum_goes_on_where_the_first_one_stood(before: int, rate: float, after: int) -> None:
    first, second = curriculum(3), curriculum(3)
    for _ in range(before):
        first.record(first.draw(2)[0], rate)
    second.load_state_dict(first.state_dict())
    assert second.draw(after) == first.draw(after)


@pytest.mark.parametrize(("name", "value"), [("prior", 1.1), ("memory", 1.0), ("floor", 0.0)])
def test_a_curriculum_refuses_what_is_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be in"):
        PassRateCurriculum(**{name: value})
