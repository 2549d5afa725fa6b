"""Layout of sequences in the row or rows of ids that a model is given, and of the attention there.

Two layouts. "rows" is one row a sequence, padded on the right: any causal model runs it, and nothing real sees padding.
"packed" is a single row without padding, in which sequences that begin alike have their beginning once (a group's
prompt is forwarded once, P + G R tokens instead of G (P + R)); it needs attention that knows the segments, see
train/attention.py. Whether a beginning is there once is decided by shape, see ``worth_sharing``; where it is not, every
sequence is a causal segment of its own, which costs what a row costs without its padding.

In both, ids after the last position that predicts a generated token are left out: nothing depends on them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dppo_lightning.base.records import Sequence

Layout = Literal["rows", "packed"]

SHORTEST_SHARED = 8
"""Beginnings shorter than this many tokens are not shared: a segment costs a call of the kernel in every layer."""

MASKED = 9000
"""A completion of R tokens that continues a shared beginning costs as much as R^2 / 9000 tokens more, in the attention:
its mask keeps the kernel from leaving out the half of R x R that causality forbids. Measured on SmolLM2 (width 576) on
the CPU, benchmarks/step.py --only shared: 32 + 2 x 1024 tokens shared take 0.91 of the speed of rows, 16 + 8 x 512 the
same time, 64 + 8 x 256 run 1.2 times as fast. A wider model spends more on each token and less, by comparison, on
attention, so for it the rule is cautious."""


def worth_sharing(beginning: int, lengths: Iterable[int]) -> bool:
    """Decide whether sequences have their common beginning once, by a measured rule.

    The tokens that sharing saves are compared with those that the mask costs.

    Args:
        beginning: Length of the common beginning, in tokens.
        lengths: Length of each sequence's continuation, in tokens.
    """
    continued = list(lengths)
    spared = beginning * (len(continued) - 1)
    return beginning >= SHORTEST_SHARED and spared > sum(length**2 for length in continued) / MASKED


@dataclass(frozen=True)
class Segment:
    """Tokens of the row, ``length`` from ``start`` on, that see themselves causally and all of ``context``, if any."""

    start: int
    length: int
    context: Segment | None = None


@dataclass(frozen=True)
class Block:
    """b segments of like length, padded to Q own tokens and P tokens of context, for one call of the kernel.

    Attributes:
        own: [b, Q] int64, places in the row; padding repeats the segment's first token.
        context: [b, P] int64, or None where no segment continues another.
        mask: [b or 1, 1, Q, P + Q] bool, True where a token sees one of (context, own); None for purely causal.
    """

    own: Int[Tensor, "b Q"]
    context: Int[Tensor, "b P"] | None
    mask: Bool[Tensor, "b 1 Q K"] | None

    def to(self, device: torch.device | str) -> Block:
        return replace(self, **moved(self, device))


@dataclass(frozen=True)
class SegmentLayout:
    """Attention within a row of T tokens.

    Attributes:
        blocks: Blocks of segments; together they hold every token as its own exactly once.
        place: [T] int64, where the blocks' outputs, flattened one after another, hold each token.
    """

    blocks: tuple[Block, ...]
    place: Int[Tensor, " T"]

    @classmethod
    def of(cls, segments: list[Segment]) -> SegmentLayout:
        """Gather segments of like length into blocks; together they cover the row."""
        alike: dict[tuple[int, int], list[Segment]] = {}
        for segment in segments:
            size = (_size_class(segment.length), _size_class(segment.context.length if segment.context else 0))
            alike.setdefault(size, []).append(segment)
        place = np.empty(sum(segment.length for segment in segments), np.int64)
        blocks, offset = [], 0
        for members in alike.values():
            block = _block(members)
            for index, segment in enumerate(members):
                begin = offset + index * block.own.shape[1]
                place[segment.start : segment.start + segment.length] = np.arange(begin, begin + segment.length)
            offset += block.own.numel()
            blocks.append(block)
        return cls(tuple(blocks), torch.from_numpy(place))

    def to(self, device: torch.device | str) -> SegmentLayout:
        return SegmentLayout(tuple(block.to(device) for block in self.blocks), self.place.to(device))


@dataclass(frozen=True)
class LaidOut:
    """Ids in the form that the model takes.

    Attributes:
        input_ids: [B, L] int64, token ids.
        predict_index: Places in the flattened ids that predict the generated tokens, for each sequence [T] int64.
        real_tokens: Number of ids that are not padding.
        saved_tokens: Number of ids that sequences share and that are therefore not there again.
        position_ids: [1, L] int64, place of each id in its own sequence, or None where a row is one sequence.
        segments: Layout of the row's attention, or None for causal rows.
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
        if not worth_sharing(beginning, _continued(sequences, members)):
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


