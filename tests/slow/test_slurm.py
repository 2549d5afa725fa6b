"""The batch script that `dppo slurm` writes, on a real SLURM cluster of two nodes: it trains, requeued or not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dppo_lightning.run.checkpoint_files import read_weights
from tests.helpers.places import ROOT
from tests.helpers.recipes import recipe
from tests.helpers.run_files import read_jsonl

STEPS = 40
ZERO2 = {"class_path": "dppo_lightning.scaling.ZeroStrategy", "init_args": {"stage": 2}}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("DPPO_NO_SLURM") == "1", reason="DPPO_NO_SLURM=1: this machine cannot have SLURM"
    ),
]


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """Of commands that speak to a cluster of two nodes, which ends with this module's tests."""
    command = [sys.executable, str(ROOT / "tests/slow/slurm_cluster.py"), "--nodes", "2", "--cpus", "2"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as up:
        assert up.stdout is not None
        conf = up.stdout.readline().strip()
        if not conf:
            pytest.fail(up.communicate()[1].strip(), pytrace=False)
        yield os.environ | {
            "SLURM_CONF": conf,
            "PYTHONPATH": str(ROOT),
            "MASTER_ADDR": "127.0.0.1",  # the nodes' names do not resolve
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
        }
        up.communicate("", timeout=60)


@pytest.fixture
def config(tmp_path: Path, tiny_policy_dir: str) -> dict[str, Any]:
    config = recipe(tmp_path, tiny_policy_dir)
    del config["run_dir"], config["trainer"]["accelerator"]
    config["trainer"]["max_steps"] = STEPS
    return config


class Submitted:
    """A job that `dppo slurm` has submitted from its own folder."""

    def __init__(self, config: dict[str, Any], folder: Path, nodes: int, environment: dict[str, str]) -> None:
        folder.mkdir()
        (folder / "recipe.yaml").write_text(yaml.safe_dump(config))
        self.folder, self.environment = folder, environment
        options = ["--nodes", str(nodes), "--gpus-per-node", "0", "--cpus-per-task", "1", "--time", "10:00"]
        said = self.run(sys.executable, "-m", "dppo_lightning", "slurm", *options, "--config", "recipe.yaml")
        self.id = re.fullmatch(r"Submitted batch job (\d+)", said.strip())[1]  # type: ignore[index]
        self.run_dir = folder / "runs" / f"slurm-{self.id}"

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def field(self, name: str) -> str:
        """One of SLURM's own records of the job."""
        shown = self.run("scontrol", "show", "job", self.id)
        return re.search(rf"\b{name}=(\S+)", shown)[1]  # type: ignore[index]

    def logs(self) -> str:
        paths = [*self.folder.glob("slurm-*.out"), *sorted((self.run_dir / "logs").glob("*.log"))]
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in paths)

    def wait_for(self, state: str, seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while (now := self.field("JobState")) != state:
            assert now in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"), self.logs()
            assert time.monotonic() < deadline, f"{now} for {seconds} s\n{self.logs()}"
            time.sleep(0.2)

    def wait_for_steps(self, count: int) -> None:
        """Until so many optimizer steps have begun."""
        deadline = time.monotonic() + 90
        while len({row["step"] for row in self.completions()}) < count:
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.05)

    def completions(self) -> list[dict[str, Any]]:
        path = self.run_dir / "completions.jsonl"
        return read_jsonl(path) if path.exists() else []

    def weights(self) -> dict[str, torch.Tensor]:
        (saved,) = (self.run_dir / "checkpoints").glob(f"step={STEPS}*.ckpt")
        return read_weights(saved)


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_requeued_job_ends_with_the_weights_of_an_uninterrupted_one(
    nodes: int, config: dict[str, Any], tmp_path: Path, environment: dict[str, str]
) -> None:
    if nodes > 1:
        config["trainer"]["strategy"] = ZERO2
    whole = Submitted(config, tmp_path / "whole", nodes, environment)
    stopped = Submitted(config, tmp_path / "stopped", nodes, environment)
    stopped.wait_for_steps(3)
    stopped.run("scancel", "--signal=USR1", stopped.id)  # to the tasks alone, as #SBATCH --signal=USR1@120 does
    stopped.wait_for("COMPLETED")
    whole.wait_for("COMPLETED")

    assert (stopped.field("Restarts"), whole.field("Restarts")) == ("1", "0")
    assert stopped.field("ExitCode") == "0:0"
    (log,) = stopped.run_dir.glob("logs/*-0.log")
    said = log.read_text()
    step = int(re.search(r"saved after step (\d+) in \S*step=\d+\.ckpt; job \d+ is queued again", said)[1])  # type: ignore[index]
    assert 3 <= step < STEPS
    assert "the run goes on from" in said
    assert len(list(stopped.run_dir.glob("logs/*-*.log"))) == nodes

    expected = whole.weights()
    for name, weight in stopped.weights().items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0, msg=name)
    assert stopped.completions() == whole.completions()
    for name in ("metrics.csv", "heldout.jsonl"):
        lengths = [len((job.run_dir / name).read_text().splitlines()) for job in (stopped, whole)]
        assert lengths[0] == lengths[1], name


def test_a_job_of_the_wrong_shape_ends_in_one_line(
    config: dict[str, Any], tmp_path: Path, environment: dict[str, str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
    fit = [sys.executable, "-m", "dppo_lightning", "fit", "--config", "recipe.yaml"]
    done = subprocess.run(
        ["srun", "--nodes=2", "--ntasks-per-node=1", *fit],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    errors = {line for line in done.stderr.splitlines() if line.startswith("error: ")}
    assert errors == {
        "error: trainer.num_nodes=1, but the job has 2 node(s): set --trainer.num_nodes 2, or #SBATCH --nodes=1"
    }
    assert "Traceback" not in done.stderr
    assert done.returncode == 2
