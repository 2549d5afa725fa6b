"""VLLMRemote against servers that fail when a test says so. Real servers are in tests/slow/test_vllm_remote.py."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from dppo_lightning import generate
from dppo_lightning.base.errors import ConfigError, EngineError, SyncError
from dppo_lightning.base.records import Completion
from dppo_lightning.generate.engine import EngineSpec, Failed
from dppo_lightning.generate.vllm import fleet as vllm_fleet
from dppo_lightning.generate.vllm.client import generate_body, read_completion
from dppo_lightning.generate.vllm.in_server import RequireKey, command_line
from dppo_lightning.generate.vllm.remote import VLLMRemote
from dppo_lightning.generate.vllm.server import hold_port
from tests.helpers.engines import ask, changed
from tests.helpers.fake_vllm import KEY, FakeVLLM, expected, logp_of
from tests.helpers.places import ROOT
from tests.helpers.processes import PATIENCE, wait_until

REQUESTS = [ask(f"{i}", seed=i) for i in range(20)]


class Fakes:
    """An engine with two fake servers."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.servers = [FakeVLLM(model), FakeVLLM(model)]
        self.engine: VLLMRemote | None = None

    def start(self, **settings: Any) -> VLLMRemote:
        urls = [server.url for server in self.servers]
        self.engine = VLLMRemote(**{"urls": urls, "api_key": KEY, "startup_timeout": 5.0} | settings)
        self.engine.start(EngineSpec(self.model, max_model_len=512, max_logprobs=8, stop_token_ids=(42,)))
        return self.engine

    def collect(self, count: int) -> dict[str, Completion | Failed]:
        assert self.engine is not None
        results: dict[str, Completion | Failed] = {}
        while len(results) < count:
            arrived = self.engine.poll(timeout=10)
            assert arrived
            for result in arrived:
                assert result.request_id not in results
                results[result.request_id] = result
        assert self.engine.poll(timeout=0.05) == []
        return results


@pytest.fixture
def fakes(tiny_policy_dir: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fakes]:
    monkeypatch.setattr(vllm_fleet, "RETRY_SECONDS", (0.02, 0.2))
    monkeypatch.setattr(vllm_fleet, "ABORT_SECONDS", 0.3)
    fakes = Fakes(tiny_policy_dir)
    yield fakes
    if fakes.engine is not None:
        fakes.engine.close()
    for server in fakes.servers:
        server.close()


def tokens(results: dict[str, Completion | Failed]) -> dict[str, list[int]]:
    assert all(isinstance(result, Completion) for result in results.values()), results
    return {name: result.token_ids.tolist() for name, result in results.items()}


def test_requests_are_spread_over_the_servers_and_answered_once(fakes: Fakes) -> None:
    engine = fakes.start()
    engine.submit(REQUESTS)
    results = fakes.collect(20)
    assert tokens(results) == expected(REQUESTS)
    for completion in results.values():
        assert completion.logp.tolist() == [logp_of(token) for token in completion.token_ids]
        assert completion.versions.tolist() == [0] * 4
    assert sum((server.generated for server in fakes.servers), start=fakes.servers[0].generated.__class__()) == {
        request.seed: 1 for request in REQUESTS
    }


def test_the_server_with_fewer_requests_gets_the_next_and_none_more_than_it_may(fakes: Fakes) -> None:
    for server in fakes.servers:
        server.gate.clear()
    engine = fakes.start(max_concurrency=3)
    engine.submit(REQUESTS[:4])
    wait_until(lambda: [server.working for server in fakes.servers] == [2, 2])
    engine.submit(REQUESTS[4:])
    wait_until(lambda: [server.working for server in fakes.servers] == [3, 3])
    assert engine.poll(timeout=0.1) == []
    assert [server.working for server in fakes.servers] == [3, 3]
    assert engine.health().in_flight == 20
    for server in fakes.servers:
        server.gate.set()
    assert tokens(fakes.collect(20)) == expected(REQUESTS)


@pytest.mark.parametrize("fault", ["500", "drop", "hang"])
def test_a_failing_server_costs_nothing_and_comes_back_with_the_current_weights(fakes: Fakes, fault: str) -> None:
    bad, good = fakes.servers
    bad.fault = fault
    engine = fakes.start(request_timeout=2.0 if fault == "hang" else 600.0)
    engine.submit(REQUESTS)
    assert tokens(fakes.collect(20)) == expected(REQUESTS)
    assert not bad.generated
    assert f"{bad.url} (out: " in engine.health().description

    model = changed(AutoModelForCausalLM.from_pretrained(fakes.model, dtype=torch.float32))
    engine.update_weights(model.named_parameters(), version=1)
    assert (good.version, bad.version) == ("1", "0")
    bad.fault, bad.sick = "", False
    wait_until(lambda: "out" not in engine.health().description)
    assert bad.version == "1"
    assert bad.sums == {name: tensor.double().sum().item() for name, tensor in model.named_parameters()}
    engine.submit(REQUESTS)
    assert all((result.versions == 1).all() for result in fakes.collect(20).values())
    assert bad.generated


