"""Check of a SLURM job's set-up: a mistake ends in one line, before the trainer starts and within a minute."""

from __future__ import annotations

import errno
import ipaddress
import os
import selectors
import socket
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress

from lightning.fabric.plugins.environments import SLURMEnvironment

from dppo_lightning.base.errors import ConfigError

INTERACTIVE = ("bash", "interactive")
"""Names of jobs in which commands are typed by hand: Lightning ignores SLURM there, and so does this library."""

WAIT = 50.0
"""Seconds that the tasks of a job wait for each other, unless DPPO_SLURM_WAIT says otherwise."""


def under_slurm(environ: Mapping[str, str]) -> bool:
    """Whether this process belongs to a SLURM job that was not opened to type commands in."""
    return "SLURM_JOB_ID" in environ and environ.get("SLURM_JOB_NAME") not in INTERACTIVE


def started_by_srun(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process; a batch script itself has no step."""
    return under_slurm(environ) and "SLURM_STEP_ID" in environ


def check_slurm(environ: Mapping[str, str], devices: int, num_nodes: int) -> None:
    """Check the job's shape, the first node's name, its port, and that every task has started.

    Outside a job nothing is checked.

    Args:
        environ: Environment variables of this task.
        devices: Number of processes on each node, as ``trainer.devices`` has it.
        num_nodes: Number of nodes, as ``trainer.num_nodes`` has it.

    Raises:
        ConfigError: Something does not fit; one line says what to change.
    """
    if not under_slurm(environ):
        return
    check_shape(environ, devices, num_nodes)
    tasks = int(environ.get("SLURM_NTASKS", "1"))
    if tasks > 1:
        wait = float(environ.get("DPPO_SLURM_WAIT", WAIT))
        host, port = main_address(environ)
        check_resolves(host)
        rank, node = int(environ["SLURM_PROCID"]), environ.get("SLURMD_NODENAME", "?")
        wait_for_all_tasks(host, port, rank, tasks, node, wait)


def check_shape(environ: Mapping[str, str], devices: int, num_nodes: int) -> None:
    """Compare the tasks that SLURM has started with the processes that the trainer expects.

    Raises:
        ConfigError: They differ.
    """
    wanted = f"trainer.devices={devices}, trainer.num_nodes={num_nodes}"
    if not started_by_srun(environ):
        if devices * num_nodes > 1:
            raise ConfigError(f"{wanted}, but the batch script runs one process: put srun before the command")
        return
    tasks = int(environ.get("SLURM_NTASKS", "1"))
    nodes = int(environ.get("SLURM_NNODES", "1"))
    per_node = environ.get("SLURM_NTASKS_PER_NODE")
    if tasks > 1 and per_node is None:
        raise ConfigError(
            f"SLURM started {tasks} tasks by --ntasks: give --nodes={num_nodes} --ntasks-per-node={devices} instead"
        )
    if nodes != num_nodes:
        raise ConfigError(
            f"trainer.num_nodes={num_nodes}, but the job has {nodes} node(s): "
            f"set --trainer.num_nodes {nodes}, or #SBATCH --nodes={num_nodes}"
        )
    if int(per_node or "1") != devices:
        raise ConfigError(
            f"trainer.devices={devices}, but SLURM starts {per_node or 1} task(s) on each node: "
            f"set --trainer.devices {per_node or 1}, or #SBATCH --ntasks-per-node={devices}"
        )
    if tasks != devices * num_nodes:
        raise ConfigError(
            f"{wanted} need {devices * num_nodes} tasks, but srun started {tasks}: drop --ntasks from srun and #SBATCH"
        )


def main_address(environ: Mapping[str, str]) -> tuple[str, int]:
    """Host and port of global rank 0, as Lightning chooses them."""
    nodes = environ.get("SLURM_NODELIST") or environ.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    host = environ.get("MASTER_ADDR") or SLURMEnvironment.resolve_root_node_address(nodes)
    return host, int(environ.get("MASTER_PORT") or 15000 + int(environ["SLURM_JOB_ID"][-4:]))


def check_resolves(host: str) -> None:
    """Look up a host name.

    Raises:
        ConfigError: It has no address on this node.
    """
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise ConfigError(
            f"the first node's name {host!r} does not resolve on {socket.gethostname()} ({error.strerror}): "
            "export MASTER_ADDR with its address before srun"
        ) from error


def wait_for_all_tasks(host: str, port: int, rank: int, tasks: int, node: str, wait: float) -> None:
    """Return when all tasks have called this function.

    So no task goes on alone into torch's rendezvous, which would wait for half an hour.

    Args:
        host: Host name or address of rank 0.
        port: Free port of rank 0; it is free again afterwards.
        rank: Global rank of this task.
        tasks: Number of tasks of the job.
        node: Name of this task's node, for the messages.
        wait: Seconds to wait for the other tasks.

    Raises:
        ConfigError: The port is in use, or not all tasks have called within ``wait`` seconds.
    """
    deadline = time.monotonic() + wait
    if rank == 0:
        _receive(host, port, tasks, node, wait, deadline)
    else:
        _report(host, port, rank, node, wait, deadline)


def _receive(host: str, port: int, tasks: int, node: str, wait: float, deadline: float) -> None:
    """Wait, as rank 0, for one line from each of the others, then send "go" to all of them."""
    missing = set(range(1, tasks))
    with ExitStack() as stack:
        listener = stack.enter_context(_listen(host, port, node))
        selector = stack.enter_context(selectors.DefaultSelector())
        selector.register(listener, selectors.EVENT_READ)
        arrived: list[socket.socket] = []
        while missing and (left := deadline - time.monotonic()) > 0:
            if not selector.select(left):
                continue
            task, _ = listener.accept()
            stack.enter_context(task)
            task.settimeout(min(5.0, max(left, 0.1)))
            with suppress(OSError, ValueError):  # another program that connects to this port is ignored
                rank = int(task.recv(32).decode().removeprefix("dppo "))
                if 0 < rank < tasks:
                    missing.discard(rank)
                    arrived.append(task)
        if missing:
            raise ConfigError(
                f"only {tasks - len(missing)} of {tasks} tasks came within {wait:g} s, missing: rank "
                f"{', '.join(map(str, sorted(missing)))}. Read their logs; if they are only slow to start, "
                "export DPPO_SLURM_WAIT with more seconds"
            )
        listener.close()  # before anybody goes on: the next to connect must find the trainer's own rendezvous
        for task in arrived:
            with suppress(OSError):
                task.sendall(b"go")


def _listen(host: str, port: int, node: str) -> socket.socket:
    """Listen on loopback if the address is one of loopback, else on every interface, as torch's rendezvous does."""
    with suppress(ValueError):
        if not ipaddress.ip_address(host).is_loopback:
            host = ""
    where = host if host[:4] == "127." or host == "localhost" else ""
    try:
        return socket.create_server((where, port), backlog=4096)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} on {node} is in use: export MASTER_PORT with a free one before srun"
            ) from error
        raise ConfigError(f"cannot listen on port {port} of {node} ({os.strerror(error.errno or 0)}): "
                          "export MASTER_PORT with another one before srun") from error  # fmt: skip


def _report(host: str, port: int, rank: int, node: str, wait: float, deadline: float) -> None:
    """Report this rank to rank 0, and wait for its "go"."""
    reason = "no answer"
    while (left := deadline + 5 - time.monotonic()) > 0:  # rank 0, which knows who is missing, speaks first
        try:
            with socket.create_connection((host, port), timeout=min(left, 5.0)) as server:
                server.sendall(f"dppo {rank}".encode())
                server.settimeout(left)
                if server.recv(2) == b"go":
                    return
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(0.2)
    raise ConfigError(
        f"rank {rank} on {node} did not meet rank 0 at {host}:{port} within {wait:g} s ({reason}): read rank 0's log; "
        "if it runs, the nodes cannot reach each other there: export MASTER_ADDR and MASTER_PORT before srun"
    )
