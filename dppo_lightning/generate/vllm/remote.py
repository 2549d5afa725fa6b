"""VLLMRemote: vLLM servers, on this machine or on others, behind the interface of every engine."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Literal

import aiohttp
import torch
from torch import Tensor

from dppo_lightning.base.errors import ConfigError, EngineError
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
from dppo_lightning.generate.vllm.client import ServerClient, check_urls, find_key
from dppo_lightning.generate.vllm.event_loop import EventLoop
from dppo_lightning.generate.vllm.fleet import Fleet
from dppo_lightning.generate.vllm.identity import Identity
from dppo_lightning.generate.vllm.nccl import NCCL_SETTINGS, NCCLTransfer
from dppo_lightning.generate.vllm.server import Limits, LocalServer, Server, ServerState, Weights
from dppo_lightning.generate.vllm.settings import (
    ProcessSettings,
    check_weight_route,
    refuse_below,
    refuse_not_positive,
    require_vllm,
)
from dppo_lightning.generate.vllm.weight_memory import FileTransfer

CLOSE_SECONDS = 2.0
"""Seconds that the fleet gets to end its work before the servers that are ours are ended all the same."""


class VLLMRemote(RolloutEngine):
    """Generate with one or many vLLM servers, given by URL or started here.

    Each completion is one HTTP request with its own seed, sent to the server that has the fewest requests. A server
    that fails is put out of service: its requests go to the others with the same seeds and begin again. It is tried
    again in the background and comes back once it holds the current weights; one that was started here and died is
    started again. The server reports which weight version sampled each token, so an update reaches completions in
    flight as it does in VLLMEmbedded: tokens so far stay, with the versions and log-probs that they were sampled with.

    docs/remote-engine.md has the command that starts a server elsewhere.

    Args:
        urls: URLs of servers that run already, e.g. ["http://node7:8000"]; None: start some here.
        servers: Number of servers to start here, >= 1, when there are no ``urls``. They listen on the loopback
            interface only and end with this process.
        api_key: Key that the servers at ``urls`` ask for; None: the environment variable DPPO_API_KEY. Servers that
            are started here get a random one.
        max_concurrency: Most requests at a time on one server, >= 1; the rest wait here.
        request_timeout: Seconds within which a completion must arrive, > 0; otherwise the server counts as failed.
        startup_timeout: Seconds that a server may take to load, or to answer any command, > 0; also the seconds that
            the engine waits when no server is left before it gives up.
        max_restarts: Most restarts of a server that was started here without a finished request in between, >= 0.
        weights: Route of the weights. "shared_memory": servers of this user on this machine read the trainer's memory.
            "checkpoint": through safetensors files in ``weights_dir``; slow, works everywhere. "native": vLLM's own
            weight transfer over NCCL, from GPU to GPU; written against vLLM's interface, has not run on hardware. It
            holds a second copy of the weights on the trainer's GPU while it sends, and a server that fails stays out.
        weights_dir: Folder that trainer and servers see under the same path, for "checkpoint".
        kv_cache_gib: Memory for keys and values, in GiB, > 0, as in VLLMEmbedded. This and all that follows is for
            servers that are started here.
        gpu_memory_utilization: Share of the GPU's memory that vLLM may take, in (0, 1].
        max_num_seqs: Most completions that one server generates at a time, >= 1.
        enforce_eager: Do not compile and do not capture CUDA graphs: starts sooner; on GPUs generates slower.
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
        self.settings = ProcessSettings(
            "VLLMRemote", kv_cache_gib, gpu_memory_utilization, max_num_seqs, enforce_eager, threads
        )
        refuse_below(1, "VLLMRemote", servers=servers, max_concurrency=max_concurrency)
        refuse_below(0, "VLLMRemote", max_restarts=max_restarts)
        refuse_not_positive("VLLMRemote", request_timeout=request_timeout, startup_timeout=startup_timeout)
        self.urls = None if urls is None else [url.rstrip("/") for url in urls]
        self.servers = servers
        self.max_concurrency = max_concurrency
        self.request_timeout = request_timeout
        self.startup_timeout = startup_timeout
        self.max_restarts = max_restarts
        self.weights = weights
        self.weights_dir = weights_dir
        check_weight_route(weights, weights_dir)
        self._key = self._choose_key(api_key)
        self._changed = threading.Condition()
        self._fleet: Fleet | None = None
        self._loop: EventLoop | None = None
        self._transfer: FileTransfer | NCCLTransfer | None = None
        self._reset()

    def _choose_key(self, given: str | None) -> str:
        if self.urls is None:
            if given is not None:
                raise ConfigError(
                    "VLLMRemote: servers that are started here get a random key: drop api_key, or set urls"
                )
            return secrets.token_urlsafe(32)
        if self.servers != 1:
            raise ConfigError("VLLMRemote: either urls, or servers to start here, not both")
        check_urls(self.urls)
        return find_key(given)

    def _reset(self) -> None:
        self._in_flight: set[str] = set()
        self._arrived: list[Completion | Failed] = []
        self._held: list[Completion | Failed] = []
        self._error: EngineError | None = None
        self._paused = False
        self._version = 0

    def start(self, spec: EngineSpec) -> None:
        if self.urls is None:
            require_vllm("name servers that run elsewhere in data.engine.urls")
        self.close()
        self._spec = spec
        try:
            if self.weights == "native":
                self._identity = Identity(spec)
            else:
                self._transfer = FileTransfer(None if self.weights_dir is None else Path(self.weights_dir))
                self._identity = Identity(spec, self._transfer.probe_path, self._transfer.probe_content)
        except (ConfigError, OSError) as error:
            self.close()
            raise EngineError(str(error)) from error
        self._loop = EventLoop("VLLMRemote")
        try:
            self._fleet = self._loop.run(self._build())
            starting = self._loop.begin(self._fleet.start())
            self._expected = ExpectedWeights.of(spec.model)  # while the servers load
            starting.result()
            if self.weights == "native":
                self._transfer = NCCLTransfer([server.client for server in self._fleet.servers], self._loop)
        except BaseException:
            self.close()
            raise

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
        members = [Server(client, self._new_local_server() if self.urls is None else None) for client in clients]
        return Fleet(members, self._identity, limits, self._deliver, self._fail)

    def _new_local_server(self) -> LocalServer:
        arguments = self.settings.vllm_arguments(self._spec)
        arguments |= {"max_logprobs": self._identity.needed_logprobs, "served_model_name": self._spec.model}
        if self.weights == "native":
            arguments |= NCCL_SETTINGS
        return LocalServer(arguments, self.settings.environment(self._spec), self._key)

    def submit(self, requests: Sequence[Request]) -> None:
        fleet, loop = self._running()
        reasons = [refusal(request, self._spec, self._identity.vocabulary) for request in requests]
        accepted = [request for request, reason in zip(requests, reasons, strict=True) if reason is None]
        refused = zip(requests, reasons, strict=True)
        with self._changed:
            self._in_flight.update(request.id for request in accepted)
            self._arrived.extend(Failed(request.id, reason) for request, reason in refused if reason is not None)
        loop.call_soon(fleet.submit, accepted)

    def poll(self, timeout: float | None = None) -> list[Completion | Failed]:
        """Do as the base class says; return at once while paused, when nothing can finish."""
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
        """Take a result from the fleet; what a server had finished just before a pause is kept until ``resume``."""
        with self._changed:
            aborted = isinstance(result, Completion) and result.finish_reason == "abort"
            if self._paused and not aborted:
                self._held.append(result)
                return
            self._in_flight.discard(result.request_id)
            self._arrived.append(result)
            self._changed.notify_all()

    def _fail(self, error: EngineError) -> None:
        """Take from the fleet the reason why no more results will come."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def abort(self, ids: Iterable[str]) -> None:
        unwanted = set(ids)
        fleet, loop = self._running()
        loop.run(fleet.abort(unwanted))
        with self._changed:
            self._release([result for result in self._held if result.request_id in unwanted])

    def pause(self) -> None:
        fleet, loop = self._running()
        loop.run(fleet.pause())
        self._paused = True

    def resume(self) -> None:
        fleet, loop = self._running()
        with self._changed:
            self._paused = False
            self._release(self._held)
        loop.run(fleet.resume())

    def _release(self, results: Sequence[Completion | Failed]) -> None:
        """Hand out results that were kept during a pause."""
        released = {result.request_id for result in results}
        self._arrived.extend(result for result in self._held if result.request_id in released)
        self._held = [result for result in self._held if result.request_id not in released]
        self._in_flight -= released

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> UpdateStats:
        fleet, loop = self._running()
        started = time.perf_counter()
        if isinstance(self._transfer, FileTransfer):
            tensors, size = self._update_by_file(fleet, loop, self._transfer, named_tensors, version)
        else:
            assert self._transfer is not None
            tensors, size = self._update_by_nccl(fleet, loop, self._transfer, named_tensors, version)
        self._version = version
        return UpdateStats(tensors, size, time.perf_counter() - started, version)

    def _update_by_file(
        self,
        fleet: Fleet,
        loop: EventLoop,
        files: FileTransfer,
        named_tensors: Iterable[tuple[str, Tensor]],
        version: int,
    ) -> tuple[int, int]:
        """Send the weights in a file; return the number of tensors and of bytes."""
        file = files.write(named_tensors, self._expected, getattr(torch, self._spec.dtype))
        try:
            loop.run(fleet.update(Weights(version, file.path, file.sums)))
        finally:
            files.delete_older()
        return len(file.shapes), file.bytes

    def _update_by_nccl(
        self,
        fleet: Fleet,
        loop: EventLoop,
        transfer: NCCLTransfer,
        named_tensors: Iterable[tuple[str, Tensor]],
        version: int,
    ) -> tuple[int, int]:
        """Send the weights by vLLM's own transfer; return the number of tensors and of bytes."""
        weights = [(name, tensor.detach()) for name, tensor in self._expected.once(named_tensors)]
        self._expected.check({name: tensor.shape for name, tensor in weights})
        up = loop.run(fleet.begin_update(Weights(version)))
        transfer.send(weights, [server.client for server in up])
        loop.run(fleet.end_update())
        return len(weights), sum(tensor.numel() * tensor.element_size() for _, tensor in weights)

    def server_states(self) -> list[ServerState]:
        """State of every server, in the order of ``urls``; empty before ``start`` and after ``close``."""
        return [] if self._fleet is None else [server.state() for server in self._fleet.servers]

    def health(self) -> Health:
        servers = self.server_states()
        if not servers:
            return Health(False, self._version, 0, "vLLM servers, not started")
        states = [server.url + ("" if server.up else f" (out: {server.reason})") for server in servers]
        alive = self._error is None and any(server.up for server in servers)
        return Health(alive, self._version, len(self._in_flight), f"vLLM at {', '.join(states)}; {self._spec.dtype}")

    def close(self) -> None:
        if isinstance(self._transfer, NCCLTransfer):
            self._transfer.close()  # while the loop still runs
        if self._loop is not None:
            self._stop_loop(self._loop)
        if self._transfer is not None:
            self._transfer.close()
        self._fleet = self._loop = self._transfer = None
        self._reset()

    def _stop_loop(self, loop: EventLoop) -> None:
        """End the servers that are ours, also when the fleet does not end its work, and then the loop."""
        members = [] if self._fleet is None else self._fleet.servers
        if self._fleet is not None:
            with suppress(TimeoutError, RuntimeError):
                loop.begin(self._close_fleet(self._fleet)).result(CLOSE_SECONDS)
        processes = [server.local for server in members if server.local is not None]
        with ThreadPoolExecutor(max(1, len(processes))) as executor:
            list(executor.map(LocalServer.close, processes))
        loop.stop()

    async def _close_fleet(self, fleet: Fleet) -> None:
        await fleet.close()
        await self._session.close()

    def _running(self) -> tuple[Fleet, EventLoop]:
        if self._fleet is None or self._loop is None:
            raise EngineError("the engine is not running: call start first")
        if self._error is not None and not self._arrived:
            raise self._error
        return self._fleet, self._loop
