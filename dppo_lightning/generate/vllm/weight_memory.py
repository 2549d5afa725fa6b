"""Weights on their way between two processes of one machine, in memory that both see.

``SharedBlock`` and its manifest go to a child process, ``WeightFile`` (in the safetensors format) to a server that
reads it. Both are memory files without a name, reached through a file descriptor, so nothing is left behind when a
process dies. Both are written tensor by tensor, because a sharded trainer gathers them so.
"""

from __future__ import annotations

import json
import mmap
import os
import secrets
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dppo_lightning.generate.engine import ExpectedWeights

ALIGNMENT = 64
"""Every tensor begins at a multiple of so many bytes."""


@dataclass(frozen=True)
class Entry:
    """Place of one tensor: byte offset into the block, dtype name ("float32") and shape."""

    name: str
    offset: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """Tensors of one message.

    Attributes:
        entries: Place of each tensor.
        bytes: Bytes that the tensors hold.
        size: Bytes of the block that they span, with the gaps between them.
    """

    entries: tuple[Entry, ...]
    bytes: int
    size: int


class SharedBlock:
    """The block, as its writer or its reader holds it.

    Args:
        descriptor: Inherited file descriptor of the block; None creates a new block.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self.descriptor = os.memfd_create("dppo-weights") if descriptor is None else descriptor
        self._map: mmap.mmap | None = None

    def write(self, named_tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None) -> Manifest:
        """Copy tensors into the block, growing it where needed.

        They are copied one by one as they come: a sharded trainer gathers them one by one. When that fails half-way,
        the block holds neither what it held before nor what was to come.

        Args:
            named_tensors: The weights, on any device, of any dtype.
            dtype: Dtype that wider floating-point tensors are rounded to; None: none are.
        """
        entries, offset, total = [], 0, 0
        for name, given in named_tensors:
            tensor = narrowed(given, dtype)
            entries.append(Entry(name, offset, dtype_name(tensor.dtype), tuple(tensor.shape)))
            size = copy_to(self.descriptor, tensor, offset)
            total += size
            offset += -(-size // ALIGNMENT) * ALIGNMENT
        if os.fstat(self.descriptor).st_size < offset:
            os.ftruncate(self.descriptor, offset)
        return Manifest(tuple(entries), total, offset)

    def read(self, manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
        """Read the tensors in the block; they are views, valid until the next ``write``."""
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


def copy_to(descriptor: int, tensor: Tensor, offset: int) -> int:
    """Write a tensor's bytes into an open file at a byte offset; return the number of bytes."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    written = 0
    while written < len(data):  # one call writes 2 GiB at most
        written += os.pwrite(descriptor, data[written:], offset + written)
    return written


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype without its module: "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def narrowed(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Round a tensor to ``dtype`` where that takes fewer bytes; integers stay."""
    if dtype is None or not tensor.is_floating_point() or tensor.element_size() <= dtype.itemsize:
        return tensor.detach()
    return tensor.detach().to(dtype)