def test_a_server_that_fails_in_an_update_is_out_until_it_has_the_weights(fakes: Fakes) -> None:
    liar, good = fakes.servers
    engine = fakes.start()
    model = AutoModelForCausalLM.from_pretrained(fakes.model, dtype=torch.float32)
    liar.lie = 0.1
    engine.update_weights(model.named_parameters(), version=7)
    assert "holds other weights than it was given" in engine.health().description
    engine.submit(REQUESTS)
    assert tokens(fakes.collect(20)) == expected(REQUESTS)
    assert not liar.generated
    assert len(good.generated) == 20
    liar.lie = 0.0
    wait_until(lambda: "out" not in engine.health().description)
    assert liar.version == good.version == "7"


def test_wrong_names_are_refused_before_a_server_is_asked(fakes: Fakes) -> None:
    engine = fakes.start()
    with pytest.raises(SyncError, match="missing"):
        engine.update_weights({"model.norm.weight": torch.ones(64)}.items(), version=1)
    assert [server.version for server in fakes.servers] == ["0", "0"]
    assert engine.health().version == 0


def test_when_no_server_is_left_the_error_names_each_with_its_reason(fakes: Fakes) -> None:
    engine = fakes.start(startup_timeout=0.5)
    for server in fakes.servers:
        server.fault = "500"
    engine.submit(REQUESTS)
    with pytest.raises(EngineError, match="no vLLM server is left") as caught:
        engine.poll(timeout=PATIENCE)
    for server in fakes.servers:
        assert f"{server.url}: /health answered 503: closed for today" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not engine.health().alive
    with pytest.raises(EngineError, match="no vLLM server is left"):
        engine.submit(REQUESTS)


def test_a_request_that_every_server_fails_at_fails_alone(fakes: Fakes) -> None:
    for server in fakes.servers:
        server.poison = {3}
    fakes.start().submit(REQUESTS)
    results = fakes.collect(20)
    failed = results.pop("3")
    assert isinstance(failed, Failed)
    assert failed.reason == "3 servers failed at it: /inference/v1/generate answered 500: EngineCore died of something"
    assert tokens(results) == expected([request for request in REQUESTS if request.seed != 3])


def test_a_request_that_a_server_calls_wrong_fails_and_the_server_stays(fakes: Fakes) -> None:
    for server in fakes.servers:
        server.answers["/inference/v1/generate"] = (400, {"error": {"message": "no such thing"}})
    engine = fakes.start()
    engine.submit([ask("a")])
    assert fakes.collect(1)["a"] == Failed("a", "no such thing")
    assert "out" not in engine.health().description


def test_an_abort_that_a_server_does_not_hear_ends_the_request_all_the_same(fakes: Fakes) -> None:
    for server in fakes.servers:
        server.gate.clear()
    engine = fakes.start()
    engine.submit([*REQUESTS[:4], ask("k", topk_logprobs=3)])
    wait_until(lambda: sum(server.working for server in fakes.servers) == 5)
    engine.abort(["1", "k", "unknown"])
    results = {result.request_id: result for result in engine.poll(timeout=0)}
    assert set(results) == {"1", "k"}
    assert all((result.finish_reason, len(result)) == ("abort", 0) for result in results.values())
    assert results["k"].topk_ids.shape == (0, 3)
    for server in fakes.servers:
        server.gate.set()
    assert set(fakes.collect(3)) == {"0", "2", "3"}


def advance(engine: VLLMRemote, seconds: float) -> None:
    """Set the clock of the engine's loop forward, and let everything happen that is due by then."""
    assert engine._loop is not None
    loop = engine._loop._loop
    real = loop.time
    engine._loop.call_soon(setattr, loop, "time", lambda: real() + seconds)
    for _ in range(10):  # what is due, and what that makes due
        engine._loop.run(asyncio.sleep(0))


def test_a_request_that_takes_too_long_is_given_to_another_server(fakes: Fakes) -> None:
    slow, other = fakes.servers
    slow.gate.clear()
    engine = fakes.start(request_timeout=600.0)
    engine.submit(REQUESTS[:2])
    wait_until(lambda: slow.working == 1 and other.generated.total() == 1)
    advance(engine, 700.0)
    assert tokens(fakes.collect(2)) == expected(REQUESTS[:2])
    assert f"{slow.url} (out: no completion within 600 s" in engine.health().description


