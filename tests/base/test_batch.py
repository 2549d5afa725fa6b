"""Packing: what goes in comes out, whatever the lengths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dppo_lightning.base.batch import pack
from dppo_lightning.base.packing import Layout, lay_out, split_by_tokens
from dppo_lightning.base.records import Completion, Group, Prompt, Sequence
from tests.helpers import records


def make_completion(ids: list[int], topk: np.ndarray | None = None) -> Completion:
    """Completion with log-probs -1, -2, ..."""
    return records.make_completion(ids, -np.arange(1, len(ids) + 1), topk=topk)


def make_sequence(prompt: int, tokens: int, first: int = 0) -> Sequence:
    """Sequence whose prompt counts from ``first``, and whose completion from 100."""
    logp = -np.arange(1, tokens + 1)
    return records.make_sequence(range(first, first + prompt), range(100, 100 + tokens), logp, 1.0)


def test_each_target_is_predicted_from_the_position_before_it() -> None:
    sequences = [make_sequence(3, 2), make_sequence(1, 4, first=50)]
    batch = pack(sequences, np.array([0.5, 0.25]))
    flat = batch.input_ids.flatten()
    assert batch.targets.tolist() == [100, 101, 100, 101, 102, 103]
    assert flat[batch.predict_index].tolist() == [2, 100, 50, 100, 101, 102]
    assert batch.weight.tolist() == [0.5] * 2 + [0.25] * 4
    assert batch.sequence.tolist() == [0, 0, 1, 1, 1, 1]
    assert batch.position.tolist() == [0, 1, 0, 1, 2, 3]
    assert batch.rollout_logp.tolist() == [-1, -2, -1, -2, -3, -4]
    assert batch.real_tokens == 8  # the last token of each sequence predicts nothing


def test_an_empty_micro_batch_has_one_row_and_no_tokens() -> None:
    batch = pack([], np.zeros(0))
    assert batch.input_ids.shape == (1, 1)
    assert batch.tokens == 0


def test_the_sampled_token_gets_a_column_of_its_own_only_outside_the_top_k() -> None:
    topk = np.array([[7, 8], [5, 6]])
    sequence = Sequence.from_completion(Prompt("p", (1,), ""), make_completion([8, 9], topk), 0.0)
    assert sequence.topk_ids.tolist() == [[7, 8, 8], [5, 6, 9]]
    assert sequence.rollout_topk_logp.tolist() == [[-1, -1, -np.inf], [-1, -1, -2]]


def test_a_completion_without_tokens_makes_no_sequence() -> None:
    group = Group(Prompt("p", (1,), ""), [make_completion([]), make_completion([3])], ["", "c"])
    group.advantages = [np.array([]), np.array([-1.0])]
    assert [sequence.advantage.tolist() for sequence in group.sequences()] == [[-1.0]]
    assert [row["advantage"] for row in group.records()] == [0.0, -1.0]


LAYOUTS: list[Layout] = ["rows", "packed"]


@pytest.mark.parametrize("layout", LAYOUTS)
@given(groups=st.lists(st.lists(st.integers(1, 60), max_size=6), max_size=8), parts=st.integers(1, 9))
def test_splitting_loses_no_sequence_and_balances_tokens(layout: Layout, groups: list[list[int]], parts: int) -> None:
    sequences = [make_sequence(20, length, first=i) for i, group in enumerate(groups) for length in group]
    split = split_by_tokens(sequences, parts, layout)
    assert len(split) == parts
    assert sorted(index for part in split for index in part) == list(range(len(sequences)))
    loads = [lay_out([sequences[i] for i in part], layout).real_tokens if part else 0 for part in split]
    whole = lay_out(sequences, layout).real_tokens if sequences else 0
    longest = max((len(s.token_ids) for s in sequences), default=0)
    slack = longest + (2 * 20 if layout == "packed" else 0)  # a group cut at either border has its prompt there again
    assert all(load <= whole / parts + slack for load in loads)


def test_packed_groups_are_cut_only_where_the_balance_asks_for_it() -> None:
    sequences = [make_sequence(20, 5, first=10 * i) for i in range(4) for _ in range(3)]
    order = np.random.default_rng(0).permutation(12)
    mixed = [sequences[i] for i in order]
    split = split_by_tokens(mixed, 2, "packed")
    assert [lay_out([mixed[i] for i in part], "packed").real_tokens for part in split] == [2 * (20 + 3 * 4)] * 2


def test_a_shared_prompt_lies_in_the_row_once() -> None:
    sequences = [make_sequence(9, 3), make_sequence(9, 2), make_sequence(9, 4, first=50)]
    batch = pack(sequences, np.ones(3), "packed")
    prompt, other = list(range(9)), list(range(50, 59))
    assert batch.input_ids.tolist() == [[*prompt, 100, 101, 100, *other, 100, 101, 102]]
    assert batch.position_ids.tolist() == [[*range(9), 9, 10, 9, *range(12)]]
    assert batch.predict_index.tolist() == [8, 9, 10, 8, 11, 20, 21, 22, 23]
    assert (batch.real_tokens, batch.saved_tokens) == (24, 9)


def test_a_beginning_too_short_to_be_worth_a_segment_is_not_shared() -> None:
    batch = pack([make_sequence(3, 3), make_sequence(3, 3)], np.ones(2), "packed")
    assert batch.saved_tokens == 0
    assert batch.input_ids.tolist() == [[0, 1, 2, 100, 101] * 2]


@pytest.mark.parametrize("layout", LAYOUTS)
@given(groups=st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=5), min_size=1, max_size=5))
def test_every_generated_token_is_predicted_after_what_came_before_it(layout: Layout, groups: list[list[int]]) -> None:
    sequences = [make_sequence(9 + 2 * i, length, first=i) for i, group in enumerate(groups) for length in group]
    laid, batch = lay_out(sequences, layout), pack(sequences, np.ones(len(sequences)), layout)
    assert batch.tokens == sum(sequence.tokens for sequence in sequences)
    flat = laid.input_ids.flatten()
    for sequence, predict in zip(sequences, laid.predict_index, strict=True):
        assert flat[predict].tolist() == sequence.token_ids[sequence.generated - 1].tolist()
        if laid.position_ids is not None:
            assert laid.position_ids[0][predict].tolist() == (sequence.generated - 1).tolist()
    assert laid.real_tokens + laid.saved_tokens == sum(sequence.generated[-1] for sequence in sequences)
    assert layout == "rows" or laid.real_tokens == flat.numel()


def test_a_batch_moves_with_its_segments() -> None:
    batch = pack([make_sequence(9, 3), make_sequence(9, 2)], np.ones(2), "packed").to("meta")
    assert batch.segments.place.is_meta
    assert all(block.own.is_meta for block in batch.segments.blocks)
