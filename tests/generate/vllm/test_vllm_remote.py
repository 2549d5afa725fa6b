"""VLLMRemote against servers that fail when a test says so. Real servers are in tests/slow/test_vllm_remote.py."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dppo_lightning.base.errors import EngineError, SyncError
from dppo_lightning.base.records import Completion
from dppo_lightning.generate.engine import Failed
from dppo_lightning.generate.vllm.remote import VLLMRemote
from tests.helpers.engines import ask, changed
from tests.helpers.fake_vllm import Fakes, expected, logp_of
from tests.helpers.processes import PATIENCE, wait_until

REQUESTS = [ask(f"{i}", seed=i) for i in range(20)]


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


def test_checkpoints_are_deleted_and_only_the_last_is_kept(fakes: Fakes, tmp_path: Path) -> None:
    engine = fakes.start(weights="checkpoint", weights_dir=str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(fakes.model, dtype=torch.float32)
    before = list(tmp_path.iterdir())  # what servers were asked to read at the start
    for version in (1, 2):
        engine.update_weights(model.named_parameters(), version)
        assert len(list(tmp_path.iterdir())) == len(before) + 1
    engine.close()
    assert list(tmp_path.iterdir()) == []
