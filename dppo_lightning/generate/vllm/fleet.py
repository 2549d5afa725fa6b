"""Fleet: requests spread over vLLM servers, none lost and none answered twice, also when servers fail.

Everything here runs in one event loop; between two ``await`` nothing else happens, so no state needs a lock.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence

from dppo_lightning.base.errors import EngineError, one_line
from dppo_lightning.base.records import Completion
from dppo_lightning.generate.engine import Failed, Request
from dppo_lightning.generate.vllm.client import RequestRefused, ServerFault
from dppo_lightning.generate.vllm.identity import Identity
from dppo_lightning.generate.vllm.server import Limits, PendingRequest, Server, Weights, aborted_before_start

MOST_ERRORS = 3
"""A request that so many servers answered with an error of their own is given up: it may be the cause."""

ABORT_SECONDS = 5.0
"""Seconds that servers get to answer requests that are aborted; after that these end without their tokens."""

RETRY_SECONDS = (0.5, 30.0)
"""Shortest and longest wait between two attempts to get a server back, in seconds."""

ATTEMPTS_BEFORE_KILL = 3
"""Number of failed attempts after which a server of our own that lives but does not answer is ended."""

log = logging.getLogger(__name__)


class Fleet:
    """Servers that work on the same requests with the same weights.

    Args:
        servers: The servers, at least one.
        identity: Model and settings that each server must have.
        limits: Limits of requests, seconds and restarts, see `Limits`.
        deliver: Function that is given every result.
        stop: Function that is given the reason when no more results will come.

    Attributes:
        weights: Weights that every server has or gets before it is given requests.
        paused: Whether the caller has paused the fleet.
        error: Reason why no more results will come; None while the fleet works.
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
        self._pending: dict[str, PendingRequest] = {}
        self._waiting: deque[PendingRequest] = deque()
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
        """Queue requests."""
        for request in requests:
            pending = self._pending[request.id] = PendingRequest(request)
            self._waiting.append(pending)
        self._dispatch()

    async def abort(self, ids: Collection[str]) -> None:
        """Stop requests; return when every one of them has been delivered."""
        unwanted = [self._pending[name] for name in ids if name in self._pending]
        for pending in unwanted:
            pending.aborted = True
        for pending in [pending for pending in self._waiting if pending.aborted]:
            self._waiting.remove(pending)
            self._finish(pending, aborted_before_start(pending.request))
        loop = asyncio.get_running_loop()
        deadline = loop.time() + ABORT_SECONDS
        while (left := self._unfinished(unwanted)) and loop.time() < deadline:
            servers = {pending.server for pending in left if pending.server is not None}
            await asyncio.gather(*(self._abort_on_server(server, left) for server in servers))
            if tasks := [pending.task for pending in self._unfinished(left) if pending.task is not None]:
                # A request that had not reached the engine when it was aborted goes on: the abort is sent again.
                await asyncio.wait(tasks, timeout=0.1)
        for pending in self._unfinished(unwanted):
            pending.detach()
            self._finish(pending, aborted_before_start(pending.request))
        self._dispatch()

    def _unfinished(self, unwanted: Iterable[PendingRequest]) -> list[PendingRequest]:
        return [pending for pending in unwanted if self._pending.get(pending.request.id) is pending]

    async def _abort_on_server(self, server: Server, unwanted: Iterable[PendingRequest]) -> None:
        try:
            await server.client.abort([pending.wire_id for pending in unwanted if pending.server is server])
        except ServerFault as fault:
            self._put_out_of_service(server, str(fault))

    async def pause(self) -> None:
        """Stop generating; requests in flight keep what they have."""
        self.paused = True
        await self._on_each_up(lambda server: server.client.pause(keep=True))

    async def resume(self) -> None:
        """Go on generating after ``pause``."""
        await self._on_each_up(lambda server: server.client.resume())
        self._resumed = asyncio.get_running_loop().time()
        self.paused = False
        self._dispatch()

    async def begin_update(self, weights: Weights) -> list[Server]:
        """Stop generating for an update; return the servers that are up.

        The caller gives them the weights and then calls ``end_update``.

        Args:
            weights: The new weights.
        """
        self.weights = weights
        self._updating = True
        await self._on_each_up(lambda server: server.client.pause(keep=True))
        return [server for server in self.servers if server.up]

    async def end_update(self) -> None:
        """Go on generating with the new weights.

        Raises:
            EngineError: No server is left.
        """
        await self._on_each_up(self._put_in_force)
        await self._after_update()

    async def update(self, weights: Weights) -> None:
        """Give the weights to every server. Requests in flight go on under them; servers that are out get them later.

        Raises:
            EngineError: No server is left.
        """
        await self.begin_update(weights)
        await self._on_each_up(lambda server: self._give(server, weights))
        await self._after_update()

    async def _after_update(self) -> None:
        while self.error is None and not any(server.up for server in self.servers):
            await asyncio.sleep(0.05)
        self._updating = False
        self._resumed = asyncio.get_running_loop().time()
        if self.error is not None:
            raise self.error
        self._dispatch()

    async def _on_each_up(self, action: Callable[[Server], Coroutine[None, None, None]]) -> None:
        """Do something on every server that is up, at the same time; one that fails is put out of service."""

        async def attempt(server: Server) -> None:
            try:
                await action(server)
            except ServerFault as fault:
                self._put_out_of_service(server, str(fault))

        await asyncio.gather(*(attempt(server) for server in self.servers if server.up))

    async def _give(self, server: Server, weights: Weights) -> None:
        """Load weights into a paused server, and go on with them."""
        await server.load_weights(weights)
        await self._put_in_force(server)

    async def _put_in_force(self, server: Server) -> None:
        await server.put_in_force(self.weights.version, resume=not self.paused)

    async def _bring_up(self, server: Server) -> None:
        """Start the server if it is ours and dead, check that it fits the run, empty it, and give it the weights."""
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
        """Try to get a server back until it is up, or its restarts are used up."""
        wait, longest = RETRY_SECONDS
        attempts = 0
        while not server.up:
            if server.local is not None and not server.local.alive:
                if server.restarts >= self.limits.restarts:
                    server.given_up = True
                    self._watch_for_no_server()
                    return
                server.restarts += 1
            try:
                await self._bring_up(server)
            except ServerFault as fault:
                server.reason = str(fault)
                attempts += 1
                if server.local is not None and attempts % ATTEMPTS_BEFORE_KILL == 0:
                    server.local.close()
                await asyncio.sleep(wait)
                wait = min(2 * wait, longest)
            else:
                server.up, server.reason = True, ""
                log.info("vLLM server %s is back, with weight version %d", server.url, self.weights.version)
                self._watch_for_no_server()
                self._dispatch()

    def _put_out_of_service(self, server: Server, why: str) -> None:
        """Give no more requests to a server that failed, give those that it has to others, and try to get it back."""
        if not server.up:
            return
        server.up, server.reason = False, why
        log.warning("vLLM server %s is out, its %d requests go to others: %s", server.url, len(server.requests), why)
        for pending in reversed(list(server.requests.values())):
            pending.detach()
            if pending.aborted:
                self._finish(pending, aborted_before_start(pending.request))
            else:
                self._waiting.appendleft(pending)
        if self.limits.rejoin:
            self._begin_task(self._recover(server))
        else:
            server.given_up = True
        self._watch_for_no_server()
        self._dispatch()

    def _watch_for_no_server(self) -> None:
        """Start or stop the alarm that ends the engine when no server is up for too long."""
        if any(server.up for server in self.servers):
            if self._alarm is not None:
                self._alarm.cancel()
            self._alarm = None
        elif all(server.given_up for server in self.servers):
            self._give_up()
        elif self._alarm is None:
            self._alarm = asyncio.get_running_loop().call_later(self.limits.startup_timeout, self._give_up)

    def _give_up(self) -> None:
        """End the engine because no server is left."""
        reasons = "; ".join(f"{server.url}: {server.reason}" for server in self.servers)
        self._fail(EngineError(f"no vLLM server is left ({reasons})"))

    def _fail(self, error: EngineError) -> None:
        self.error = error
        self._stop(error)

    def _begin_task(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._report_failure)
        return task

    def _report_failure(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            failure = EngineError(f"VLLMRemote failed: {one_line(error)}")
            failure.__cause__ = error
            self._fail(failure)

    def _dispatch(self) -> None:
        """Give waiting requests to the servers with the fewest."""
        while self._waiting and not self.paused and not self._updating and self.error is None:
            free = [server for server in self.servers if server.up and len(server.requests) < self.limits.concurrency]
            if not free:
                return
            server = min(free, key=lambda server: len(server.requests))
            pending = self._waiting.popleft()
            pending.server, pending.wire_id = server, uuid.uuid4().hex
            server.requests[pending.request.id] = pending
            pending.task = self._begin_task(self._serve(pending, server))

    async def _serve(self, pending: PendingRequest, server: Server) -> None:
        try:
            result: Completion | Failed = await server.generate(
                pending, self.identity, self.limits.request_timeout, self._running_since
            )
            server.restarts = 0
        except RequestRefused as error:
            result = Failed(pending.request.id, str(error))
        except ServerFault as fault:
            pending.errors += fault.status is not None
            if pending.aborted:
                result = aborted_before_start(pending.request)
            elif pending.errors < MOST_ERRORS:
                self._put_out_of_service(server, str(fault))
                return
            else:
                result = Failed(pending.request.id, f"{pending.errors} servers failed at it: {fault}")
            if not pending.aborted or fault.status is None:
                pending.detach()
                self._put_out_of_service(server, str(fault))
        pending.detach()
        self._finish(pending, result)
        self._dispatch()

    def _running_since(self) -> float | None:
        """Time of the loop at which the fleet last went on generating; None while it is paused."""
        return None if self.paused or self._updating else self._resumed

    def _finish(self, pending: PendingRequest, result: Completion | Failed) -> None:
        del self._pending[pending.request.id]
        self._deliver(result)

    async def close(self) -> None:
        """Stop all work, and have the paused servers that are not ours go on."""
        if self._alarm is not None:
            self._alarm.cancel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.paused or self._updating:
            await self._resume_foreign()

    async def _resume_foreign(self) -> None:
        foreign = [server.client for server in self.servers if server.up and server.local is None]
        await asyncio.gather(*(client.call("/resume", {}, timeout=1.0) for client in foreign), return_exceptions=True)