def split_by_tokens(sequences: list[Sequence], parts: int, layout: Layout = "rows") -> list[list[int]]:
    """Split into ``parts`` lists of indices of sequences, of nearly equal numbers of tokens to forward.

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
            once = worth_sharing(beginning, _continued(sequences, members))
            spared = beginning * (1 - 1 / len(members)) if once else 0.0
            costs += [_length(sequences[index]) - spared for index in members]
    middles = np.cumsum(costs) - np.array(costs) / 2
    owners = np.minimum(middles / max(sum(costs), 1) * parts, parts - 1).astype(int)
    split: list[list[int]] = [[] for _ in range(parts)]
    for index, owner in zip(order, owners, strict=True):
        split[owner].append(index)
    return split


def _length(sequence: Sequence) -> int:
    """Number of ids that something depends on: up to the last position that predicts a generated token."""
    return int(sequence.generated[-1])


def _continued(sequences: list[Sequence], members: list[int]) -> list[int]:
    """Lengths of the members' continuations of the beginning that they share, in tokens."""
    return [_length(sequences[index]) - int(sequences[index].generated[0]) for index in members]


def _alike(sequences: list[Sequence]) -> list[list[int]]:
    """Indices of sequences with the same ids before their first generated token, in order of first appearance."""
    alike: dict[bytes, list[int]] = {}
    for index, sequence in enumerate(sequences):
        alike.setdefault(sequence.token_ids[: sequence.generated[0]].tobytes(), []).append(index)
    return list(alike.values())


def _size_class(length: int) -> int:
    """Class of a length; lengths of one class differ by less than a third, or by less than 16 tokens."""
    return 0 if length == 0 else 1 + int(np.log(max(length, 16) / 16) / np.log(4 / 3))


def _block(members: list[Segment]) -> Block:
    own = _places(members)
    lengths = np.array([member.context.length if member.context else 0 for member in members])
    width, past = own.shape[1], int(lengths.max())
    if past == 0:
        return Block(torch.from_numpy(own), None, None)
    context = _places([member.context for member in members if member.context])
    if (lengths == past).all():
        lengths = lengths[:1]
    seen = np.arange(past) < lengths[:, None, None, None]
    causal = np.tril(np.ones((1, 1, width, width), bool))
    shape = (len(lengths), 1, width)
    mask = np.concatenate([np.broadcast_to(seen, (*shape, past)), np.broadcast_to(causal, (*shape, width))], axis=3)
    return Block(torch.from_numpy(own), torch.from_numpy(context), torch.from_numpy(mask))


def _places(segments: list[Segment]) -> np.ndarray:
    """Places of the segments' tokens in the row, [b, longest]; padding repeats a segment's first."""
    steps = np.arange(max(segment.length for segment in segments))
    lengths = np.array([[segment.length] for segment in segments])
    return np.array([[segment.start] for segment in segments]) + np.where(steps < lengths, steps, 0)


def moved(record: Any, device: torch.device | str) -> dict[str, Any]:
    """Tensors among a record's fields, by name, on ``device``; ``replace`` makes the moved record of them."""
    return {
        item.name: value.to(device, non_blocking=True)
        for item in fields(record)
        if isinstance(value := getattr(record, item.name), Tensor)
    }
