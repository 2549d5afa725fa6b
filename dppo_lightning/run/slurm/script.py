"""``dppo slurm``: write the batch script of a run and submit it."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dppo_lightning.base.errors import ConfigError

SCRIPT = """\
#!/usr/bin/env bash
# A run of dppo on SLURM. `dppo slurm` writes such a script; what to change for your cluster is said at each line.
{directives}
set -euo pipefail

run_dir={run_dir}   # the same in every start of the job, and on a file system that all nodes share
mkdir -p "$run_dir/logs"

# If the nodes' names do not resolve, or their port is taken, or there are several networks:
#   export MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
export OMP_NUM_THREADS="${{SLURM_CPUS_PER_TASK:-1}}"

# As it stands the engine shares the GPU of rank 0: leave it room with data.engine.init_args.gpu_memory_utilization.
# Engines on nodes of their own (has not run on hardware): ask for one node more above, start vLLM's server on the last
# node, train on the others, and have the recipe's engine connect to it.
#   engines=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tail -n 1)
#   VLLM_SERVER_DEV_MODE=1 srun --nodes=1 --ntasks=1 --nodelist="$engines" --output="$run_dir/logs/engine-%N.log" \\
#       {python} -m vllm.entrypoints.openai.api_server --model MODEL --port 8000 &
#   and below: srun --nodes={nodes} --exclude="$engines" ..., with --data.engine set to one that speaks to a server

# srun and nothing else starts the processes. It takes --cpus-per-task from its own command line only. A rank that fails
# ends the others. USR1 goes to the tasks; this script must not get it. %N is the node, %t the rank.
srun --cpus-per-task="${{SLURM_CPUS_PER_TASK:-1}}" --kill-on-bad-exit=1 \\
    --output="$run_dir/logs/%N-%t.log" --open-mode=append \\
    {command}
"""


@dataclass(frozen=True)
class Job:
    """Settings of a batch script.

    Args:
        config: Recipes; where several set the same, the last one wins.
        nodes: Number of nodes, >= 1.
        gpus_per_node: Number of GPUs on each node, with one training process for each; 0: one process on each node, on
            the CPU.
        time: Time limit of one start, as SLURM writes it, e.g. 24:00:00.
        run_dir: Run directory; None: ``runs/slurm-<job id>``.
        partition: Partition of the cluster; None: the cluster's default.
        account: Account that is charged; None: the user's default.
        cpus_per_task: Number of cores for each training process, >= 1.
        signal_seconds: Seconds before the time limit at which the run is signalled to save, >= 1.
        name: Name of the job.
        options: More arguments of ``dppo fit``.
        python: Path of the Python interpreter on the nodes.

    Raises:
        ConfigError: A number is out of range, or there is no recipe.
    """

    config: Sequence[str]
    nodes: int = 1
    gpus_per_node: int = 1
    time: str = "24:00:00"
    run_dir: str | None = None
    partition: str | None = None
    account: str | None = None
    cpus_per_task: int = 8
    signal_seconds: int = 120
    name: str = "dppo"
    options: Sequence[str] = ()
    python: str = ".venv/bin/python"

    def __post_init__(self) -> None:
        lowest = {"nodes": 1, "gpus_per_node": 0, "cpus_per_task": 1, "signal_seconds": 1}
        for field, least in lowest.items():
            if getattr(self, field) < least:
                option = field.replace("_", "-")
                raise ConfigError(f"dppo slurm: --{option} must be >= {least}, got {getattr(self, field)}")
        if not self.config:
            raise ConfigError("dppo slurm: give the recipe with --config")

    @property
    def tasks(self) -> int:
        """Number of training processes on each node."""
        return max(self.gpus_per_node, 1)

    def script(self) -> str:
        """Text of the batch script."""
        return SCRIPT.format(
            directives="\n".join(self.directives()),
            nodes=self.nodes,
            run_dir='"runs/slurm-$SLURM_JOB_ID"' if self.run_dir is None else shlex.quote(self.run_dir),
            python=shlex.quote(self.python),
            command=self.command(),
        )

    def directives(self) -> list[str]:
        """Lines for sbatch, each with its meaning; a line is commented out where its setting has no value."""
        gpus = self.gpus_per_node
        lines = [
            (f"#SBATCH --job-name={self.name}", "any"),
            (f"#SBATCH --nodes={self.nodes}", "as many as --trainer.num_nodes below"),
            (f"#SBATCH --ntasks-per-node={self.tasks}", "training processes, as many as --trainer.devices below"),
            (f"#SBATCH --gpus-per-node={gpus}", f"one for each task; on some clusters --gres=gpu:{gpus}"),
            (
                f"#SBATCH --cpus-per-task={self.cpus_per_task}",
                "cores of a node / tasks on it: rewards and engine use them",
            ),
            (f"#SBATCH --time={self.time}", "limit of one start; the run goes on in the next"),
            (
                f"#SBATCH --signal=USR1@{self.signal_seconds}",
                "seconds before the limit: save and queue again; > a step",
            ),
            ("#SBATCH --requeue", "allow that"),
            ("#SBATCH --open-mode=append", "a job that starts again must not empty its log"),
            ("#SBATCH --output=slurm-%j.out", "of this script; the ranks' logs are in the run directory"),
            (_optional("partition", self.partition), "where you may run"),
            (_optional("account", self.account), "who pays"),
        ]
        return [f"{line:<38}# {meaning}" for line, meaning in lines if gpus or "gpus" not in line]

    def command(self) -> str:
        """Command that srun starts, one option a line."""
        lines = [f"{shlex.quote(self.python)} -m dppo_lightning fit"]
        lines += [f"--config {shlex.quote(path)}" for path in self.config]
        lines += [f"--trainer.accelerator {'gpu' if self.gpus_per_node else 'cpu'}"]
        lines += [f"--trainer.devices {self.tasks} --trainer.num_nodes {self.nodes}"]
        lines += ['--run_dir "$run_dir"']
        lines += [shlex.join(self.options)] if self.options else []
        return " \\\n    ".join(lines)


def _optional(option: str, value: str | None) -> str:
    """Line for sbatch, commented out where there is no value."""
    return f"##SBATCH --{option}=NAME" if value is None else f"#SBATCH --{option}={value}"


def submit(job: Job, dry_run: bool = False) -> None:
    """Give the script of a job to sbatch.

    Args:
        job: Settings of the script.
        dry_run: Whether to print the script instead.

    Raises:
        ConfigError: A recipe is missing, or sbatch is missing or refuses.
    """
    for path in job.config:
        if not Path(path).is_file():
            raise ConfigError(f"dppo slurm: no recipe {path!r}: set --config to a YAML file")
    if dry_run:
        print(job.script(), end="")
        return
    try:
        done = subprocess.run(["sbatch"], input=job.script(), capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ConfigError("there is no sbatch here: submit from a login node, or use --dry-run") from error
    if done.returncode:
        raise ConfigError(f"sbatch refuses: {' '.join(done.stderr.split()).removeprefix('sbatch: ')}")
    print(done.stdout.strip())