def test_a_pause_does_not_count_as_time_that_a_request_takes(fakes: Fakes) -> None:
    for server in fakes.servers:
        server.gate.clear()
    engine = fakes.start(request_timeout=600.0)
    engine.submit(REQUESTS[:2])
    wait_until(lambda: sum(server.working for server in fakes.servers) == 2)
    engine.pause()
    assert engine.poll(timeout=5) == []
    advance(engine, 700.0)
    assert "out" not in engine.health().description
    for server in fakes.servers:
        server.gate.set()
    engine.resume()
    assert tokens(fakes.collect(2)) == expected(REQUESTS[:2])


def unguarded(server: FakeVLLM) -> None:
    server.answers["unguarded"] = (200, {})


def without_extension(server: FakeVLLM) -> None:
    message = "Call to collective_rpc method failed: Method 'dppo_identity' is not implemented."
    server.answers["/collective_rpc"] = (500, {"error": {"message": message}})


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda server: setattr(server, "model", "other/model"), "serves 'other/model', not .*--served-model-name"),
        (lambda server: setattr(server, "max_model_len", 256), "--max-model-len is 256, the run needs 512"),
        (lambda server: server.worker.update(vocabulary=97), "vocabulary is 97, the run needs 96"),
        (lambda server: server.worker.update(dtype="bfloat16"), "dtype is bfloat16"),
        (lambda server: server.worker.update(logprobs_mode="raw_logprobs"), "logprobs_mode is raw_logprobs"),
        (lambda server: server.worker.update(max_logprobs=8), "--max-logprobs is 8, the run needs 9"),
        (lambda server: server.answers.update({"/tokenize": (200, {"tokens": [1, 2]})}), "tokenizer differs"),
        (lambda server: setattr(server, "dppo_identity", lambda file: server.worker | {"file": ""}), "does not see"),
        (lambda server: server.answers.update({"/weight_info": (404, {})}), "VLLM_SERVER_DEV_MODE=1"),
        (lambda server: server.answers.update({"/v1/models": (200, {})}), "does not answer as vLLM does"),
        (without_extension, "without our --worker-extension-cls"),
        (unguarded, "answers anyone, without the key"),
    ],
)
def test_a_server_that_is_not_what_the_run_needs_is_refused(
    fakes: Fakes, spoil: Callable[[FakeVLLM], None], reason: str
) -> None:
    spoil(fakes.servers[1])
    with pytest.raises(EngineError, match=rf"^vLLM server {fakes.servers[1].url}: .*{reason}") as caught:
        fakes.start()
    assert "\n" not in str(caught.value)


def test_a_wrong_key_is_refused(fakes: Fakes) -> None:
    with pytest.raises(EngineError, match=r"refused the API key .*DPPO_API_KEY"):
        fakes.start(api_key="guess")


def test_a_server_that_cannot_be_reached_is_named(fakes: Fakes) -> None:
    with hold_port() as nobody_listens:
        url = f"http://127.0.0.1:{nobody_listens.getsockname()[1]}"
        with pytest.raises(EngineError, match=rf"^vLLM server {url}: .*[Cc]onnect") as caught:
            fakes.start(urls=[url])
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_a_temporary_folder_with_a_long_name_is_refused(
    tiny_model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 60)))
    with pytest.raises(EngineError, match="set TMPDIR to a shorter one"):
        VLLMRemote().start(EngineSpec(tiny_model_dir))


def test_a_folder_that_does_not_exist_is_named(fakes: Fakes, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="nowhere"):
        fakes.start(weights="checkpoint", weights_dir=str(tmp_path / "nowhere"))


