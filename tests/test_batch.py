"""Packing: what goes in comes out, whatever the lengths."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from dppo_lightning.batch import Completion, Group, Prompt, Sequence, pack, split_by_tokens


def make_completion(ids: list[int], topk: np.ndarray | None = None) -> Completion:
    count = len(ids)
    return Completion(
        request_id="r",
        token_ids=np.array(ids, np.int64),
        logp=-np.arange(1, count + 1, dtype=np.float32),
        finish_reason="stop",
        versions=np.zeros(count, np.int64),
        topk_ids=topk,
        topk_logp=None if topk is None else -np.ones_like(topk, np.float32),
    )


def make_sequence(prompt: int, tokens: int, first: int = 0) -> Sequence:
    ids = tuple(range(first, first + prompt))
    return Sequence.from_completion(Prompt("p", ids, ""), make_completion(list(range(100, 100 + tokens))), 1.0)


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
    assert batch.real_tokens == 10


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
    group.advantages = np.array([1.0, -1.0])
    assert [sequence.advantage for sequence in group.sequences()] == [-1.0]


@given(lengths=st.lists(st.integers(1, 60), max_size=40), parts=st.integers(1, 9))
def test_splitting_loses_no_sequence_and_balances_tokens(lengths: list[int], parts: int) -> None:
    sequences = [make_sequence(1, length) for length in lengths]
    split = split_by_tokens(sequences, parts)
    assert len(split) == parts
    assert sorted(id(s) for part in split for s in part) == sorted(id(s) for s in sequences)
    loads = [sum(len(s.token_ids) for s in part) for part in split]
    longest = max((len(s.token_ids) for s in sequences), default=0)
    assert all(load <= sum(loads) / parts + longest for load in loads)


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=12))
def test_packing_keeps_every_token_once(lengths: list[int]) -> None:
    batch = pack([make_sequence(2, length) for length in lengths], np.ones(len(lengths)))
    assert batch.tokens == sum(lengths)
    assert torch.equal(batch.input_ids.flatten()[batch.predict_index + 1], batch.targets)
    assert len(batch.predict_index.unique()) == batch.tokens
