"""WeightFile: one version of the weights as a safetensors file that servers read.

Written as the tensors come, one at a time; what lies where is known only afterwards, so room for the header is left in
front and filled last. In shared memory the file has no name: a server of the same user on the same machine opens it
through the trainer's descriptor, and it can not be left behind, whatever dies.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PADDING = "__padding__"
"""Names that begin so hold no tensor: the format allows no gaps, and every tensor is aligned."""

ALIGNMENT = 64
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
    """Created readable by this user alone.

    Args:
        folder: Where; None: in memory, without a name.
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
        room: int,
        summed: Collection[str] = (),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Copy tensors into the file, one by one as they come: a sharded trainer gathers them one by one.

        Args:
            named_tensors: The weights.
            room: Bytes left for the header.
            summed: Names of tensors whose sums go into ``sums``, for comparison with the server's.
            dtype: That the server keeps them in: the sums are of what is left after rounding to it.
        """
        self._room = room + -room % ALIGNMENT
        end = 0
        for name, tensor in named_tensors:
            data = tensor.detach().cpu().contiguous()
            begin = end + -end % ALIGNMENT
            if begin > end:
                self._header[f"{PADDING}{begin}"] = _entry("U8", (begin - end,), end, begin)
            end = begin + data.numel() * data.element_size()
            self._header[name] = _entry(DTYPES[data.dtype], tuple(data.shape), begin, end)
            self._copy(data, self._room + begin)
            self.shapes[name] = tuple(data.shape)
            self.bytes += end - begin
            if name in summed:
                self.sums[name] = float(data.to(dtype).double().sum())
        os.ftruncate(self._descriptor, self._room + end)

    def _copy(self, data: Tensor, offset: int) -> None:
        view = data.reshape(-1).view(torch.uint8).numpy().data
        written = 0
        while written < len(view):  # one call writes 2 GiB at most
            written += os.pwrite(self._descriptor, view[written:], offset + written)

    def seal(self) -> None:
        """Write the header: from now on the file can be read."""
        header = json.dumps(self._header, separators=(",", ":")).encode()
        size = self._room - 8
        assert len(header) <= size, "the names were checked: the header fits"
        os.pwrite(self._descriptor, size.to_bytes(8, "little") + header.ljust(size), 0)

    def close(self) -> None:
        """Delete it; a server that reads it may finish. Safe to call twice."""
        if self._descriptor < 0:
            return
        os.close(self._descriptor)
        self._descriptor = -1
        if self._named:
            Path(self.path).unlink(missing_ok=True)


def _entry(dtype: str, shape: tuple[int, ...], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def header_room(names: Iterable[str]) -> int:
    """Bytes that the header of these tensors may take, with padding between them."""
    return 4096 + sum(2 * len(name) + 400 for name in names)