def test_the_key_comes_from_the_environment(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPPO_API_KEY", KEY)
    assert fakes.start(api_key=None).health().alive


def test_checkpoints_are_deleted_and_only_the_last_is_kept(fakes: Fakes, tmp_path: Path) -> None:
    engine = fakes.start(weights="checkpoint", weights_dir=str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(fakes.model, dtype=torch.float32)
    before = list(tmp_path.iterdir())  # what servers were asked to read at the start
    for version in (1, 2):
        engine.update_weights(model.named_parameters(), version)
        assert len(list(tmp_path.iterdir())) == len(before) + 1
    engine.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"servers": 0}, "servers must be >= 1"),
        ({"max_concurrency": 0}, "max_concurrency"),
        ({"threads": 0}, "threads"),
        ({"request_timeout": 0}, "request_timeout"),
        ({"startup_timeout": -1}, "startup_timeout"),
        ({"kv_cache_gib": 0}, "kv_cache_gib"),
        ({"max_restarts": -1}, "max_restarts"),
        ({"gpu_memory_utilization": 2}, "gpu_memory_utilization"),
        ({"weights": "pigeon"}, "weights must be"),
        ({"weights": "checkpoint"}, "needs weights_dir"),
        ({"weights_dir": "/tmp"}, "weights_dir is of use"),
        ({"weights": "native"}, "needs GPUs"),
        ({"api_key": "k"}, "drop api_key, or set urls"),
        ({"urls": []}, "urls is empty"),
        ({"urls": ["http://a:1"], "servers": 2, "api_key": "k"}, "not both"),
        ({"urls": ["a:1"], "api_key": "k"}, "not like http://host:port"),
        ({"urls": ["http://a:1/v1"], "api_key": "k"}, "not like http://host:port"),
        ({"urls": ["http://a:1", "http://a:1/"], "api_key": "k"}, "twice"),
        ({"urls": ["http://a:1"]}, "DPPO_API_KEY"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    wrong: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DPPO_API_KEY", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=re.escape(message)):
        VLLMRemote(**wrong)


def position(token: int, *top: tuple[int, float, int]) -> dict[str, Any]:
    entries = [{"token_id": name, "logprob": logp, "rank": rank} for name, logp, rank in top]
    return {"token_id": token, "logprob": entries[0]["logprob"], "rank": entries[0]["rank"], "top_logprobs": entries}


def test_the_most_likely_tokens_are_there_whether_the_sampled_one_is_among_them_or_not() -> None:
    request = ask(topk_logprobs=2, max_new_tokens=50, prompt=range(20))
    spec = EngineSpec("m", max_model_len=60, max_logprobs=2, stop_token_ids=(42,))
    sampling = generate_body(request, "w", spec, vocabulary=96)["sampling_params"]
    assert (sampling["logprobs"], sampling["max_tokens"], sampling["stop_token_ids"]) == (3, 40, [42])
    content = [
        position(5, (5, -2.0, 2), (8, -0.5, 1), (9, -3.0, 3)),  # as vLLM lists three: sampled, then by rank
        position(7, (7, -4.0, 9), (8, -0.5, 1), (9, -0.75, 2)),
        position(8, (8, 0.0, 1), (1, -9999.0, 2), (2, -9999.0, 3)),
    ]
    choice = {
        "token_ids": [5, 7, 8],
        "logprobs": {"content": content},
        "finish_reason": "stop",
        "weight_versions": [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 3}],
    }
    completion = read_completion(request, {"choices": [choice]})
    assert completion.topk_ids.tolist() == [[8, 5], [8, 9], [8, 1]]
    assert completion.topk_logp.tolist() == [[-0.5, -2.0], [-0.5, -0.75], [0.0, -np.inf]]
    assert completion.logp.tolist() == [-2.0, -4.0, 0.0]
    assert completion.versions.tolist() == [3, 4, 4]
    with pytest.raises(ValueError, match="without a weight version"):
        read_completion(request, {"choices": [choice | {"weight_versions": None}]})


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/health", [], 200),
        ("/pause", [(b"authorization", b"Bearer secret")], 200),
        ("/pause", [(b"authorization", b"Bearer secre")], 401),
        ("/collective_rpc", [], 401),
        ("/metrics", [], 401),
    ],
)
def test_nothing_but_health_is_answered_without_the_key(
    path: str, headers: list[tuple[bytes, bytes]], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    monkeypatch.setenv("VLLM_API_KEY", "secret")
    asyncio.run(RequireKey(app)({"type": "http", "path": path, "headers": headers}, app, send))
    assert sent[0]["status"] == status
    monkeypatch.delenv("VLLM_API_KEY")
    with pytest.raises(RuntimeError, match="VLLM_API_KEY"):
        RequireKey(app)


def test_settings_become_a_command_line() -> None:
    words = command_line({"max_model_len": 5, "enforce_eager": True, "enable_chunked_prefill": False, "seed": None})
    assert words == ["--max-model-len", "5", "--enforce-eager", "--no-enable-chunked-prefill"]


def test_the_settings_of_the_docs_can_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPPO_API_KEY", "k")
    page = (ROOT / "docs" / "remote-engine.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        engine = yaml.safe_load(block)["data"]["engine"]
        assert engine["class_path"] == "dppo_lightning.generate.VLLMRemote"
        generate.VLLMRemote(**engine["init_args"])
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| [^|]+ \| [^|]*\|$", page, re.MULTILINE)
    listed = [name for row in rows for name in re.findall(r"\w+", row)]
    arguments = VLLMRemote.__init__.__annotations__.keys() - {"return"}
    assert arguments <= set(listed)
