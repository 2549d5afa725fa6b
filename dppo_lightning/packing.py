"""How sequences lie in the row or rows of ids that a model is given: the part of batch.py that is about layout.

Two layouts. "rows" is one row a sequence, padded on the right: any causal model runs it, and nothing real sees padding.
"packed" is a single row without padding, in which sequences that begin alike have their beginning once (a group's
prompt is forwarded once, P + G R tokens instead of G (P + R)); it needs attention that knows the segments, see
attention.py. Packed was the faster at every shape measured (docs/performance.md), so there is no rule by shape beyond
the shortest beginning worth a segment of its own.

In both, ids after the last position that predicts a generated token are left out: nothing depends on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from dppo_lightning.attention import Segment, SegmentLayout

if TYPE_CHECKING:
    from dppo_lightning.batch import Sequence

Layout = Literal["rows", "packed"]

SHORTEST_SHARED = 8
"""Beginnings shorter than this many tokens are not shared: a segment costs a call of the kernel in every layer."""


@dataclass(frozen=True)
class LaidOut:
    """Ids as the model takes them.

    Attributes:
        input_ids: [B, L] int64.
        predict_index: For each sequence [T] int64, places in the flattened ids that predict its generated tokens.
        real_tokens: Number of ids that are not padding.
        saved_tokens: Number of ids that sequences share and that are therefore not there again.
        position_ids: [1, L] int64, or None where a row is one sequence.
        segments: How the row attends, or None for causal rows.
    """

    input_ids: Tensor
    predict_index: list[np.ndarray]
    real_tokens: int
    saved_tokens: int = 0
    position_ids: Tensor | None = None
    segments: SegmentLayout | None = None


def lay_out(sequences: list[Sequence], layout: Layout) -> LaidOut:
    """Lay sequences out; none gives one padding row, so that a model still has something to run on."""
    if layout == "rows" or not sequences:
        return _in_rows(sequences)
    return _in_one_row(sequences)


def _in_rows(sequences: list[Sequence]) -> LaidOut:
    lengths = [_length(sequence) for sequence in sequences]
    width = max(lengths, default=1)
    rows = np.zeros((max(len(sequences), 1), width), np.int64)
    for row, sequence, length in zip(rows, sequences, lengths, strict=False):
        row[:length] = sequence.token_ids[:length]
    predict = [index * width + sequence.generated - 1 for index, sequence in enumerate(sequences)]
    return LaidOut(torch.from_numpy(rows), predict, sum(lengths))


def _in_one_row(sequences: list[Sequence]) -> LaidOut:
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    segments: list[Segment] = []
    predict: dict[int, np.ndarray] = {}
    end = saved = 0

    def add(tokens: np.ndarray, first_position: int, context: Segment | None = None) -> Segment:
        nonlocal end
        segment = Segment(end, len(tokens), context)
        if len(tokens):
            ids.append(tokens)
            positions.append(np.arange(first_position, first_position + len(tokens)))
            segments.append(segment)
            end += len(tokens)
        return segment

    for members in _alike(sequences):
        beginning = int(sequences[members[0]].generated[0])
        if len(members) == 1 or beginning < SHORTEST_SHARED:
            for index in members:
                sequence = sequences[index]
                whole = add(sequence.token_ids[: _length(sequence)], 0)
                predict[index] = whole.start + sequence.generated - 1
            continue
        shared = add(sequences[members[0]].token_ids[:beginning], 0)
        saved += beginning * (len(members) - 1)
        for index in members:
            sequence = sequences[index]
            rest = add(sequence.token_ids[beginning : _length(sequence)], beginning, shared)
            place = sequence.generated - 1
            predict[index] = np.where(place < beginning, shared.start + place, rest.start + place - beginning)
    return LaidOut(
        input_ids=torch.from_numpy(np.concatenate(ids))[None],
        predict_index=[predict[index] for index in range(len(sequences))],
        real_tokens=end,
        saved_tokens=saved,
        position_ids=torch.from_numpy(np.concatenate(positions))[None],
        segments=SegmentLayout.of(segments),
    )


def split_by_tokens(sequences: list[Sequence], parts: int, layout: Layout = "rows") -> list[list[Sequence]]:
    """Split into ``parts`` lists of nearly equal numbers of tokens to forward.

    In rows, like lengths stay together and keep padding small. Packed, sequences that begin alike stay together: a list
    border cuts at most one group, whose beginning is then forwarded twice. A list may be empty when there are fewer
    sequences than parts.
    """
    if layout == "rows":
        order = sorted(range(len(sequences)), key=lambda index: _length(sequences[index]), reverse=True)
        costs = [float(_length(sequences[index])) for index in order]
    else:
        order, costs = [], []
        for members in _alike(sequences):
            beginning = int(sequences[members[0]].generated[0])
            order += members
            costs += [_length(sequences[index]) - beginning * (1 - 1 / len(members)) for index in members]
    middles = np.cumsum(costs) - np.array(costs) / 2
    owners = np.minimum(middles / max(sum(costs), 1) * parts, parts - 1).astype(int)
    split: list[list[Sequence]] = [[] for _ in range(parts)]
    for index, owner in zip(order, owners, strict=True):
        split[owner].append(sequences[index])
    return split


def _length(sequence: Sequence) -> int:
    """Number of ids that something depends on: up to the last position that predicts a generated token."""
    return int(sequence.generated[-1])


def _alike(sequences: list[Sequence]) -> list[list[int]]:
    """Indices of sequences with the same ids before their first generated token, in order of first appearance."""
    alike: dict[bytes, list[int]] = {}
    for index, sequence in enumerate(sequences):
        alike.setdefault(sequence.token_ids[: sequence.generated[0]].tobytes(), []).append(index)
    return list(alike.values())
