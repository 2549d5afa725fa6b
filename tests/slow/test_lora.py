"""LoRA on a real model, with vLLM, from the command line: trained in step with the engine, and exported both ways."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def dppo(*arguments: str | Path) -> None:
    """Run the command line in a process of its own, at the root of the project."""
    subprocess.run([sys.executable, ROOT / "cli.py", *arguments], cwd=ROOT, check=True, timeout=1200)


def log_probs(model: Any, text: str, tokenizer: Any) -> torch.Tensor:
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        return model(ids).logits[0].log_softmax(-1)


@pytest.mark.parametrize("adapter_rank", ["null", "16"])
def test_smollm2_with_adapters_trains_in_step_with_its_engine(adapter_rank: str, tmp_path: Path) -> None:
    base, run = tmp_path / "smollm2", tmp_path / "run"
    dppo("prepare", "smollm2", "--out", base)
    dppo("fit", "--config", "configs/smollm2_arithmetic.yaml", "--config", "configs/model/lora.yaml",
         "--model.policy", base, "--run_dir", run, "--trainer.max_steps", "2", "--data.prompts_per_step", "4",
         "--data.engine.init_args.adapter_rank", adapter_rank,
         "--data.prompts.init_args.heldout", "8")  # fmt: skip
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    parity = [float(row["sync/parity_error"]) for row in rows if row.get("sync/parity_error")]
    sent = [float(row["sync/bytes"]) for row in rows if row.get("sync/bytes")]
    assert len(parity) == 2
    assert max(parity) < 1e-3
    assert (sent[0] < 50e6) == (adapter_rank == "16")  # a tenth of the model's 538 MB, or all of it

    dppo("export", "--run", run, "--out", tmp_path / "merged")
    dppo("export", "--run", run, "--out", tmp_path / "adapter", "--adapter")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template
    text = json.loads((run / "completions.jsonl").read_text().splitlines()[0])["prompt"]
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = log_probs(plain, text, tokenizer)
    merged = log_probs(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32), text, tokenizer)
    apart = log_probs(PeftModel.from_pretrained(plain, str(tmp_path / "adapter")), text, tokenizer)
    np.testing.assert_allclose(merged, apart, atol=1e-3)
    assert (merged - before).abs().max() > 1e-3
