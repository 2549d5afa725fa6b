"""WeightFile: written as tensors come, read as safetensors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dppo_lightning.generate.vllm.in_server import read_weights
from dppo_lightning.generate.vllm.weight_memory import PADDING, WeightFile, header_limit

TENSORS = {
    "a.weight": torch.randn(5, 3),
    "b.bias": torch.randn(3).to(torch.bfloat16),  # 6 bytes: the next one would not be aligned
    "c": torch.arange(6).view(2, 3).t(),  # not contiguous
    "d": torch.tensor(2.5),
    "e": torch.empty(0, 4),
    "f": torch.tensor([True, False]),
}


@pytest.mark.parametrize("named", [False, True])
def test_what_was_written_is_read(named: bool, tmp_path: Path) -> None:
    file = WeightFile(tmp_path if named else None)
    file.write(TENSORS.items(), header_limit(TENSORS), summed=["a.weight", "b.bias"])
    file.seal()
    assert os.stat(file.path).st_mode & 0o077 == 0 or not named
    found = dict(read_weights(file.path))
    assert found.keys() == TENSORS.keys() == file.shapes.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert file.bytes == sum(tensor.numel() * tensor.element_size() for tensor in TENSORS.values())
    assert file.sums == {name: TENSORS[name].double().sum().item() for name in ("a.weight", "b.bias")}
    with safe_open(file.path, framework="pt") as tensors:
        assert {name for name in tensors.keys() if not name.startswith(PADDING)} == TENSORS.keys()  # noqa: SIM118
    path = file.path
    file.close()
    file.close()
    assert not Path(path).exists()
    assert list(tmp_path.iterdir()) == []


def test_sums_are_of_what_the_server_keeps() -> None:
    file = WeightFile()
    file.write([("x", torch.tensor([1.0 + 2**-10, 3.0]))], 1000, summed=["x"], dtype=torch.bfloat16)
    assert file.sums == {"x": 4.0}
    file.close()
