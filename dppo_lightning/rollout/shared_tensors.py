"""Tensors between two processes of one machine: one block of anonymous shared memory and a manifest of what lies where.

The block is a memory file without a name, passed on as a file descriptor: it can not be left behind, whatever dies.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 64


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: byte offset into the block, dtype name ("float32") and shape."""

    name: str
    offset: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """The tensors of one message; the bytes they hold, and the bytes of the block that they span."""

    entries: tuple[Entry, ...]
    bytes: int
    size: int


class SharedBlock:
    """Either end of the block.

    Args:
        descriptor: An inherited file descriptor; None creates a new block.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self.descriptor = os.memfd_create("dppo-weights") if descriptor is None else descriptor
        self._map: mmap.mmap | None = None

    def write(self, named_tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None) -> Manifest:
        """Copy tensors into the block, growing it where needed.

        They are copied one by one as they come: a sharded trainer gathers them one by one. When that fails half-way,
        the block holds neither what it held before nor what was to come.

        Args:
            named_tensors: On any device, of any dtype.
            dtype: Floating-point tensors wider than this are rounded to it.
        """
        entries, offset, total = [], 0, 0
        for name, given in named_tensors:
            tensor = narrowed(given, dtype)
            entries.append(Entry(name, offset, dtype_name(tensor.dtype), tuple(tensor.shape)))
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            written = 0
            while written < len(data):  # one call writes 2 GiB at most
                written += os.pwrite(self.descriptor, data[written:], offset + written)
            total += len(data)
            offset += -(-len(data) // ALIGNMENT) * ALIGNMENT
        if os.fstat(self.descriptor).st_size < offset:
            os.ftruncate(self.descriptor, offset)
        return Manifest(tuple(entries), total, offset)

    def read(self, manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
        """Tensors that lie in the block; they are views, valid until the next ``write``."""
        if manifest.size and (self._map is None or len(self._map) < manifest.size):
            self._map = mmap.mmap(self.descriptor, manifest.size)
        for entry in manifest.entries:
            dtype = getattr(torch, entry.dtype)
            count = torch.Size(entry.shape).numel()
            if self._map is None or count == 0:
                yield entry.name, torch.empty(entry.shape, dtype=dtype)
            else:
                flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=entry.offset)
                yield entry.name, flat.view(entry.shape)

    def close(self) -> None:
        """Give the memory back once no view of it is left; safe to call twice."""
        self._map = None
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" of torch.float32."""
    return str(dtype).removeprefix("torch.")


def narrowed(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor, rounded to ``dtype`` where that takes fewer bytes; integers stay."""
    if dtype is None or not tensor.is_floating_point() or tensor.element_size() <= dtype.itemsize:
        return tensor.detach()
    return tensor.detach().to(dtype)
