"""One server of a fleet: its client, the requests that it works on, its weights, and its process when we started it."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dppo_lightning.base.errors import EngineError
from dppo_lightning.base.records import Completion
from dppo_lightning.generate.engine import Request
from dppo_lightning.generate.vllm.child_process import ChildProcess
from dppo_lightning.generate.vllm.client import ServerClient, ServerFault
from dppo_lightning.generate.vllm.identity import Identity
from dppo_lightning.generate.vllm.in_server import SERVER_KEY_VARIABLE

IN_SERVER = "dppo_lightning.generate.vllm.in_server"
"""Module that the server's process runs, and that has the classes which vLLM loads."""

LONGEST_TMPDIR = 107 - len("/dppo-12345678/") - 36
"""Most characters of a temporary folder: the path of a socket has at most 107, and vLLM names sockets by a UUID, in the
child's folder."""


@dataclass(frozen=True)
class Weights:
    """One version of the weights.

    Attributes:
        version: Weight version.
        file: Path of the file that holds the weights; "" for those that the servers began with.
        sums: Sums of some weights by name, to compare with the servers'.
    """

    version: int = 0
    file: str = ""
    sums: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """Limits of a fleet; the first four are arguments of VLLMRemote.

    Attributes:
        concurrency: Most requests at a time on one server, >= 1.
        request_timeout: Seconds within which a completion must arrive, > 0.
        startup_timeout: Seconds that a server may take to load, and that a fleet waits when no server is left, > 0.
        restarts: Most restarts in a row of a server that we started, >= 0.
        rejoin: Whether to try to get back a server that has failed; else it stays out.
    """

    concurrency: int
    request_timeout: float
    startup_timeout: float
    restarts: int
    rejoin: bool = True


@dataclass(frozen=True)
class ServerState:
    """State of one server.

    Attributes:
        url: URL of the server.
        up: It has the current weights and is given requests.
        reason: Why it is not up; "" when it is.
        in_flight: Number of requests that it works on.
        pid: Process id of a server that was started here and runs; None for any other.
    """

    url: str
    up: bool
    reason: str
    in_flight: int
    pid: int | None


@dataclass(eq=False)
class PendingRequest:
    """One request that is not answered yet.

    Attributes:
        request: The request.
        server: Server that works on it; None while it waits for one.
        task: Task that waits for the answer; None while it waits for a server.
        wire_id: Id that this attempt has on the server.
        aborted: The caller does not want the rest.
        errors: Number of servers that answered it with an error of their own.
    """

    request: Request
    server: Server | None = None
    task: asyncio.Task[None] | None = None
    wire_id: str = ""
    aborted: bool = False
    errors: int = 0

    def detach(self) -> None:
        """Take the request from its server, and end the task that waits for the answer."""
        if self.task is not None and self.task is not asyncio.current_task():
            self.task.cancel()
        if self.server is not None:
            self.server.requests.pop(self.request.id, None)
        self.server = self.task = None


