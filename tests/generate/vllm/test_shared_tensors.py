"""SharedBlock: what one process writes another reads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dppo_lightning.generate.vllm.weight_memory import SharedBlock


@pytest.fixture
def block() -> Iterator[SharedBlock]:
    block = SharedBlock()
    yield block
    block.close()


def test_tensors_come_out_as_they_went_in(block: SharedBlock) -> None:
    tensors = {"a": torch.randn(3, 4).T, "b": torch.randn(5, dtype=torch.bfloat16), "c": torch.empty(0, 2)}
    manifest = block.write(tensors.items())
    assert manifest.bytes == 3 * 4 * 4 + 5 * 2
    for name, tensor in block.read(manifest):
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor, tensors[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wider_floating_point_tensors_are_rounded_as_an_assignment_rounds(
    block: SharedBlock, dtype: torch.dtype
) -> None:
    # Ties between two values of the narrow dtype, its overflow, subnormals and the specials, next to ordinary numbers.
    edges = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 65520.0, 3e38, 1e-7, -0.0, torch.inf, torch.nan])
    wide = torch.cat([edges, torch.randn(1000)])
    same = torch.randn(7).to(dtype)
    ids = torch.arange(4)
    manifest = block.write([("wide", wide), ("same", same), ("ids", ids)], dtype)
    read = dict(block.read(manifest))
    expected = torch.empty(len(wide), dtype=dtype)
    expected.copy_(wide)
    assert torch.equal(read["wide"].view(torch.int16), expected.view(torch.int16))
    assert torch.equal(read["same"], same)
    assert torch.equal(read["ids"], ids)
    assert manifest.bytes == 2 * len(wide) + 2 * 7 + 8 * 4


def test_a_narrower_tensor_is_not_widened(block: SharedBlock) -> None:
    manifest = block.write([("a", torch.ones(3, dtype=torch.bfloat16))], torch.float32)
    assert manifest.entries[0].dtype == "bfloat16"
