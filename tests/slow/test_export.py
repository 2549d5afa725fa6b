"""``dppo export`` of what DeepSpeed writes, by every ZeRO stage, on one CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from dppo_lightning.run.export import export
from tests.helpers.places import ROOT

LORA = {"rank": 4, "alpha": 8.0, "target_modules": "all-linear"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]

TRAIN = """
import json, sys
import deepspeed, torch
from dppo_lightning.sync.named_weights import merged_weights
from dppo_lightning.train.lora import LoRA
from dppo_lightning.train.policy import Policy

base, out, stage, lora = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a killed build leaves a lock
deepspeed.init_distributed("gloo", auto_mpi_discovery=False)


class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.policy = Policy(base, lora=LoRA(**lora) if lora else None)

    def forward(self, ids):
        return self.policy.model(input_ids=ids, labels=ids).loss


module = Module()
optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
config = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
}
engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
for _ in range(2):
    engine.backward(engine(torch.arange(30)[None]))
    engine.step()
engine.save_checkpoint(out, tag="checkpoint")
torch.save({name: weight.clone() for name, weight in merged_weights(module.policy.model)}, out + "/wanted.pt")
"""


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_checkpoint_of_deepspeed_is_joined(
    stage: int, lora: dict[str, object] | None, tiny_policy_dir: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "last.ckpt"
    checkpoint.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {"policy": tiny_policy_dir, "lora": lora}}))
    place = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }  # any free one
    environment = os.environ | place | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    arguments = [tiny_policy_dir, str(checkpoint), str(stage), json.dumps(lora)]
    subprocess.run([sys.executable, "-c", TRAIN, *arguments], env=environment, check=True, timeout=300)

    export(str(run), str(tmp_path / "out"))
    found = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).named_parameters())
    wanted = torch.load(checkpoint / "wanted.pt")
    before = dict(AutoModelForCausalLM.from_pretrained(tiny_policy_dir, dtype=torch.float32).named_parameters())
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-7)
    assert max((found[name] - before[name]).abs().max() for name in found) > 1e-3
