"""VLLMRemote with real servers: two of which one is killed, and one that is started by the command of the docs."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from transformers import AutoModelForCausalLM

from dppo_lightning.base.errors import EngineError, SyncError
from dppo_lightning.base.records import Completion
from dppo_lightning.generate.engine import EngineSpec, Failed, UpdateStats
from dppo_lightning.generate.vllm.remote import VLLMRemote
from dppo_lightning.generate.vllm.server import hold_port
from tests.helpers.engines import LONGS, Case, ask, changed, error, weights
from tests.helpers.places import ROOT
from tests.helpers.processes import kill, session_of, wait_until
from tests.helpers.runs import fit

TOLERANCE = 1e-4

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


@pytest.fixture(scope="module")
def two(tiny_model_dir: str) -> Iterator[Case]:
    """Two servers."""
    spec = EngineSpec(tiny_model_dir, max_model_len=512, max_logprobs=8, stop_token_ids=(42,))
    engine = VLLMRemote(servers=2, kv_cache_gib=0.25, threads=1, max_restarts=1)
    engine.start(spec)
    yield Case(engine, spec, AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32))
    engine.close()


def both_work(case: Case) -> None:
    """Completions of the two servers are those of the current weights."""
    case.engine.submit(LONGS)
    wait_until(lambda: all(server.in_flight for server in case.engine.server_states()))
    for completion in case.wait(len(LONGS)).values():
        assert (completion.versions == case.engine.health().version).all()
        assert error(case.model, completion) < TOLERANCE


def kill_for_ever(engine: VLLMRemote) -> NoReturn:
    """Kill every server as often as it is started."""
    while True:
        for server in engine.server_states():
            if server.pid is not None:
                kill([server.pid])
        engine.poll(timeout=0.1)


def semaphores_of(session: int) -> list[Path]:
    """Of ``multiprocessing``, that processes of a session hold."""
    lines = [line for pid in session_of(session) for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    inodes = {int(line.split()[4]) for line in lines if "/dev/shm/sem." in line}
    return [path for path in Path("/dev/shm").glob("sem.mp-*") if path.stat().st_ino in inodes]


def test_an_update_reaches_both_servers(two: Case) -> None:
    both_work(two)
    two.model = changed(two.model)
    two.engine.update_weights(weights(two.model), version=1)
    both_work(two)
    given = dict(two.model.named_parameters())
    del given["model.norm.weight"]
    with pytest.raises(SyncError, match=r"model\.norm\.weight"):
        two.engine.update_weights(given.items(), version=2)
    both_work(two)


def test_a_killed_server_costs_no_completion_and_comes_back_with_the_current_weights(two: Case) -> None:
    expected = two.generate(LONGS)
    two.engine.submit(LONGS)
    results = two.wait(1)
    killed, _ = two.engine.server_states()
    pid = killed.pid
    assert killed.in_flight
    os.kill(pid, signal.SIGKILL)
    results |= two.wait(len(LONGS) - len(results))
    assert two.engine.poll(timeout=0) == []
    for request, whole in zip(LONGS, expected, strict=True):
        again = results[request.id]
        assert again.token_ids.tolist() == whole.token_ids.tolist()
        assert abs(again.logp - whole.logp).max() < TOLERANCE
    assert not two.engine.server_states()[0].up
    assert "out: " in two.engine.health().description

    two.model = changed(two.model, seed=1)
    two.engine.update_weights(weights(two.model), version=2)
    wait_until(lambda: two.engine.server_states()[0].up, 120)
    assert two.engine.server_states()[0].pid != pid
    assert session_of(pid) == []
    both_work(two)


def test_when_restarts_are_used_up_the_error_names_every_server(two: Case) -> None:
    two.engine.submit(LONGS)
    servers = two.engine.server_states()
    pids = [server.pid for server in servers]
    semaphores = [path for pid in pids for path in semaphores_of(pid)]
    assert semaphores
    with pytest.raises(EngineError, match="no vLLM server is left") as caught:
        kill_for_ever(two.engine)
    assert len(re.findall(r"http://127\.0\.0\.1:\d+: ", str(caught.value))) == len(servers)
    assert not two.engine.health().alive
    with pytest.raises(EngineError, match="no vLLM server is left"):
        two.engine.submit([ask()])
    two.engine.close()
    assert [session_of(pid) for pid in pids] == [[], []]
    assert not any(path.exists() for path in semaphores)


@pytest.fixture(scope="module")
def documented(tiny_policy_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a server that runs the command of docs/remote-engine.md, with what it says to add on a CPU."""
    page = (ROOT / "docs" / "remote-engine.md").read_text()
    (block,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    (cpu,) = re.findall(r"On a CPU add `(.*?)`", page, re.DOTALL)
    export, command = block.replace("\\\n", " ").strip().splitlines()
    environment = dict(setting.split("=", 1) for setting in export.split()[1:]) | {"VLLM_API_KEY": "secret"}
    holder = hold_port()
    port = holder.getsockname()[1]
    places = {"MODEL": tiny_policy_dir, "0.0.0.0": "127.0.0.1", "8000": str(port), "python": sys.executable}
    words = [places.get(word, word) for word in shlex.split(f"{command} {cpu}")]
    folder = tmp_path_factory.mktemp("server")
    environment |= {"TMPDIR": str(folder), "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": str(ROOT)}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            words, env=os.environ | environment, stdout=log, stderr=log, start_new_session=True, cwd=folder
        )
    yield f"http://127.0.0.1:{port}"
    holder.close()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def answers(url: str) -> bool:
    with contextlib.suppress(OSError):
        urllib.request.urlopen(f"{url}/health", timeout=5).close()
        return True
    return False


