"""PromptSampler: every prompt once a pass, and a place that can be restored."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from dppo_lightning.batch import Prompt
from dppo_lightning.prompts import PromptSampler

PROMPTS = [Prompt(f"train/{i}", (i,), str(i)) for i in range(7)]


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(0, 20), max_size=6), seed=st.integers(0, 100))
def test_every_prompt_comes_once_a_pass_however_it_is_drawn(counts: list[int], seed: int) -> None:
    sampler = PromptSampler(PROMPTS, seed)
    drawn = [prompt.id for count in counts for prompt in sampler.draw(count)]
    assert drawn == [prompt.id for prompt in PromptSampler(PROMPTS, seed).draw(sum(counts))]
    for start in range(0, len(drawn) - 6, 7):
        assert sorted(drawn[start : start + 7]) == [prompt.id for prompt in PROMPTS]


def test_passes_and_seeds_have_orders_of_their_own() -> None:
    ids = [prompt.id for prompt in PromptSampler(PROMPTS, 0).draw(14)]
    assert ids[:7] != ids[7:]
    assert ids[:7] != [prompt.id for prompt in PromptSampler(PROMPTS, 1).draw(7)]


@given(before=st.integers(0, 30), after=st.integers(1, 30))
def test_a_restored_sampler_goes_on_where_the_first_one_stood(before: int, after: int) -> None:
    first, second = PromptSampler(PROMPTS, 3), PromptSampler(PROMPTS, 3)
    first.draw(before)
    second.load_state_dict(first.state_dict())
    assert second.draw(after) == first.draw(after)