@dataclass(eq=False)
class Server:
    """A server and its state.

    Attributes:
        client: Client that reaches it.
        local: Its process, when we started it.
        up: It has the current weights and is given requests.
        reason: Why it is not up.
        requests: Requests that it works on, by request id.
        restarts: Number of times that it was started again since it last finished a request.
        given_up: It will not be tried again.
    """

    client: ServerClient
    local: LocalServer | None = None
    up: bool = False
    reason: str = "not started"
    requests: dict[str, PendingRequest] = field(default_factory=dict)
    restarts: int = 0
    given_up: bool = False

    @property
    def url(self) -> str:
        """URL of the server; "" before one of ours was started."""
        return self.client.url

    def state(self) -> ServerState:
        """State of the server, as it is now."""
        pid = None if self.local is None else self.local.pid
        return ServerState(self.url, self.up, self.reason, len(self.requests), pid)

    async def wait_until_healthy(self, timeout: float) -> None:
        """Wait until the server answers; one that we started may take ``timeout`` seconds to load.

        Any other server must answer at once.

        Raises:
            ServerFault: It does not answer, or its process has ended.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while self.local is not None and not await self.client.healthy():
            self.local.check()
            if loop.time() > deadline:
                raise ServerFault(f"not ready within {timeout:g} s (VLLMRemote.startup_timeout)")
            await asyncio.sleep(0.2)
        if self.local is None:
            await self.client.ask("/health", timeout=10.0)

    async def load_weights(self, weights: Weights) -> None:
        """Load weights into the paused server, and compare some of their sums.

        Raises:
            ServerFault: The server fails, or holds other weights afterwards.
        """
        if not weights.file and await self.client.version() == "default":
            return  # it still has the weights that it began with
        for found in await self.client.call_workers("dppo_load", weights.file, json.dumps(list(weights.sums))):
            for name, value in found.items():
                if not math.isclose(value, weights.sums[name], rel_tol=1e-6, abs_tol=1e-6):
                    raise ServerFault(f"holds other weights than it was given: {name} sums up to {value}")

    async def put_in_force(self, version: int, resume: bool) -> None:
        """Forget what was computed with the weights before, and name the new ones.

        Args:
            version: Weight version of the new ones.
            resume: Whether to go on generating then.
        """
        await self.client.forget_prefixes()
        await self.client.set_version(version)
        if resume:
            await self.client.resume()

    async def generate(
        self, pending: PendingRequest, identity: Identity, limit: float, running_since: Callable[[], float | None]
    ) -> Completion:
        """Wait for the answer to a request; the time that the fleet is paused does not count.

        Args:
            pending: The request, with the id that it has here.
            identity: Model and settings of the run.
            limit: Seconds within which the completion must arrive.
            running_since: Function that returns since when the fleet has been generating, in the loop's time; None
                while it is paused.

        Raises:
            RequestRefused: The server says that the request is wrong.
            ServerFault: The server fails, or the time is up.
        """
        loop = asyncio.get_running_loop()
        begun = loop.time()
        work = self.client.generate(pending.request, pending.wire_id, identity.spec, identity.vocabulary)
        answer = loop.create_task(work)
        try:
            while True:
                resumed = running_since()
                left = limit if resumed is None else max(begun, resumed) + limit - loop.time()
                if left <= 0:
                    raise ServerFault(f"no completion within {limit:g} s (VLLMRemote.request_timeout)")
                done, _ = await asyncio.wait({answer}, timeout=max(left, 0.1))
                if done:
                    return answer.result()
        finally:
            answer.cancel()


class LocalServer:
    """The process of a server on this machine, reachable through the loopback interface only.

    Args:
        settings: Arguments of vLLM's EngineArgs.
        environment: The process's whole environment.
        key: Key that it will ask for.
    """

    def __init__(self, settings: Mapping[str, Any], environment: Mapping[str, str], key: str) -> None:
        self._settings = dict(settings)
        self._environment = {**environment, SERVER_KEY_VARIABLE: key, "VLLM_SERVER_DEV_MODE": "1"}
        self._child: ChildProcess | None = None
        self._port: socket.socket | None = None

    @property
    def pid(self) -> int | None:
        """Process id; None while no process runs."""
        child = self._child  # the fleet's thread may replace it meanwhile
        return child.pid if child is not None and child.alive else None

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._child is not None and self._child.alive

    def start(self) -> str:
        """Begin to load; return the URL at which the server will answer.

        Raises:
            ServerFault: The path of the temporary folder is too long.
        """
        self.close()
        folder = tempfile.gettempdir()
        if len(folder) > LONGEST_TMPDIR:
            raise ServerFault(f"vLLM's sockets need a shorter path than {folder}/...: set TMPDIR to a shorter one")
        self._port = hold_port()
        port = self._port.getsockname()[1]
        self._child = ChildProcess(IN_SERVER, self._environment, name="vLLM server")
        self._child.send("start", {**self._settings, **SERVING, "host": "127.0.0.1", "port": port})
        return f"http://127.0.0.1:{port}"

    def check(self) -> None:
        """Look whether the process still runs.

        Raises:
            ServerFault: It has ended; the message has the last lines of its log.
        """
        if self._child is None:
            raise ServerFault("it is not running")
        try:
            self._child.receive(0.0)
        except EngineError as error:
            try:
                self._child.give_up(str(error))  # keeps the log, and names it
            except EngineError as kept:
                raise ServerFault(str(kept)) from error

    def close(self) -> None:
        """End the process and free its port; safe to call twice."""
        if self._child is not None:
            self._child.close()
        if self._port is not None:
            self._port.close()
        self._child = self._port = None


SERVING: dict[str, Any] = {
    "enable_scale_out": True,  # the token-in, token-out route
    "worker_extension_cls": f"{IN_SERVER}.WeightExtension",
    "middleware": f"{IN_SERVER}.RequireKey",
    "uvicorn_log_level": "error",
    "disable_uvicorn_access_log": True,
}
"""Arguments of vLLM's API server, in addition to those of EngineArgs."""


def aborted_before_start(request: Request) -> Completion:
    """Completion of a request that was aborted before it had a token."""
    k = request.sampling.topk_logprobs
    return Completion(
        request_id=request.id,
        token_ids=np.empty(0, np.int64),
        logp=np.empty(0, np.float32),
        finish_reason="abort",
        versions=np.empty(0, np.int64),
        topk_ids=np.empty((0, k), np.int64) if k else None,
        topk_logp=np.empty((0, k), np.float32) if k else None,
    )


def hold_port(address: str = "127.0.0.1") -> socket.socket:
    """Find a free port, and keep it free for a server that is given its number until the socket returned is closed.

    The socket is bound and does not listen. Servers set SO_REUSEADDR, with which they can bind to the same port and
    listen; no program that asks the system for any free port gets this one.

    Args:
        address: Address of this machine to bind to.
    """
    holder = socket.socket()
    try:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((address, 0))
    except BaseException:
        holder.close()
        raise
    return holder
