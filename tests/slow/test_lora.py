"""LoRA on a real model, with vLLM, from the command line: trained in step with the engine, and exported both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.command_line import dppo
from tests.helpers.run_files import read_jsonl, read_metrics

pytestmark = pytest.mark.slow


def next_log_probs(model: Any, text: str, tokenizer: Any) -> torch.Tensor:
    """[T, V] log-probs of what follows each token of a text."""
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
    metrics = read_metrics(run / "metrics.csv")
    parity, sent = metrics["sync/parity_error"], metrics["sync/bytes"]
    assert len(parity) == 2
    assert max(parity) < 1e-3
    assert (sent[0] < 50e6) == (adapter_rank == "16")  # a tenth of the model's 538 MB, or all of it

    dppo("export", "--run", run, "--out", tmp_path / "merged")
    dppo("export", "--run", run, "--out", tmp_path / "adapter", "--adapter")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template
    text = read_jsonl(run / "completions.jsonl")[0]["prompt"]
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = next_log_probs(plain, text, tokenizer)
    merged = next_log_probs(
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32), text, tokenizer
    )
    apart = next_log_probs(PeftModel.from_pretrained(plain, str(tmp_path / "adapter")), text, tokenizer)
    np.testing.assert_allclose(merged, apart, atol=1e-3)
    assert (merged - before).abs().max() > 1e-3
