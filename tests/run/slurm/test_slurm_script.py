"""The batch script that `dppo slurm` writes."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.run.cli import main
from dppo_lightning.run.slurm.script import Job, submit
from tests.helpers.places import ROOT

RECIPE = "configs/quickstart.yaml"
SHIPPED = Job(config=["configs/smollm2_arithmetic.yaml"], nodes=2, gpus_per_node=8)


def test_the_shipped_script_is_one_that_the_command_writes() -> None:
    assert (ROOT / "configs/slurm/train.sbatch").read_text() == SHIPPED.script()


def directives(script: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", script, re.MULTILINE))


@pytest.fixture
def asked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(ROOT)
    words = f"slurm --nodes 3 --gpus-per-node 4 --time 2-00:00:00 --config {RECIPE} --partition a100"
    more = "--config configs/smollm2_arithmetic.yaml --signal-seconds 300 --dry-run"
    main(f"{words} {more} -- --trainer.max_steps 7 --model.policy=a'b".split())
    return capsys.readouterr().out


def test_what_is_asked_for_is_in_the_script(asked: str) -> None:
    given = directives(asked)
    assert (given["nodes"], given["ntasks-per-node"], given["gpus-per-node"]) == ("3", "4", "4")
    assert (given["time"], given["partition"], given["signal"]) == ("2-00:00:00", "a100", "USR1@300")
    assert "account" not in given
    assert "--trainer.devices 4 --trainer.num_nodes 3" in asked


def test_srun_starts_the_command_with_every_option(asked: str, tmp_path: Path) -> None:
    for name in ("srun", "scontrol"):
        (tmp_path / name).write_text('#!/bin/sh\nfor word; do echo "$word"; done\n')
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash"], input=asked, cwd=tmp_path, env={"PATH": path, "SLURM_JOB_ID": "12", "SLURM_CPUS_PER_TASK": "6"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    words = done.stdout.splitlines()
    assert words[:2] == ["--cpus-per-task=6", "--kill-on-bad-exit=1"]
    assert "--output=runs/slurm-12/logs/%N-%t.log" in words
    assert words[words.index("fit") + 1 :] == [
        *("--config", RECIPE, "--config", "configs/smollm2_arithmetic.yaml", "--trainer.accelerator", "gpu"),
        *("--trainer.devices", "4", "--trainer.num_nodes", "3", "--run_dir", "runs/slurm-12"),
        *("--trainer.max_steps", "7", "--model.policy=a'b"),
    ]
    assert (tmp_path / "runs/slurm-12/logs").is_dir()


def test_without_gpus_there_is_one_process_on_each_node() -> None:
    script = Job(config=[RECIPE], nodes=2, gpus_per_node=0).script()
    assert directives(script)["ntasks-per-node"] == "1"
    assert "gpus-per-node" not in script
    assert "--trainer.accelerator cpu" in script


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--nodes 0 --config a.yaml", r"--nodes must be >= 1, got 0"),
        ("--gpus-per-node -1 --config a.yaml", r"--gpus-per-node must be >= 0"),
        ("--nodes 1", r"give the recipe with --config"),
        ("--config no-such.yaml", r"no recipe 'no-such\.yaml'"),
    ],
)
def test_wrong_options_are_refused(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["slurm", *options.split()])
    assert exit_.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_what_sbatch_says_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    fake = tmp_path / "sbatch"
    fake.write_text("#!/bin/sh\ncat > /dev/null\necho Submitted batch job 12\n")
    fake.chmod(0o755)
    submit(SHIPPED)
    assert capsys.readouterr().out == "Submitted batch job 12\n"
    fake.write_text("#!/bin/sh\necho sbatch: error: invalid account >&2\nexit 1\n")
    with pytest.raises(ConfigError, match="sbatch refuses: error: invalid account"):
        submit(SHIPPED)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="no sbatch here"):
        submit(SHIPPED)
