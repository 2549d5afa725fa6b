"""A wrong SLURM set-up ends in one line that says what to change, before anything waits."""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from lightning.pytorch.plugins.environments import SLURMEnvironment

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.generate.vllm.server import hold_port
from dppo_lightning.run.cli import main
from dppo_lightning.run.slurm.check import check_slurm, main_address, wait_for_all_tasks
from dppo_lightning.run.slurm.job import SlurmRun, default_run_dir, device_count
from tests.helpers.places import ROOT
from tests.helpers.processes import PATIENCE, wait_until
from tests.helpers.slurm_jobs import ONE_TASK

RECIPE = ROOT / "configs" / "smollm2_arithmetic.yaml"
ONE = ONE_TASK | {
    "SLURM_JOB_ID": "1234567",
    "SLURM_NODELIST": "gpu[07-09],gpu12",
    "SLURMD_NODENAME": "gpu07",
}
FOUR = ONE | {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "2", "DPPO_SLURM_WAIT": "0.3"}
HERE = {"MASTER_ADDR": "127.0.0.1"}


@pytest.fixture
def port() -> Iterator[int]:
    """Nobody listens there, and nobody else gets it while the test runs."""
    with hold_port() as holder:
        yield holder.getsockname()[1]


@pytest.mark.parametrize(
    "environ",
    [{}, ONE, ONE | {"SLURM_JOB_NAME": "interactive", "SLURM_NNODES": "9"}, {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1"}],
    ids=["no job", "one task", "a shell in a job", "a batch script with one process"],
)
def test_what_is_right_passes(environ: dict[str, str]) -> None:
    check_slurm(environ, devices=1, num_nodes=1)


@pytest.mark.parametrize(
    ("environ", "devices", "num_nodes", "message"),
    [
        (FOUR, 4, 2, r"devices=4.*2 task\(s\) on each node.*--trainer\.devices 2, or #SBATCH --ntasks-per-node=4"),
        (FOUR, 2, 4, r"num_nodes=4.*has 2 node\(s\).*--trainer\.num_nodes 2, or #SBATCH --nodes=4"),
        ({k: v for k, v in FOUR.items() if "PER_NODE" not in k}, 2, 2, r"by --ntasks.*--nodes=2 --ntasks-per-node=2"),
        ({k: v for k, v in FOUR.items() if "STEP" not in k}, 2, 2, r"devices=2.*put srun before"),
        (FOUR | {"SLURM_NTASKS": "3"}, 2, 2, r"need 4 tasks, but srun started 3"),
        (FOUR | {"MASTER_ADDR": "no-such-node.invalid"}, 2, 2, r"no-such-node\.invalid.*does not resolve.*MASTER_ADDR"),
        (FOUR | HERE, 2, 2, r"only 1 of 4 tasks came within 0\.3 s, missing: rank 1, 2, 3\. Read their logs"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    environ: dict[str, str], devices: int, num_nodes: int, message: str, port: int
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        check_slurm(environ | {"MASTER_PORT": str(port)}, devices, num_nodes)
    assert "\n" not in str(error.value)


def test_a_port_in_use_is_said_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        environ = FOUR | HERE | {"MASTER_PORT": str(port), "DPPO_SLURM_WAIT": "1e6"}  # the test's own limit comes first
        with pytest.raises(ConfigError, match=rf"port {port} on gpu07 is in use: export MASTER_PORT"):
            check_slurm(environ, 2, 2)


def test_a_rank_without_its_rank_0_says_so(port: int) -> None:
    with pytest.raises(ConfigError, match=r"rank 3 on gpu08 did not meet rank 0 at 127\.0\.0\.1:\d+ within -4 s"):
        wait_for_all_tasks("127.0.0.1", port, 3, 4, "gpu08", wait=-4)  # others wait five seconds longer than rank 0


def test_tasks_that_all_come_go_on_and_leave_the_port_free(port: int) -> None:
    with ThreadPoolExecutor(4) as pool:
        waits = [pool.submit(wait_for_all_tasks, "127.0.0.1", port, rank, 4, "gpu07", PATIENCE) for rank in (3, 1)]
        waits.append(pool.submit(wait_for_all_tasks, "127.0.0.1", port, 0, 4, "gpu07", PATIENCE))
        with socket.socket() as stranger:  # somebody else who knocks is no task
            wait_until(lambda: stranger.connect_ex(("127.0.0.1", port)) == 0)
            stranger.sendall(b"GET /")
            for number in (0, 4, -1):  # of nobody who is waited for
                with socket.create_connection(("127.0.0.1", port)) as other:
                    other.sendall(f"dppo {number}".encode())
            waits.append(pool.submit(wait_for_all_tasks, "127.0.0.1", port, 2, 4, "gpu07", PATIENCE))
            for wait in waits:
                wait.result()
    socket.create_server(("127.0.0.1", port)).close()


def test_a_rank_that_comes_twice_is_told_to_go_on_twice(port: int) -> None:
    with ThreadPoolExecutor(1) as pool, ExitStack() as stack:
        wait = pool.submit(wait_for_all_tasks, "127.0.0.1", port, 0, 3, "gpu07", PATIENCE)
        tasks = []
        for rank in (1, 1, 2):
            task = stack.enter_context(socket.socket())
            task.settimeout(PATIENCE)
            wait_until(lambda task=task: task.connect_ex(("127.0.0.1", port)) in (0, errno.EISCONN))
            task.sendall(f"dppo {rank}".encode())
            tasks.append(task)
        wait.result()
        assert [task.recv(8) for task in tasks] == [b"go"] * 3


def test_the_address_is_the_one_that_lightning_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in FOUR.items():
        monkeypatch.setenv(name, value)
    expected = main_address(os.environ)
    environment = SLURMEnvironment(auto_requeue=False)
    assert (environment.main_address, environment.main_port) == expected == ("gpu07", 19567)


@pytest.mark.parametrize(("devices", "count"), [(4, 4), ("4", 4), ([0, 2], 2), ("0,2,3", 3), ("1,", 1)])
def test_devices_are_counted(devices: object, count: int) -> None:
    assert device_count(devices) == count


def test_outside_slurm_nothing_is_added() -> None:
    run = SlurmRun({})
    run.check({"devices": 3, "num_nodes": 7})
    assert run.callbacks([]) == []
    assert run.plugins(None) is None
    assert default_run_dir({}) is None


def test_ranks_share_a_run_directory() -> None:
    assert default_run_dir(FOUR) == default_run_dir(FOUR | {"SLURM_PROCID": "3"}) == "runs/slurm-1234567"


def test_a_wrong_set_up_ends_the_command_with_code_2_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in FOUR.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", str(RECIPE), "--trainer.num_nodes", "2", "--trainer.devices", "3"])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"error: trainer\.devices=3, but SLURM starts 2", line)
