"""A real SLURM cluster on this machine, for as long as it is needed: several nodes, out of Debian's packages.

    python tests/slow/slurm_cluster.py sinfo
    python tests/slow/slurm_cluster.py --nodes 2 bash

brings up munged, slurmctld and one slurmd for each node, runs the command against them (``SLURM_CONF`` is set) and
takes everything down again. Without a command it prints the path of slurm.conf and stays until its input ends, so a
cluster never outlives the process that started it.

Nothing is installed as a service and nothing outside one temporary folder is written: a munged that runs already, a
/run/munge that is missing, and a machine without systemd make no difference. Everything listens on 127.0.0.1. What is
simplified away: accounting, cgroups, GPUs, and a file system that the nodes would have to share.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "scontrol", "sbatch", "srun", "scancel")
PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client")
FOLDERS = (*os.environ.get("PATH", "").split(os.pathsep), "/usr/sbin", "/sbin")
START_SECONDS = 60

CONF = """\
ClusterName=dppo
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# a job that is queued again waits until its old credential has expired: 120 seconds by default
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2
MpiDefault=none
JobRequeue=1
KillWait=10
ReturnToService=2
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def main() -> int:
    """Run a command against a cluster, or keep the cluster until standard input ends."""
    parser = argparse.ArgumentParser(description="A SLURM cluster on this machine for the time of a command.")
    parser.add_argument("--nodes", type=int, default=2, help="Nodes of the cluster.")
    parser.add_argument("--cpus", type=int, default=2, help="CPUs that each node claims to have.")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="What to run; none: stay until input ends.")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        install_if_missing()
        with cluster(chosen.nodes, chosen.cpus) as conf:
            if chosen.command:
                return subprocess.run(
                    chosen.command, env=os.environ | {"SLURM_CONF": str(conf)}, check=False
                ).returncode
            print(conf, flush=True)
            sys.stdin.read()
    except ClusterError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


class ClusterError(RuntimeError):
    """The cluster cannot be had; one line says what to do."""


def install_if_missing() -> None:
    """Install Debian's packages when this is root on a machine with apt.

    Raises:
        ClusterError: Programs are missing and cannot be installed.
    """
    missing = [name for name in PROGRAMS if program(name) is None]
    if not missing:
        return
    what = f"SLURM is not installed ({', '.join(missing)} missing)"
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise ClusterError(
            f"{what}: apt-get install {' '.join(PACKAGES)}, or set DPPO_NO_SLURM=1 to skip what needs it"
        )
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "--yes", "--no-install-recommends", *PACKAGES]
    for command in (install, ["apt-get", "update"], install):
        done = subprocess.run(command, env=quiet, capture_output=True, text=True, check=False)
        if all(program(name) for name in PROGRAMS):
            return
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    raise ClusterError(f"{what} and `{' '.join(install)}` failed: {last}")


def program(name: str) -> str | None:
    """Path of a program; daemons are where an ordinary user's PATH does not look."""
    return shutil.which(name, path=os.pathsep.join(FOLDERS))


@contextlib.contextmanager
def cluster(nodes: int, cpus: int) -> Iterator[Path]:
    """Bring a cluster up, give the path of its slurm.conf, take it down.

    Raises:
        ClusterError: A daemon did not start.
    """
    adopt_orphans()
    temporary = tempfile.TemporaryDirectory(prefix="dppo-slurm-", ignore_cleanup_errors=True)
    with temporary as name, held_ports(nodes + 1) as ports:
        folder = Path(name)
        folder.chmod(0o755)
        daemons: list[subprocess.Popen[bytes]] = []
        try:
            conf = write_conf(folder, ports, cpus)
            start(folder, conf, nodes, daemons)
            yield conf
        finally:
            stop(folder, daemons)


