"""The suite's own promises: a test that hangs is named and ended, and no setting of the user's reaches a test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.places import ROOT
from tests.helpers.processes import take_signals, wait_until_gone, with_variable
from tests.helpers.surroundings import without_the_users_settings

CONFTEST = """
from tests.helpers import limits

def pytest_configure(config):
    limits.mark_this_run()
    limits.GRACE = 1.0
    config.pluginmanager.register(limits)
"""
HANGING = """
import os, signal, subprocess, sys, threading, time
from pathlib import Path
import pytest

def start(name, *program):
    child = subprocess.Popen(program, start_new_session=True)
    Path(name).write_text(str(child.pid))
    return child

@pytest.fixture(scope="module")
def engine():
    child = start("engine", "sleep", "600")
    yield child
    child.kill()
    child.wait()

def test_before(engine):
    assert engine.poll() is None

@pytest.mark.timeout(3)
def test_that_waits_for_a_child(engine):
    lost = "setsid sleep 600 > /dev/null 2>&1 & echo $!"
    Path("lost").write_text(subprocess.run(["sh", "-c", lost], stdout=-1, text=True).stdout)
    with start("child", "sleep", "600") as child:
        child.wait()

def test_after(engine):
    assert engine.poll() is None  # what a fixture holds for several tests lives on

@pytest.mark.timeout(3)
def test_that_no_alarm_reaches():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    with start("deaf", "sleep", "600"):
        threading.Event().wait()

def test_at_the_end():
    pass
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_a_test_that_hangs_is_named_what_it_started_ends_and_the_next_one_runs(workers: int, tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_hanging.py").write_text(HANGING)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-n", str(workers), "test_hanging.py"]
    command += ["-o", "timeout=60", "-o", "timeout_method=signal"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, preexec_fn=take_signals
    )
    printed = run.stdout + run.stderr
    assert "test_hanging.py::test_that_no_alarm_reaches has not ended 1 s after its limit of 3 s" in printed
    assert "in test_that_no_alarm_reaches" in printed  # the stack
    if workers:  # another worker goes on
        assert "FAILED test_hanging.py::test_that_no_alarm_reaches" in printed
        assert "FAILED test_hanging.py::test_that_waits_for_a_child - Failed: Timeout (>3.0s)" in printed
        assert "2 failed, 3 passed" in printed
    else:
        assert "test_hanging.py::test_that_waits_for_a_child FAILED" in printed
        assert "test_hanging.py::test_after PASSED" in printed
    assert run.returncode == 1
    pids = [int((tmp_path / name).read_text()) for name in ("engine", "child", "lost", "deaf")]
    wait_until_gone(*pids)  # they were killed, and a killed process ends when the system comes to it


def test_a_test_with_a_limit_is_every_test(request: pytest.FixtureRequest) -> None:
    assert float(request.config.getini("timeout")) > 0
    assert request.config.getini("timeout_method") == "signal"


def test_processes_are_known_by_their_environment_also_without_a_parent() -> None:
    orphan = "import subprocess; print(subprocess.Popen(['sleep', '600'], stdout=-3).pid)"
    mine = os.environ | {"KNOWN_BY": "this"}
    with subprocess.Popen([sys.executable, "-c", orphan], env=mine, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.wait()
        assert pid in with_variable("KNOWN_BY", "this")
        os.kill(pid, 9)


@pytest.mark.parametrize(
    "name", ["SLURM_JOB_ID", "DPPO_API_KEY", "HF_HOME", "https_proxy", "LC_NUMERIC", "CUDA_DEVICE_ORDER", "MASTER_PORT"]
)
def test_settings_of_the_user_reach_no_test(name: str) -> None:
    environ = {name: "x", "PATH": "/bin", "DPPO_NO_SLURM": "1", "CUDA_VISIBLE_DEVICES": "3"}
    without_the_users_settings(environ)
    assert name not in environ
    assert (environ["PATH"], environ["DPPO_NO_SLURM"], environ["CUDA_VISIBLE_DEVICES"]) == ("/bin", "1", "")


def test_a_test_runs_in_a_folder_and_a_terminal_of_its_own() -> None:
    assert not list(Path.cwd().iterdir())
    assert (os.environ["COLUMNS"], os.environ["TERM"]) == ("80", "dumb")
