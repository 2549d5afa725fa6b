"""Fleet: requests spread over vLLM servers, none lost and none answered twice, whatever becomes of a server.

Everything here runs in one event loop; between two ``await`` nothing else happens, so no state needs a lock.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import uuid
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from dppo_lightning.errors import EngineError
from dppo_lightning.records import Completion
from dppo_lightning.rollout.engine import Failed, Request
from dppo_lightning.rollout.vllm_http import RequestRefused, ServerFault
from dppo_lightning.rollout.vllm_identity import Identity
from dppo_lightning.rollout.vllm_server import Job, Server

ERRORS = 3
"""A request that so many servers answered with an error of their own is given up: it may be the cause."""

ABORT_SECONDS = 5.0
PROBE_SECONDS = (0.5, 30.0)
"""Shortest and longest wait between two attempts to get a server back."""

UNHEALTHY = 3
"""After so many attempts in vain a server of our own that lives but does not answer is ended."""

log = logging.getLogger("dppo_lightning.rollout")


@dataclass(frozen=True)
class Weights:
    """One version of the weights: the file that holds it ("" for what the servers began with), and sums to compare."""

    version: int = 0
    file: str = ""
    sums: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """Requests at a time on one server, seconds, and restarts; see VLLMRemote."""

    concurrency: int
    request_timeout: float
    startup_timeout: float
    restarts: int
    rejoin: bool = True


class Fleet:
    """Serves until it is closed.

    Args:
        servers: At least one.
        identity: What each must be.
        limits: See there.
        deliver: Is given every result.
        stop: Is told why nothing more will come.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        identity: Identity,
        limits: Limits,
        deliver: Callable[[Completion | Failed], None],
        stop: Callable[[EngineError], None],
    ) -> None:
        self.servers = list(servers)
        self.identity = identity
        self.limits = limits
        self.weights = Weights()
        self.paused = False
        self.error: EngineError | None = None
        self._deliver = deliver
        self._stop = stop
        self._jobs: dict[str, Job] = {}
        self._waiting: deque[Job] = deque()
        self._updating = False
        self._resumed = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._alarm: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Bring every server up.

        Raises:
            EngineError: One cannot be reached, or is not what the run needs.
        """
        outcomes = await asyncio.gather(*(self._bring_up(server) for server in self.servers), return_exceptions=True)
        for server, outcome in zip(self.servers, outcomes, strict=True):
            if isinstance(outcome, ServerFault):
                raise EngineError(f"vLLM server {server.url or 'of our own'}: {outcome}")
            if isinstance(outcome, BaseException):
                raise outcome
            server.up, server.reason = True, ""

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            job = self._jobs[request.id] = Job(request)
            self._waiting.append(job)
        self._dispatch()

    async def abort(self, ids: Collection[str]) -> None:
        """Returns when every one of them has been delivered."""
        jobs = [self._jobs[name] for name in ids if name in self._jobs]
        for job in jobs:
            job.aborted = True
        for job in [job for job in self._waiting if job.aborted]:
            self._waiting.remove(job)
            self._finish(job, nothing(job.request))
        loop = asyncio.get_running_loop()
        deadline = loop.time() + ABORT_SECONDS
        while (left := self._unfinished(jobs)) and loop.time() < deadline:
            servers = {job.server for job in left if job.server is not None}
            await asyncio.gather(*(self._abort_on(server, left) for server in servers))
            if tasks := [job.task for job in self._unfinished(left) if job.task is not None]:
                # A request that had not reached the engine when it was aborted goes on: it is told again.
                await asyncio.wait(tasks, timeout=0.1)
        for job in self._unfinished(jobs):
            self._withdraw(job)
            self._finish(job, nothing(job.request))
        self._dispatch()

    def _unfinished(self, jobs: Iterable[Job]) -> list[Job]:
        return [job for job in jobs if self._jobs.get(job.request.id) is job]

    async def _abort_on(self, server: Server, jobs: Iterable[Job]) -> None:
        try:
            await server.client.abort([job.wire_id for job in jobs if job.server is server])
        except ServerFault as fault:
            self._take_out(server, str(fault))

    async def pause(self) -> None:
        self.paused = True
        await self._each_up(lambda server: server.client.pause(keep=True))

    async def resume(self) -> None:
        await self._each_up(lambda server: server.client.resume())
        self._resumed = asyncio.get_running_loop().time()
        self.paused = False
        self._dispatch()

    async def hold(self, weights: Weights) -> list[Server]:
        """Stop generating, for an update of the caller's that ``release`` ends; returns the servers that are up."""
        self.weights = weights
        self._updating = True
        await self._each_up(lambda server: server.client.pause(keep=True))
        return [server for server in self.servers if server.up]

    async def release(self) -> None:
        await self._each_up(self._put_in_force)
        await self._after_update()

    async def update(self, weights: Weights) -> None:
        """Give the weights to every server. Requests in flight go on under them; servers that are out get them later.

        Raises:
            EngineError: No server is left.
        """
        await self.hold(weights)
        await self._each_up(lambda server: self._give(server, weights))
        await self._after_update()

    async def _after_update(self) -> None:
        while self.error is None and not any(server.up for server in self.servers):
            await asyncio.sleep(0.05)
        self._updating = False
        self._resumed = asyncio.get_running_loop().time()
        if self.error is not None:
            raise self.error
        self._dispatch()

    async def _each_up(self, action: Callable[[Server], Coroutine[None, None, None]]) -> None:
        """At the same time on every server that is up; one that fails is taken out."""

        async def attempt(server: Server) -> None:
            try:
                await action(server)
            except ServerFault as fault:
                self._take_out(server, str(fault))

        await asyncio.gather(*(attempt(server) for server in self.servers if server.up))

    async def _give(self, server: Server, weights: Weights) -> None:
        """Load weights into a paused server, check what came of it, and go on."""
        client = server.client
        if weights.file or await client.version() != "default":
            for found in await client.worker("dppo_load", weights.file, json.dumps(list(weights.sums))):
                for name, value in found.items():
                    if not math.isclose(value, weights.sums[name], rel_tol=1e-6, abs_tol=1e-6):
                        raise ServerFault(f"holds other weights than it was given: {name} sums up to {value}")
        await self._put_in_force(server)

    async def _put_in_force(self, server: Server) -> None:
        version = self.weights.version
        await server.client.forget_prefixes()
        await server.client.set_version(version)
        if not self.paused:
            await server.client.resume()

    async def _bring_up(self, server: Server) -> None:
        """Start the server if it is ours and dead; see that it is what we need, empty it, and give it the weights."""
        if server.local is not None and not server.local.alive:
            server.client.url = server.local.start()
        await server.wait_until_healthy(self.limits.startup_timeout)
        await self.identity.check(server.client)
        weights = None
        while weights is not self.weights:  # an update may come while the last one is given
            weights = self.weights
            await server.client.pause(keep=False)
            await self._give(server, weights)

    async def _recover(self, server: Server) -> None:
        wait, longest = PROBE_SECONDS
        attempts = 0
        while not server.up:
            if server.local is not None and not server.local.alive:
                if server.restarts >= self.limits.restarts:
                    server.given_up = True
                    self._look_around()
                    return
                server.restarts += 1
            try:
                await self._bring_up(server)
            except ServerFault as fault:
                server.reason = str(fault)
                attempts += 1
                if server.local is not None and attempts % UNHEALTHY == 0:
                    server.local.close()
                await asyncio.sleep(wait)
                wait = min(2 * wait, longest)
            else:
                server.up, server.reason = True, ""
                log.info("vLLM server %s is back, with weight version %d", server.url, self.weights.version)
                self._look_around()
                self._dispatch()

    def _take_out(self, server: Server, reason: str) -> None:
        """Give the server's requests to others, and try to get it back."""
        if not server.up:
            return
        server.up, server.reason = False, reason
        log.warning("vLLM server %s is out, its %d requests go to others: %s", server.url, len(server.jobs), reason)
        for job in reversed(list(server.jobs.values())):
            self._withdraw(job)
            if job.aborted:
                self._finish(job, nothing(job.request))
            else:
                self._waiting.appendleft(job)
        if self.limits.rejoin:
            self._spawn(self._recover(server))
        else:
            server.given_up = True
        self._look_around()
        self._dispatch()

    def _withdraw(self, job: Job) -> None:
        if job.task is not None and job.task is not asyncio.current_task():
            job.task.cancel()
        if job.server is not None:
            job.server.jobs.pop(job.request.id, None)
        job.server = job.task = None

    def _look_around(self) -> None:
        """Notice when no server is left, and for how long."""
        if any(server.up for server in self.servers):
            if self._alarm is not None:
                self._alarm.cancel()
            self._alarm = None
        elif all(server.given_up for server in self.servers):
            self._give_up()
        elif self._alarm is None:
            self._alarm = asyncio.get_running_loop().call_later(self.limits.startup_timeout, self._give_up)

    def _give_up(self) -> None:
        reasons = "; ".join(f"{server.url}: {server.reason}" for server in self.servers)
        self._fail(EngineError(f"no vLLM server is left ({reasons})"))

    def _fail(self, error: EngineError) -> None:
        self.error = error
        self._stop(error)

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            failure = EngineError(f"VLLMRemote failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._fail(failure)

    def _dispatch(self) -> None:
        """Give waiting requests to the servers with the fewest."""
        while self._waiting and not self.paused and not self._updating and self.error is None:
            free = [server for server in self.servers if server.up and len(server.jobs) < self.limits.concurrency]
            if not free:
                return
            server = min(free, key=lambda server: len(server.jobs))
            job = self._waiting.popleft()
            job.server, job.wire_id = server, uuid.uuid4().hex
            server.jobs[job.request.id] = job
            job.task = self._spawn(self._run(job, server))

    async def _run(self, job: Job, server: Server) -> None:
        try:
            result: Completion | Failed = await self._generate(job, server)
            server.restarts = 0
        except RequestRefused as error:
            result = Failed(job.request.id, str(error))
        except ServerFault as fault:
            job.errors += fault.status is not None
            if job.aborted:
                result = nothing(job.request)
            elif job.errors < ERRORS:
                self._take_out(server, str(fault))
                return
            else:
                result = Failed(job.request.id, f"{job.errors} servers failed at it: {fault}")
            if not job.aborted or fault.status is None:
                self._withdraw(job)
                self._take_out(server, str(fault))
        self._withdraw(job)
        self._finish(job, result)
        self._dispatch()

    async def _generate(self, job: Job, server: Server) -> Completion:
        """Wait for the answer; the time that the fleet is paused does not count."""
        loop = asyncio.get_running_loop()
        begun, limit = loop.time(), self.limits.request_timeout
        vocabulary, spec = self.identity.vocabulary, self.identity.spec
        answer = loop.create_task(server.client.generate(job.request, job.wire_id, spec, vocabulary))
        try:
            while True:
                left = max(begun, self._resumed) + limit - loop.time()
                if left <= 0 and not self.paused and not self._updating:
                    raise ServerFault(f"no completion within {limit:g} s (VLLMRemote.request_timeout)")
                done, _ = await asyncio.wait({answer}, timeout=max(left, 0.1))
                if done:
                    return answer.result()
        finally:
            answer.cancel()

    def _finish(self, job: Job, result: Completion | Failed) -> None:
        del self._jobs[job.request.id]
        self._deliver(result)

    async def close(self) -> None:
        """Stop everything that is under way, and let a paused server of another's go on."""
        if self._alarm is not None:
            self._alarm.cancel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.paused or self._updating:
            await self._each_foreign_resumed()

    async def _each_foreign_resumed(self) -> None:
        foreign = [server.client for server in self.servers if server.up and server.local is None]
        await asyncio.gather(*(client.call("/resume", {}, timeout=1.0) for client in foreign), return_exceptions=True)


def nothing(request: Request) -> Completion:
    """An aborted completion without a token."""
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