PADDING = "__padding__"
"""Beginning of the names of entries that hold no tensor: the format allows no gaps, and every tensor is aligned."""

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class WeightFile:
    """A safetensors file that is written tensor by tensor, readable by this user alone.

    Args:
        folder: Folder of the file; None: in memory, without a name.

    Attributes:
        path: Path under which servers read it.
        shapes: Shape of every tensor written, by name.
        sums: Sum of every tensor that was to be summed, by name.
        bytes: Bytes that the tensors hold.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._named = folder is not None
        if folder is None:
            self._descriptor = os.memfd_create("dppo-weights")
            self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        else:
            self._descriptor, self.path = tempfile.mkstemp(".safetensors", "dppo-weights-", folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.sums: dict[str, float] = {}
        self.bytes = 0
        self._header: dict[str, Any] = {}

    def write(
        self,
        named_tensors: Iterable[tuple[str, Tensor]],
        header_bytes: int,
        summed: Collection[str] = (),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Copy tensors into the file, one by one as they come: a sharded trainer gathers them one by one.

        Args:
            named_tensors: The weights.
            header_bytes: Bytes kept free for the header, see ``header_limit``.
            summed: Names of tensors whose sums go into ``sums``, for comparison with the server's.
            dtype: Dtype that the server keeps the tensors in: the sums are of what is left after rounding to it.
        """
        self._data_start = header_bytes + -header_bytes % ALIGNMENT
        end = 0
        for name, tensor in named_tensors:
            data = tensor.detach().cpu().contiguous()
            begin = end + -end % ALIGNMENT
            if begin > end:
                self._header[f"{PADDING}{begin}"] = _entry("U8", (begin - end,), end, begin)
            end = begin + data.numel() * data.element_size()
            self._header[name] = _entry(DTYPES[data.dtype], tuple(data.shape), begin, end)
            copy_to(self._descriptor, data, self._data_start + begin)
            self.shapes[name] = tuple(data.shape)
            self.bytes += end - begin
            if name in summed:
                self.sums[name] = float(data.to(dtype).double().sum())
        os.ftruncate(self._descriptor, self._data_start + end)

    def seal(self) -> None:
        """Write the header: from now on the file can be read."""
        header = json.dumps(self._header, separators=(",", ":")).encode()
        size = self._data_start - 8
        assert len(header) <= size, "the names were checked: the header fits"
        os.pwrite(self._descriptor, size.to_bytes(8, "little") + header.ljust(size), 0)

    def close(self) -> None:
        """Delete the file; a server that is reading it may finish. Safe to call twice."""
        if self._descriptor < 0:
            return
        os.close(self._descriptor)
        self._descriptor = -1
        if self._named:
            Path(self.path).unlink(missing_ok=True)


def _entry(dtype: str, shape: tuple[int, ...], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def header_limit(names: Iterable[str]) -> int:
    """Largest size of the header of these tensors, with padding between them, in bytes."""
    return 4096 + sum(2 * len(name) + 400 for name in names)


SUMMED_ELEMENTS = 2**24
"""Most elements of an embedding whose sum is compared with the servers'."""


class FileTransfer:
    """The files of one run: the weights in force, and a probe that shows at once which servers can read files here.

    Args:
        folder: Folder of the files; None: in memory, for servers of the same user on the same machine.

    Attributes:
        probe_content: Text in the probe.

    Raises:
        OSError: The folder does not exist, or cannot be written.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._files: list[WeightFile] = []
        self._probe = WeightFile(folder)
        self.probe_content = secrets.token_hex(8)
        try:
            Path(self._probe.path).write_text(self.probe_content)
        except BaseException:
            self.close()
            raise

    @property
    def probe_path(self) -> str:
        """Path of the probe."""
        return self._probe.path

    def write(
        self, named_tensors: Iterable[tuple[str, Tensor]], expected: ExpectedWeights, dtype: torch.dtype
    ) -> WeightFile:
        """Write new weights to a file; the weights before stay until ``delete_older``.

        Args:
            named_tensors: The new weights, by name.
            expected: Names and shapes that they must have.
            dtype: Dtype that the servers keep them in.

        Raises:
            SyncError: A name or a shape is wrong; there is no new file then.
        """
        file = WeightFile(self._folder)
        try:
            summed = [name for name, shape in expected.shapes.items() if len(shape) == 1 or _is_small(name, shape)]
            file.write(expected.once(named_tensors), header_limit(expected.shapes), summed, dtype)
            expected.check(file.shapes)
            file.seal()
        except BaseException:
            file.close()
            raise
        self._files.append(file)
        return file

    def delete_older(self) -> None:
        """Delete all weights but the last written, which a server that comes back reads."""
        for file in self._files[:-1]:
            file.close()
        del self._files[:-1]

    def close(self) -> None:
        """Delete every file; safe to call twice."""
        for file in (*self._files, self._probe):
            file.close()
        self._files.clear()


def _is_small(name: str, shape: Sequence[int]) -> bool:
    """Whether a weight is an embedding whose sum takes little time."""
    return "embed" in name and len(shape) == 2 and shape[0] * shape[1] <= SUMMED_ELEMENTS
