"""VLLMEmbedded whose process is killed: it goes on, and nothing tells that it was. A test starts vLLM once or twice."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dppo_lightning.base.errors import EngineError, SyncError
from dppo_lightning.base.records import Completion
from dppo_lightning.generate.engine import EngineSpec
from dppo_lightning.generate.vllm.child_process import ChildProcess
from dppo_lightning.generate.vllm.embedded import VLLMEmbedded
from tests.helpers.engines import LONGS, Case, ask, changed, error, weights
from tests.helpers.processes import running

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def shared(tiny_model_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """One engine for all tests that it survives. When it is closed, all processes and files are gone."""
    folder, before = tmp_path_factory.mktemp("temporary"), tempfile.tempdir
    tempfile.tempdir = str(folder)
    engine = VLLMEmbedded(kv_cache_gib=0.25)
    spec = EngineSpec(tiny_model_dir, max_model_len=512, max_logprobs=8, stop_token_ids=(42,))
    pids = []
    restart = ChildProcess.restart
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ChildProcess, "restart", lambda child: (restart(child), pids.append(child.pid)))
            engine.start(spec)
            pids.append(pid_of(engine))
            yield Case(engine, spec, AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32))
            engine.close()
    finally:
        tempfile.tempdir = before
    assert not any(running(pid) for pid in pids)
    assert list(folder.iterdir()) == []


@pytest.fixture
def case(shared: Case) -> Case:
    """At version 0, with the weights of the model's folder, nothing in flight, and no death counted."""
    shared.engine.update_weights(weights(shared.model), version=0)
    shared.generate([ask()])
    return shared


def pid_of(engine: VLLMEmbedded) -> int:
    assert engine.pid is not None
    return engine.pid


def kill(engine: VLLMEmbedded) -> int:
    pid = pid_of(engine)
    os.kill(pid, signal.SIGKILL)
    return pid


def assert_same(results: dict[str, Completion], expected: list[Completion]) -> None:
    assert results.keys() == {completion.request_id for completion in expected}
    for whole in expected:
        completion = results[whole.request_id]
        assert completion.token_ids.tolist() == whole.token_ids.tolist()
        assert completion.finish_reason == whole.finish_reason
        assert completion.versions.tolist() == whole.versions.tolist()
        # The same sums in other company: fp32 rounding, as between any two batches.
        assert np.abs(completion.logp - whole.logp).max() < 1e-5


