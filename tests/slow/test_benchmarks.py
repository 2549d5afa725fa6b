"""The benchmarks that run their peers, at their smallest: each ends in a line of JSON with the keys of the docs."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import Any

import pytest

from tests.helpers.places import ROOT

BENCHMARKS = ROOT / "benchmarks"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(peer) for peer in ("trl", "vllm")), reason="TRL or vLLM is not installed"
    ),
]


def last_line(name: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--rounds", "1", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_the_head_against_trl_and_full_logits() -> None:
    found = last_line("head", "--tokens", "64", "--words", "512", "--width", "32", "--long", "128")
    assert set(found) >= {
        "time_vs_trl",
        "time_vs_full_logits",
        "of_matmul_speed",
        "extra_mb",
        "extra_mb_16k",
        "extra_mb_full_logits",
        "bf16_speedup",
        "bf16_entropy_error",
        "topk_entropy_overhead",
        "full_tv_overhead",
    }
    assert found["bf16_entropy_error"] < 1e-4


def test_steps_against_trl(tiny_policy_dir: str) -> None:
    found = last_line("step", "--small", "--model", tiny_policy_dir)
    assert set(found) >= {"step_vs_trl", "train_tokens_per_s_vs_trl", "shared_prompt_speedup"}


def test_rollouts_against_bare_vllm(tiny_model_dir: str) -> None:
    found = last_line("rollout", "--model", tiny_model_dir, "--prompts", "2", "--samples", "2", "--words", "96",
                      "--prompt-length", "8", "--tokens", "4")  # fmt: skip
    assert set(found) == {"vs_bare_vllm", "vs_bare_vllm_top20"}
