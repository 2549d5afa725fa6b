"""ZeRO-3 on two ranks by the command line: what it exports, and what a weight update costs in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from dppo_lightning.generate.engine import EngineSpec, Request, Sampling
from dppo_lightning.generate.vllm.embedded import VLLMEmbedded
from tests.helpers.places import ROOT
from tests.helpers.rank_pool import RankPool
from tests.helpers.recipes import changed, recipe

pytestmark = pytest.mark.slow


def test_what_two_ranks_export_loads_in_transformers_and_vllm_and_scores_equal(
    tiny_policy_dir: str, tmp_path: Path
) -> None:
    config = changed(recipe(tmp_path, tiny_policy_dir), model__optimizer={"class_path": "torch.optim.AdamW"})
    config["model"]["optimizer"]["init_args"] = {"lr": 1e-2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
    piece = str(ROOT / "configs" / "scaling" / "zero3.yaml")
    fit = ["fit", "--config", "recipe.yaml", "--config", piece, "--trainer.devices", "2"]
    export = ["export", "--run", "run", "--out", "exported"]
    for command in (fit, export):
        done = subprocess.run(
            [sys.executable, "-m", "dppo_lightning", *command],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    before, after = (
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (tiny_policy_dir, tmp_path / "exported")
    )
    moved = [(a - b).abs().max().item() for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert max(moved) > 5e-3  # two steps of AdamW at 1e-2
    engine = VLLMEmbedded()
    engine.start(EngineSpec(str(tmp_path / "exported"), max_model_len=64))
    engine.submit([Request("a", (7, 8, 9), Sampling(max_new_tokens=20), seed=1)])
    (completion,) = engine.poll()
    engine.close()
    ids = torch.tensor([[7, 8, 9, *completion.token_ids.tolist()]])  # type: ignore[union-attr]
    with torch.no_grad():
        table = after(ids).logits[0, 2:-1].log_softmax(-1)
    scored = table.gather(1, ids[0, 3:, None])[:, 0]
    torch.testing.assert_close(torch.from_numpy(completion.logp), scored, rtol=0, atol=1e-4)  # type: ignore[union-attr]


def peak_of_gathering(bucket_bytes: int) -> dict[str, float]:
    """MB by which a rank's memory peaks over where it was, while the weights are gathered and let go one by one."""
    import ctypes
    import os

    # Freed tensors go back to the system at once: what malloc keeps for later is not what the update holds.
    ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from transformers import LlamaConfig, LlamaForCausalLM

    from dppo_lightning.sync.named_weights import gathered_weights

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    sizes: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=4096, num_hidden_layers=8, num_key_value_heads=8, **sizes)
    model = LlamaForCausalLM(config)
    total = sum(4 * parameter.numel() for parameter in model.parameters()) / 1e6
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    settings["zero_force_ds_cpu_optimizer"] = False
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=settings, dist_init_required=False
    )

    def gather() -> None:
        for _, tensor in gathered_weights(engine.module.named_parameters(), bucket_bytes):
            del tensor

    gather()  # buffers of the first collective operations are not the weights'
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    gather()
    return {"model": total, "peak": status("VmHWM") - before}


def status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024 / 1e6


def test_a_sync_gathers_no_more_than_two_buckets() -> None:
    """The gathered bucket, and rank 0's copy of it."""
    bucket = 32
    pool = RankPool(2)
    try:
        ranks = pool.run(peak_of_gathering, bucket << 20, timeout=300)
    finally:
        pool.stop()
    print(ranks)
    assert ranks[0]["model"] > 8 * bucket
    for rank in ranks:
        assert rank["peak"] < 2 * bucket * 2**20 / 1e6
