"""VLLMEmbedded: vLLM on this machine, in a child process of our own.

In the trainer's process vLLM would reseed the global generators, rewrite the environment and capture the default
process group; so it lives in a child (worker.py), and the trainer never imports it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dppo_lightning.base.errors import ConfigError, EngineError, SyncError
from dppo_lightning.base.pretrained import load_config
from dppo_lightning.base.records import Completion
from dppo_lightning.generate.engine import (
    EngineSpec,
    ExpectedWeights,
    Failed,
    Health,
    Request,
    RolloutEngine,
    UpdateStats,
    refusal,
)
from dppo_lightning.generate.vllm import adapters, ipc
from dppo_lightning.generate.vllm.child_process import ChildProcess
from dppo_lightning.generate.vllm.settings import ProcessSettings, refuse_below, refuse_not_positive, require_vllm
from dppo_lightning.generate.vllm.supervision import EngineProcess
from dppo_lightning.generate.vllm.weight_memory import SharedBlock

WORKER = "dppo_lightning.generate.vllm.worker"


class VLLMEmbedded(RolloutEngine):
    """Generate with one copy of the model, on the CPU or on one GPU, as the installed vLLM decides: the default engine.

    On GPUs it is written against vLLM's interface and has not run on hardware.

    An update reaches completions in flight: their tokens so far stay, with the versions and log-probs that they were
    sampled with; keys and values are recomputed under the new weights, so each later token has the log-prob that the
    new weights give it after the whole text so far.

    When its process dies, another is started, gets the weights of the last update and every request that is not
    answered, each with its own seed, and goes on; a line of the log reports it. An error while an update's weights are
    being written leaves the engine as it is, but it cannot be started again before the next update.

    Updates go through one block of shared memory, which holds one copy of the model in the engine's dtype, or in the
    trainer's where that is smaller; in addition the trainer needs memory for one tensor at a time. Rounding there is
    the rounding that vLLM would do on arrival; it is left to vLLM for models of which vLLM keeps some weights in a
    wider dtype. The copy stays, for a process that is started again.

    Args:
        kv_cache_gib: Memory for keys and values, in GiB, > 0. None: 1 on the CPU; on a GPU what
            ``gpu_memory_utilization`` leaves.
        gpu_memory_utilization: Share of the GPU's memory that vLLM may take, in (0, 1].
        max_num_seqs: Most completions generated at a time, >= 1.
        enforce_eager: Do not compile and do not capture CUDA graphs: starts sooner; on GPUs generates slower.
        threads: CPU threads of the engine, >= 1; None: as many as there are cores.
        startup_timeout: Seconds to wait for the engine to be ready, and for its answer to any command, > 0.
        log_file: File for vLLM's messages; None: a temporary file, which stays only when the engine cannot go on.
        adapter_rank: Rank of the policy's LoRA adapters, in [1, 512]: updates bring them alone, and vLLM adds them
            while it generates. None: updates bring every weight.
        max_restarts: Most restarts in a row of a process that dies, >= 0; a completion ends the row. A process that
            never became ready is not started again.
        weights: Route of the weights: "shared_memory"; or "ipc", vLLM's own transfer between processes that share one
            CUDA GPU, which has not run on hardware. It keeps no copy: after the first update the engine cannot be
            started again.
        bucket_mib: Size of the buffer on the GPU that weights pass through with "ipc", in MiB, >= 1; a larger tensor
            gets a larger buffer.

    Attributes:
        wire_dtype: Dtype that wider weights are rounded to on their way to vLLM; None: they are sent as they are. Set
            by ``start``.

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
        self.settings = ProcessSettings(
            "VLLMEmbedded", kv_cache_gib, gpu_memory_utilization, max_num_seqs, enforce_eager, threads
        )
        refuse_not_positive("VLLMEmbedded", startup_timeout=startup_timeout)
        adapters.check_rank(adapter_rank)
        refuse_below(0, "VLLMEmbedded", max_restarts=max_restarts)
        if weights not in ("shared_memory", "ipc"):
            raise ConfigError(f"VLLMEmbedded: weights must be shared_memory or ipc, got {weights}")
        refuse_below(1, "VLLMEmbedded", bucket_mib=bucket_mib)
        self.adapter_rank = adapter_rank
        self.startup_timeout = startup_timeout
        self.log_file = log_file
        self.max_restarts = max_restarts
        self.weights = weights
        self.bucket_mib = bucket_mib
        self.wire_dtype: torch.dtype | None = None
        self._process: EngineProcess | None = None
        self._block: SharedBlock | None = None
        self._version = 0

    def start(self, spec: EngineSpec) -> None:
        require_vllm("set data.engine to TransformersEngine")
        if self.weights == "ipc":
            ipc.check_gpu(torch.cuda.is_available())
        self.close()
        try:
            self._vocabulary = load_config(spec.model).get_text_config().vocab_size
        except ConfigError as error:
            raise EngineError(str(error)) from error
        self._spec = spec
        self._block = SharedBlock()
        transfer = {"weight_transfer_config": ipc.CONFIG if self.weights == "ipc" else None}
        arguments = self.settings.vllm_arguments(spec) | adapters.vllm_arguments(self.adapter_rank) | transfer
        child, message = self.launch_worker(spec, self._block), (arguments, spec.stop_token_ids)
        self._process = EngineProcess(child, message, self.startup_timeout, self.max_restarts)
        expected = ExpectedWeights.of(spec.model)  # while the child loads
        self._expected = adapters.ExpectedAdapters(expected, self.adapter_rank) if self.adapter_rank else expected
        self._process.wait_until_ready()
        _, uniform = self._process.ready
        self.wire_dtype = getattr(torch, spec.dtype) if uniform else None

    def launch_worker(self, spec: EngineSpec, block: SharedBlock) -> ChildProcess:
        """Start the process that vLLM will run in; a subclass may start another that speaks as worker.py does."""
        log = None if self.log_file is None else Path(self.log_file)
        return ChildProcess(WORKER, self.settings.environment(spec), [block.descriptor], log, "vLLM")

    @property
    def pid(self) -> int | None:
        """Process id of vLLM's process; None before ``start`` and after ``close``."""
        return None if self._process is None else self._process.child.pid

    def submit(self, requests: Sequence[Request]) -> None:
        process = self._running()
        reasons = [refusal(request, self._spec, self._vocabulary) for request in requests]
        process.submit([request for request, reason in zip(requests, reasons, strict=True) if reason is None])
        refused = zip(requests, reasons, strict=True)
        process.refuse(Failed(request.id, reason) for request, reason in refused if reason is not None)

    def poll(self, timeout: float | None = None) -> list[Completion | Failed]:
        """Do as the base class says; return at once while paused, when nothing can finish."""
        return self._running().poll(timeout)

    def abort(self, ids: Iterable[str]) -> None:
        self._running().abort(set(ids))

    def pause(self) -> None:
        self._running().pause()

    def resume(self) -> None:
        self._running().resume()

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> UpdateStats:
        """Do as the base class says.

        Raises:
            EngineError: The engine cannot go on; with ``weights: ipc`` also for names and shapes that are found to be
                wrong when some weights are loaded already.
        """
        process = self._running()
        started = time.perf_counter()
        send = self._send_by_ipc if self.weights == "ipc" else self._send_by_block
        tensors, sent = send(process, self._expected.once(named_tensors), version)
        self._version = version
        return UpdateStats(tensors, sent, time.perf_counter() - started, version)

    def _send_by_block(
        self, process: EngineProcess, named_tensors: Iterator[tuple[str, Tensor]], version: int
    ) -> tuple[int, int]:
        """Send the weights through the shared block; return the number of tensors and of bytes."""
        assert self._block is not None
        if process.weights is not None:  # before the first update the weights in force are in the model's folder
            process.forget_weights("an update that failed has overwritten the copy of its weights")
        manifest = self._block.write(named_tensors, self.wire_dtype)
        self._expected.check({entry.name: entry.shape for entry in manifest.entries})
        process.load((manifest, version))
        return len(manifest.entries), manifest.bytes

    def _send_by_ipc(
        self, process: EngineProcess, named_tensors: Iterator[tuple[str, Tensor]], version: int
    ) -> tuple[int, int]:
        """Send the weights by vLLM's own transfer; return the number of tensors and of bytes."""
        process.forget_weights("weights: ipc keeps no copy of its weights; shared_memory does")
        shapes: dict[str, list[int]] = {}
        sent = 0
        try:
            process.command("transfer", version)
            for chunk in ipc.chunks(named_tensors, self.bucket_mib * 2**20, self.wire_dtype):
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