def write_conf(folder: Path, ports: list[int], cpus: int) -> Path:
    """slurm.conf with a port for each node and one for the controller, and the secret that the daemons share."""
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    (folder / "state").mkdir()
    host = socket.gethostname().split(".")[0]
    lines = [
        f"NodeName=n{i + 1} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[i]} CPUs={cpus} State=UNKNOWN"
        for i in range(len(ports) - 1)
    ]
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(host=host, port=ports[-1], user=user, folder=folder, nodes="\n".join(lines)))
    return conf


def start(folder: Path, conf: Path, nodes: int, daemons: list[subprocess.Popen[bytes]]) -> None:
    """Start the daemons in the foreground, as children; wait until every node is idle."""
    environment = os.environ | {"SLURM_CONF": str(conf)}
    munge = [
        *("munged", "--foreground", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket"),
        *(f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed"),
    ]
    commands = [munge, ["slurmctld", "-D", "-i", "-f", str(conf)]]
    commands += [["slurmd", "-D", "-N", f"n{i + 1}", "-f", str(conf)] for i in range(nodes)]
    deadline = time.monotonic() + START_SECONDS
    for command in commands:
        path = program(command[0])
        assert path is not None
        output = (folder / f"{'-'.join([command[0], *command[2:4][-1:]])}.out".replace("/", "_")).open("wb")
        with output:
            daemons.append(
                subprocess.Popen(
                    [path, *command[1:]], env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
                )
            )
        while command is munge and not (folder / "munge.socket").exists():
            check_alive(folder, daemons, deadline)
            time.sleep(0.05)
    while idle(environment) < nodes:
        check_alive(folder, daemons, deadline)
        time.sleep(0.1)


def idle(environment: dict[str, str]) -> int:
    """How many nodes can take a job."""
    answer = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%T"], env=environment, capture_output=True, text=True, check=False
    )
    return answer.stdout.split().count("idle")


def check_alive(folder: Path, daemons: list[subprocess.Popen[bytes]], deadline: float) -> None:
    """Raises ClusterError, with what a daemon said last, when one is dead or time is up."""
    dead = [daemon for daemon in daemons if daemon.poll() is not None]
    if not dead and time.monotonic() < deadline:
        return
    said = [
        line for path in sorted(folder.glob("*.log")) for line in path.read_text(errors="replace").splitlines()[-2:]
    ]
    printed = [
        line for path in sorted(folder.glob("*.out")) for line in path.read_text(errors="replace").splitlines()[-2:]
    ]
    which = f"{Path(dead[0].args[0]).name} ended" if dead else f"not ready after {START_SECONDS} s"  # type: ignore[index]
    raise ClusterError(f"the SLURM cluster did not start, {which}: {' | '.join(printed + said) or 'no message'}")


def stop(folder: Path, daemons: list[subprocess.Popen[bytes]]) -> None:
    """Cancel what runs, end the daemons, and then whatever of theirs is left."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        if len(daemons) > 1:
            cancel = [program("scancel") or "scancel", "--signal=KILL", "--full", "--state=RUNNING", "--partition=all"]
            subprocess.run(cancel, env=environment, capture_output=True, timeout=5, check=False)
    for daemon in reversed(daemons):
        daemon.terminate()
    for daemon in daemons:
        with contextlib.suppress(subprocess.TimeoutExpired):
            daemon.wait(5)
    deadline = time.monotonic() + 10
    while (left := children()) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.05)


def adopt_orphans() -> None:
    """slurmd's helpers leave their parent: have the kernel give them to this process, so that none can stay behind."""
    set_child_subreaper = 36
    ctypes.CDLL(None, use_errno=True).prctl(set_child_subreaper, 1, 0, 0, 0)


def children() -> list[int]:
    """This process's children, adopted ones included."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(path.parent.name))
    return found


@contextlib.contextmanager
def held_ports(count: int) -> Iterator[list[int]]:
    """Free ports, which nobody else is given meanwhile; SLURM sets SO_REUSEADDR and can bind them beside us."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            each.bind(("", 0))
        yield [each.getsockname()[1] for each in sockets]


if __name__ == "__main__":
    sys.exit(main())
