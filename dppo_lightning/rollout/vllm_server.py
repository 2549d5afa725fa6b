"""One server of a fleet: its client, what it is doing, and its process when we started it."""

from __future__ import annotations

import asyncio
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dppo_lightning.errors import EngineError
from dppo_lightning.rollout.child_process import ChildProcess
from dppo_lightning.rollout.engine import Request
from dppo_lightning.rollout.ports import hold_port
from dppo_lightning.rollout.vllm_http import ServerClient, ServerFault

LAUNCHER = "dppo_lightning.rollout.vllm_launcher"
EXTENSION = "dppo_lightning.rollout.vllm_extension"

LONGEST_TMPDIR = 107 - len("/dppo-12345678/") - 36
"""The path of a socket has at most 107 characters; vLLM names them by a UUID, in the child's folder."""


@dataclass(eq=False)
class Job:
    """One request on its way.

    Attributes:
        request: What was asked for.
        server: Where it is; None while it waits for one.
        task: That waits for the answer.
        wire_id: The id that this attempt has on the server.
        aborted: The caller does not want the rest.
        errors: How often a server answered it with an error of its own.
    """

    request: Request
    server: Server | None = None
    task: asyncio.Task[None] | None = None
    wire_id: str = ""
    aborted: bool = False
    errors: int = 0


@dataclass(eq=False)
class Server:
    """A server and its state.

    Attributes:
        client: How to reach it.
        local: Its process, when we started it.
        up: It has the current weights and is given requests.
        reason: Why it is not up.
        jobs: What it works on, by request id.
        restarts: How often it was started again since it last finished a request.
        given_up: It will not be tried again.
    """

    client: ServerClient
    local: LocalServer | None = None
    up: bool = False
    reason: str = "not started"
    jobs: dict[str, Job] = field(default_factory=dict)
    restarts: int = 0
    given_up: bool = False

    @property
    def url(self) -> str:
        return self.client.url

    async def wait_until_healthy(self, timeout: float) -> None:
        """A server that we started gets ``timeout`` seconds to load; any other must answer at once."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while self.local is not None and not await self.client.healthy():
            self.local.check()
            if loop.time() > deadline:
                raise ServerFault(f"not ready within {timeout:g} s (VLLMRemote.startup_timeout)")
            await asyncio.sleep(0.2)
        if self.local is None:
            await self.client.ask("/health", timeout=10.0)


class LocalServer:
    """The process of a server on this machine, reachable through the loopback interface only.

    Args:
        settings: Arguments of vLLM's EngineArgs.
        environment: The process's whole environment.
        key: That it will ask for.
    """

    def __init__(self, settings: Mapping[str, Any], environment: Mapping[str, str], key: str) -> None:
        self._settings = dict(settings)
        self._environment = {**environment, "VLLM_API_KEY": key, "VLLM_SERVER_DEV_MODE": "1"}
        self._child: ChildProcess | None = None
        self._port: socket.socket | None = None

    @property
    def pid(self) -> int:
        assert self._child is not None
        return self._child.pid

    @property
    def alive(self) -> bool:
        return self._child is not None and self._child.alive

    def start(self) -> str:
        """Begin to load; returns the URL at which the server will answer."""
        self.close()
        folder = tempfile.gettempdir()
        if len(folder) > LONGEST_TMPDIR:
            raise ServerFault(f"vLLM's sockets need a shorter path than {folder}/...: set TMPDIR to a shorter one")
        self._port = hold_port()
        port = self._port.getsockname()[1]
        self._child = ChildProcess(LAUNCHER, self._environment, name="vLLM server")
        self._child.send("start", {**self._settings, **SERVING, "host": "127.0.0.1", "port": port})
        return f"http://127.0.0.1:{port}"

    def check(self) -> None:
        """Raises ServerFault, with its last words, when the process has ended."""
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
        if self._child is not None:
            self._child.close()
        if self._port is not None:
            self._port.close()
        self._child = self._port = None


SERVING: dict[str, Any] = {
    "enable_scale_out": True,  # the token-in, token-out route
    "worker_extension_cls": f"{EXTENSION}.WeightExtension",
    "middleware": f"{EXTENSION}.RequireKey",
    "uvicorn_log_level": "error",
    "disable_uvicorn_access_log": True,
}
