"""Settings of vLLM that every engine of ours shares: its environment and its arguments."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dppo_lightning.rollout.engine import EngineSpec

ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",  # spinning OpenMP threads take the cores from the trainer, and from vLLM itself
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the child is the process of its own already
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "false",
}

NOT_INHERITED = (
    # The trainer's place among its ranks: vLLM's own process group has one member.
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    "VLLM_CPU_KVCACHE_SPACE",  # would override kv_cache_gib
)


def child_environment(spec: EngineSpec, enforce_eager: bool, threads: int | None) -> dict[str, str]:
    """Whole environment of a process that runs vLLM; the trainer's own is left as it is."""
    environment = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED} | ENVIRONMENT
    package = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    if enforce_eager:
        # Otherwise the first request that asks for log-probs compiles a small kernel for seconds.
        environment["TORCHDYNAMO_DISABLE"] = "1"
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    if Path(spec.model).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    return environment


def engine_settings(
    spec: EngineSpec,
    kv_cache_gib: float | None,
    gpu_memory_utilization: float,
    max_num_seqs: int,
    enforce_eager: bool,
) -> dict[str, Any]:
    """Arguments of vLLM's EngineArgs."""
    return {
        "model": spec.model,
        "dtype": spec.dtype,
        "max_model_len": spec.max_model_len,
        "max_logprobs": max(spec.max_logprobs, 1),
        "logprobs_mode": "processed_logprobs",  # of the distribution that is sampled from
        "skip_tokenizer_init": True,
        "enable_prefix_caching": True,
        "generation_config": "vllm",  # nothing in the model's folder may change how tokens are drawn
        "max_num_seqs": max_num_seqs,
        "gpu_memory_utilization": gpu_memory_utilization,
        "kv_cache_memory_bytes": None if kv_cache_gib is None else int(kv_cache_gib * 2**30),
        "enforce_eager": enforce_eager,
        "seed": spec.seed % 2**32,
        "disable_log_stats": True,
    }
