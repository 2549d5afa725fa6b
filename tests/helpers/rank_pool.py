"""Ranks for tests: processes that stay, joined by gloo on the loopback, and run one job after another."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.reduction import DupFd
from typing import Any

from dppo_lightning.generate.vllm.server import hold_port

IMPORTED_ONCE = ["torch.distributed", "dppo_lightning.run.cli", "dppo_lightning.train.module"]
"""Modules that a server imports once, from which each rank is forked: their import takes a rank some seconds."""


class RankPool:
    """Some ranks; ``run`` calls a function of this package on each of them and returns what they return.

    A job that fails or does not end in time fails the test and costs the pool: the next job gets new processes.
    """

    def __init__(self, size: int = 2) -> None:
        self.size = size
        self.processes: list[Any] = []
        self.pipes: list[Any] = []
        self.held: socket.socket | None = None  # the port at which the ranks meet

    def run(self, job: Callable[..., Any], *arguments: Any, timeout: float = 240.0, **keywords: Any) -> list[Any]:
        """Each rank's ``job(*arguments, **keywords)``."""
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send((job, arguments, keywords))
        deadline = time.monotonic() + timeout
        results: list[Any] = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(max(deadline - time.monotonic(), 0)):
                self._show_where_they_are()
                self.stop()
                raise TimeoutError(f"rank {rank} has not answered in {timeout} s")
            try:
                results.append(pipe.recv())
            except EOFError:
                results.append(("died", self.processes[rank].join(10) or self.processes[rank].exitcode))
        failures = [f"rank {rank} {kind}: {value}" for rank, (kind, value) in enumerate(results) if kind != "ok"]
        if failures:
            self.stop()
            raise AssertionError("\n".join(failures))
        return [value for _, value in results]

    def start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED_ONCE)
        self.held = hold_port()
        port = self.held.getsockname()[1]
        for rank in range(self.size):
            mine, theirs = context.Pipe()
            output = [DupFd(1), DupFd(2)]  # a server's children have its output, not that of the test which runs now
            process = context.Process(target=_serve, args=(theirs, rank, self.size, port, output), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def _show_where_they_are(self) -> None:
        for process in self.processes:
            os.kill(process.pid, signal.SIGUSR1)
            time.sleep(1)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()
        if self.held is not None:
            self.held.close()
        self.processes, self.pipes, self.held = [], [], None


def _serve(pipe: Any, rank: int, size: int, port: int, output: list[Any]) -> None:
    for number, copy in enumerate(output, start=1):
        os.dup2(copy.detach(), number)
    faulthandler.register(signal.SIGUSR1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCHELASTIC_RUN_ID": "tests",  # tells Lightning that the processes are there already
    }
    import torch
    import torch.distributed

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    while True:
        try:
            job, arguments, keywords = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("ok", job(*arguments, **keywords)))
        except BaseException:
            pipe.send(("failed", traceback.format_exc()))


def _end_with_parent() -> None:
    """A rank that waits for another would outlive a killed test run."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