def test_killed_while_it_generates_it_gives_what_it_would_have_given(
    case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    expected = case.generate(LONGS)
    results = case.begin_long()
    caplog.set_level(logging.WARNING)
    first = kill(case.engine)
    results |= case.wait(len(LONGS) - len(results))
    assert_same(results, expected)
    assert not running(first)
    (record,) = caplog.records
    assert "killed by SIGKILL" in record.getMessage()
    assert "restart 1 of at most 3" in record.getMessage()


@pytest.mark.slow
def test_killed_before_it_has_answered_anything_it_gives_the_same_bit_for_bit(case: Case) -> None:
    expected = {completion.request_id: completion for completion in case.generate(LONGS)}
    case.engine.pause()
    case.engine.submit(LONGS)
    kill(case.engine)
    assert case.engine.poll(timeout=0.1) == []
    assert case.engine.health().in_flight == len(LONGS)
    case.engine.resume()
    for name, completion in case.wait(len(LONGS)).items():
        assert completion.token_ids.tobytes() == expected[name].token_ids.tobytes()
        assert completion.logp.tobytes() == expected[name].logp.tobytes()


@pytest.mark.slow
def test_killed_between_updates_it_has_the_weights_of_the_last_one(case: Case) -> None:
    new = changed(case.model)
    case.engine.update_weights(weights(new), version=3)
    kill(case.engine)
    for completion in case.generate([ask(f"{i}", seed=i) for i in range(4)]):
        assert (completion.versions == 3).all()
        assert error(new, completion) < TOLERANCE
        assert error(case.model, completion) > 100 * TOLERANCE
    assert case.engine.health().version == 3


def test_killed_in_an_update_it_gets_the_new_weights_and_generates_anew_what_was_in_flight(case: Case) -> None:
    new = changed(case.model)
    results = case.begin_long()

    def while_dying() -> Iterator[tuple[str, torch.Tensor]]:
        for place, item in enumerate(weights(new)):
            if place == 5:
                kill(case.engine)
            yield item

    stats = case.engine.update_weights(while_dying(), version=4)
    assert stats.tensors == len(list(new.parameters()))
    results |= case.wait(len(LONGS) - len(results))
    assert {version for completion in results.values() for version in completion.versions} <= {0, 4}
    again = [completion for completion in results.values() if completion.versions[0] == 4]
    assert len(again) >= 2
    for completion in again:
        assert (completion.versions == 4).all()
        assert error(new, completion) < TOLERANCE


@pytest.mark.slow
def test_half_written_weights_are_never_loaded(
    tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    engine = VLLMEmbedded(kv_cache_gib=0.25)
    case = Case(engine, EngineSpec(tiny_model_dir, max_model_len=512), model)
    engine.start(case.spec)
    try:
        with pytest.raises(SyncError, match="missing"):
            engine.update_weights(list(weights(changed(model)))[:5], version=1)
        kill(engine)  # the weights in force are the folder's
        (completion,) = case.generate([ask()])
        assert (completion.versions == 0).all()
        assert error(model, completion) < TOLERANCE

        engine.update_weights(weights(model), version=1)
        with pytest.raises(ZeroDivisionError):
            engine.update_weights(fails_half_way(changed(model)), version=2)
        (completion,) = case.generate([ask()])
        assert (completion.versions == 1).all()
        assert error(model, completion) < TOLERANCE
        kill(engine)
        with pytest.raises(EngineError, match=r"killed by SIGKILL.*cannot be started again: an update that failed"):
            case.generate([ask()])
    finally:
        engine.close()


def fails_half_way(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for place, item in enumerate(weights(model)):
        yield item
        if place == 5:
            raise ZeroDivisionError


@pytest.mark.slow
def test_killed_again_and_again_it_says_how_it_died_and_where_the_log_is(
    tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    engine = VLLMEmbedded(kv_cache_gib=0.25, max_restarts=2)
    engine.start(EngineSpec(tiny_model_dir, max_model_len=512))
    pids = [pid_of(engine)]
    restart = ChildProcess.restart

    def restart_and_kill(child: ChildProcess) -> None:
        restart(child)
        pids.append(child.pid)
        os.kill(child.pid, signal.SIGKILL)

    monkeypatch.setattr(ChildProcess, "restart", restart_and_kill)
    engine.submit(LONGS)
    kill(engine)
    with pytest.raises(EngineError, match=r"killed by SIGKILL.*it died 3 times in a row \(max_restarts 2\)") as caught:
        engine.poll()
    assert "\n" not in str(caught.value)
    assert len(set(pids)) == 3
    assert not any(running(pid) for pid in pids)
    (log,) = tmp_path.iterdir()
    assert f"(log: {log})" in str(caught.value)
    assert not engine.health().alive
    engine.close()


@pytest.mark.slow
def test_weights_rounded_on_their_way_are_those_that_vllm_would_have_rounded(tiny_model_dir: str) -> None:
    model = changed(AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32))
    engine = VLLMEmbedded(kv_cache_gib=0.25)
    case = Case(engine, EngineSpec(tiny_model_dir, dtype="bfloat16", max_model_len=512), model)
    engine.start(case.spec)
    try:
        assert engine.wire_dtype is torch.bfloat16
        halved = engine.update_weights(weights(model), version=1)
        rounded = case.generate([ask(f"{i}", seed=i) for i in range(8)])
        engine.wire_dtype = None
        whole = engine.update_weights(weights(model), version=2)
        expected = case.generate([ask(f"{i}", seed=i) for i in range(8)])
        assert whole.bytes == 2 * halved.bytes == 4 * sum(parameter.numel() for parameter in model.parameters())
        for ours, theirs in zip(rounded, expected, strict=True):
            assert ours.token_ids.tobytes() == theirs.token_ids.tobytes()
            assert ours.logp.tobytes() == theirs.logp.tobytes()
            assert 0 < error(model, ours) < 0.5
    finally:
        engine.close()