def test_a_server_that_was_started_as_the_docs_say_serves_a_run(
    documented: str, tiny_policy_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = EngineSpec(tiny_policy_dir, max_model_len=512, max_logprobs=20, stop_token_ids=(42,))
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_dir, dtype=torch.float32)
    monkeypatch.setenv("DPPO_API_KEY", "secret")

    def engine() -> VLLMRemote:
        return VLLMRemote([documented], weights="checkpoint", weights_dir=str(tmp_path))

    first = engine()
    with pytest.raises(EngineError, match=f"^vLLM server {documented}: "):
        first.start(spec)
    wait_until(lambda: answers(documented), 120)
    first.start(spec)
    case = Case(first, spec, model)
    for round_ in range(2):
        (completion,) = case.generate([ask(topk_logprobs=20)])
        assert (completion.versions == round_).all()
        assert error(case.model, completion) < TOLERANCE
        assert completion.topk_ids.shape == (len(completion), 20)
        case.model = changed(case.model)
        first.update_weights(weights(case.model), version=round_ + 1)
    first.close()
    assert list(tmp_path.iterdir()) == []

    second = engine()  # the next run finds the weights that the server began with
    second.start(spec)
    (completion,) = Case(second, spec, model).generate([ask()])
    assert error(model, completion) < TOLERANCE
    second.close()

    for wrong, reason in (
        ({"max_model_len": 1024}, "--max-model-len is 512"),
        ({"max_logprobs": 21}, "--max-logprobs is 21, the run needs 22"),
        ({"dtype": "bfloat16"}, "its dtype is float32"),
    ):
        with pytest.raises(EngineError, match=f"{documented}.*{reason}"):
            engine().start(replace(spec, **wrong))
    with pytest.raises(EngineError, match="refused the API key"):
        VLLMRemote([documented], api_key="guess", weights="checkpoint", weights_dir=str(tmp_path)).start(spec)


def test_servers_end_with_a_killed_trainer(tiny_model_dir: str) -> None:
    program = f"""
import time
from dppo_lightning.generate.engine import EngineSpec
from dppo_lightning.generate.vllm.remote import VLLMRemote
engine = VLLMRemote(kv_cache_gib=0.25, threads=1)
engine.start(EngineSpec({tiny_model_dir!r}, max_model_len=512))
print(engine.server_states()[0].pid, flush=True)
time.sleep(60)
"""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # the paths of sockets must be short
        environment = os.environ | {"TMPDIR": folder, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment) as trainer:
            assert trainer.stdout is not None
            pid = int(trainer.stdout.readline())
            semaphores = semaphores_of(pid)
            assert semaphores
            trainer.kill()
            trainer.wait()
            wait_until(lambda: session_of(pid) == [])
        assert os.listdir(folder) == []
    assert not any(path.exists() for path in semaphores)


class Doomed(VLLMRemote):
    """One of its servers is killed once, when the first completion of the second rollout has come back."""

    updates, killed = -1, False

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> UpdateStats:
        self.updates += 1
        return super().update_weights(named_tensors, version)

    def poll(self, timeout: float | None = None) -> list[Completion | Failed]:
        found = super().poll(timeout)
        if not self.killed and self.updates == 1 and any(result.request_id.startswith("train/") for result in found):
            self.killed = True
            kill([self.server_states()[0].pid])
        return found


def test_a_run_goes_on_when_one_of_two_servers_is_killed(tiny_policy_dir: str) -> None:
    data = {"max_new_tokens": 60, "samples_per_prompt": 16}
    quiet, shot = (
        fit(tiny_policy_dir, data=data | {"engine": kind(servers=2, threads=1, kv_cache_gib=0.25)}, max_steps=3)
        for kind in (VLLMRemote, Doomed)
    )
    assert shot.data.engine.killed
    for mine, other in zip(quiet.record.rollouts, shot.record.rollouts, strict=True):
        assert [len(group.completions) for group in other] == [16] * 3
        assert [group.texts for group in mine] == [group.texts for group in other]
    assert max(shot.metrics.of("sync/parity_error")) < TOLERANCE
    for name, weight in quiet.weights.items():
        torch.testing.assert_close(shot.weights[name], weight, rtol=0, atol=1e-5)
