"""Whole weights from shards, bucket by bucket."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dppo_lightning.base.records import Sequence
from dppo_lightning.sync import named_weights as weights
from dppo_lightning.sync.named_weights import gathered_weights
from tests.helpers.rank_pool import RankPool
from tests.helpers.training import STRATEGIES, train

Steps = list[list[Sequence]]


def test_plain_parameters_pass_through_without_a_copy() -> None:
    model = torch.nn.Linear(3, 2)
    found = dict(gathered_weights(model.named_parameters(), bucket_bytes=1))
    assert {name: tensor.data_ptr() for name, tensor in found.items()} == {
        name: parameter.data_ptr() for name, parameter in model.named_parameters()
    }
    assert not any(tensor.requires_grad for tensor in found.values())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("bucket_bytes", [1, 40_000, 1 << 30])
def test_shards_are_gathered_in_order(
    strategy: str, bucket_bytes: int, two_ranks: RankPool, tiny_untied_dir: str, steps: Steps
) -> None:
    wanted = AutoModelForCausalLM.from_pretrained(tiny_untied_dir, dtype=torch.float32)
    probe = Gather(bucket_bytes)
    runs = two_ranks.run(train, tiny_untied_dir, steps, strategy, max_steps=1, beta=1e-9, probe=probe)
    first, second = (run.found for run in runs)
    assert first["names"] == [name for name, _ in wanted.named_parameters()]
    for name, parameter in wanted.named_parameters():
        assert torch.equal(first["weights"][name], parameter)
    if strategy in ("zero3", "fsdp2"):
        assert second["weights"] == {}
        assert first["held"] < 0.6 * sum(p.numel() for p in wanted.parameters())
    if strategy == "zero3":
        buckets = first["buckets"]
        assert all(4 * sum(elements) <= bucket_bytes or len(elements) == 1 for elements in buckets)
        assert len(buckets) > 1 or bucket_bytes == 1 << 30


class Gather:
    """Of the reference, which is as it was loaded: its weights whole, and what a rank holds of them."""

    def __init__(self, bucket_bytes: int) -> None:
        self.bucket_bytes = bucket_bytes

    def __call__(self, module: Any) -> dict[str, Any]:
        model = module.scorer.reference.model
        named, most = list(model.named_parameters()), self.bucket_bytes
        for _ in gathered_weights(named, most):
            break  # a reader that stops early leaves no rank behind
        return {
            "names": [name for name, _ in named],
            "weights": {name: tensor.clone() for name, tensor in gathered_weights(named, most)},
            "buckets": [[getattr(p, "ds_numel", 0) for _, p in bucket] for bucket in weights._buckets(named, most)],
            "held": sum(held(p) for _, p in named),
        }


def held(parameter: Any) -> int:
    """Elements that this rank holds."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.numel() + parameter.ds_tensor.numel()
    return parameter.to_local().numel() if hasattr(parameter, "to_local") else parameter.numel()
