"""An engine that does not hold the policy's weights is found out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from dppo_lightning.batch import Prompt, Sequence
from dppo_lightning.errors import EngineError, SyncError
from dppo_lightning.rollout.engine import EngineSpec, Request, RolloutEngine, Sampling, UpdateStats
from dppo_lightning.rollout.inbox import Inbox
from dppo_lightning.rollout.scripted import ScriptedEngine
from dppo_lightning.rollout.transformers_engine import TransformersEngine
from dppo_lightning.rollout.weight_sync import TOLERANCE, WeightSync

from .engine_case import changed

PROBE = Prompt("heldout/0", (7, 8, 9), "'()")


class Stale(TransformersEngine):
    """Says that it took the new weights, and keeps the old ones."""

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> UpdateStats:
        if version == 0:
            return super().update_weights(named_tensors, version)
        self._version = version
        return UpdateStats(len(list(named_tensors)), 0, 0.0, version)


class Behind(TransformersEngine):
    """Takes the new weights and goes on stamping the old version."""

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> UpdateStats:
        super().update_weights(named_tensors, max(version - 1, 0))
        return UpdateStats(0, 0, 0.0, version)


def logp_of(model: PreTrainedModel, temperature: float = 1.0) -> Callable[[Sequence], np.ndarray]:
    def logp(sequence: Sequence) -> np.ndarray:
        with torch.no_grad():
            table = (model(torch.from_numpy(sequence.token_ids)[None]).logits[0] / temperature).log_softmax(-1)
        return np.array([table[place - 1, sequence.token_ids[place]].item() for place in sequence.generated])

    return logp


def make_sync(
    engine: RolloutEngine, logp: Callable[[Sequence], np.ndarray], tolerance: float = 1e-4, **sampling: Any
) -> WeightSync:
    return WeightSync(Inbox(engine), PROBE, Sampling(**sampling), tolerance, logp)


@pytest.fixture(scope="module")
def model(tiny_model_dir: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)


@pytest.fixture
def start(tiny_model_dir: str) -> Iterator[Callable[..., Any]]:
    """Starts engines, and stops them after the test."""
    started: list[RolloutEngine] = []

    def start(engine: RolloutEngine, **spec: Any) -> RolloutEngine:
        engine.start(EngineSpec(tiny_model_dir, max_model_len=64, **spec))
        started.append(engine)
        return engine

    yield start
    for engine in started:
        engine.close()


def scripted(off: float, **settings: Any) -> ScriptedEngine:
    """Every log-prob is -1 - off."""
    engine = ScriptedEngine(lambda request, version: ([1, 2, 3], [-1.0, -1.0, -1.0 - off]), **settings)
    engine.start(EngineSpec("none"))
    return engine


def minus_one(sequence: Sequence) -> np.ndarray:
    return np.full(sequence.tokens, -1.0, np.float32)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_same_weights_pass_and_the_report_says_what_was_done(
    temperature: float, model: PreTrainedModel, start: Callable[..., Any]
) -> None:
    sync = make_sync(start(TransformersEngine()), logp_of(model, temperature), temperature=temperature)
    report = sync.push(model.named_parameters(), version=3)
    assert 0 <= report.parity_error < 1e-4
    assert report.bytes == 4 * sum(parameter.numel() for parameter in model.parameters())
    assert report.version == 3
    assert sync.in_force(3)
    assert not sync.in_force(4)
    assert report.seconds > 0


def test_new_weights_arrive(model: PreTrainedModel, start: Callable[..., Any]) -> None:
    new = changed(model)
    sync = make_sync(start(TransformersEngine()), logp_of(new))
    assert sync.push(new.named_parameters(), version=1).parity_error < 1e-4


def test_an_engine_that_drops_updates_is_refused(model: PreTrainedModel, start: Callable[..., Any]) -> None:
    trained = copy.deepcopy(model)
    sync = make_sync(start(Stale()), logp_of(trained), TOLERANCE["bfloat16"])
    assert sync.push(trained.named_parameters(), version=0).parity_error < 1e-4
    trained.load_state_dict(changed(model).state_dict())
    with pytest.raises(SyncError, match=r"version 1 .* differ by .* does not hold the policy's weights"):
        sync.push(trained.named_parameters(), version=1)
    assert not sync.in_force(0)
    assert not sync.in_force(1)


def test_an_engine_with_another_temperature_is_refused(model: PreTrainedModel, start: Callable[..., Any]) -> None:
    sync = make_sync(start(TransformersEngine()), logp_of(model, 1.0), 1e-2, temperature=0.5)
    with pytest.raises(SyncError, match="differ by"):
        sync.push(model.named_parameters(), version=0)


def test_an_engine_that_stamps_another_version_is_refused(model: PreTrainedModel, start: Callable[..., Any]) -> None:
    sync = make_sync(start(Behind()), logp_of(model))
    with pytest.raises(SyncError, match="weight version 4, not 5"):
        sync.push(model.named_parameters(), version=5)
    assert not sync.in_force(5)


def test_a_probe_that_cannot_be_generated_is_refused_with_its_reason() -> None:
    engine = scripted(0.0, failures={"probe/2": "out of memory"})
    with pytest.raises(SyncError, match="probe could not be generated: out of memory"):
        make_sync(engine, minus_one).push([], version=2)


def test_a_refused_update_leaves_the_engine_generating(tiny_model_dir: str) -> None:
    engine = ScriptedEngine(vocabulary=96, delay=1.0, check_weights=True)
    engine.start(EngineSpec(tiny_model_dir))
    sync = make_sync(engine, minus_one)
    arrived: list[str] = []
    sync.inbox.submit([Request("mine", (1, 2), Sampling(max_new_tokens=2), 0)], lambda r: arrived.append(r.request_id))
    with pytest.raises(SyncError, match="missing: "):
        sync.push([], version=1)
    sync.inbox.collect(timeout=5.0)
    assert arrived == ["mine"]


def test_an_engine_that_dies_in_an_update_says_so_itself(tiny_model_dir: str) -> None:
    class Dies(ScriptedEngine):
        def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> UpdateStats:
            self.spec = None
            raise EngineError("out of memory")

    engine = Dies(vocabulary=96, delay=1.0)
    engine.start(EngineSpec(tiny_model_dir))
    sync = make_sync(engine, minus_one)
    sync.inbox.submit([Request("mine", (1, 2), Sampling(max_new_tokens=2), 0)], lambda result: None)
    with pytest.raises(EngineError, match="out of memory"):
        sync.push([], version=1)


def test_wrong_names_are_refused_and_the_version_stays(model: PreTrainedModel, start: Callable[..., Any]) -> None:
    sync = make_sync(start(TransformersEngine()), logp_of(model))
    sync.push(model.named_parameters(), version=0)
    with pytest.raises(SyncError, match="missing: "):
        sync.push(list(model.named_parameters())[1:], version=1)
    assert sync.in_force(0)


@settings(deadline=None)
@given(off=st.floats(-2, 2), tolerance=st.sampled_from(sorted(TOLERANCE.values())))
def test_a_single_token_beyond_the_tolerance_is_refused(off: float, tolerance: float) -> None:
    off = float(np.float32(-1.0 - off)) + 1.0  # as the engine can say it
    sync = make_sync(scripted(-off), minus_one, tolerance)
    if abs(off) <= tolerance:
        assert sync.push([], version=1).parity_error == pytest.approx(abs(off))
    else:
        with pytest.raises(SyncError, match="differ by"):
            sync.push([], version=1)


def test_log_probs_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(SyncError, match="differ by nan"):
        make_sync(scripted(float("nan")), minus_one, tolerance=1e9).push([], version=1)


def test_a_bf16_engine_passes_its_own_tolerance_and_not_that_of_float32(
    model: PreTrainedModel, start: Callable[..., Any]
) -> None:
    engine = start(TransformersEngine(), dtype="bfloat16")
    assert make_sync(engine, logp_of(model), TOLERANCE["bfloat16"]).push(model.named_parameters(), 0).parity_error > 0
    with pytest.raises(SyncError, match=r"data\.rollout_dtype"):
        make_sync(engine, logp_of(model), TOLERANCE["float32"]).push(model.named_parameters(), 1)


def test_coarser_dtypes_have_wider_tolerances() -> None:
    assert 0 < TOLERANCE["float32"] < TOLERANCE["float16"] < TOLERANCE["bfloat16"] < 1


def test_the_probe_is_short_and_drawn_from_the_whole_distribution() -> None:
    seen: list[Request] = []

    def script(request: Request, version: int) -> tuple[list[int], list[float]]:
        seen.append(request)
        return [1], [-1.0]

    engine = ScriptedEngine(script)
    engine.start(EngineSpec("none"))
    sync = make_sync(engine, minus_one, temperature=0.7, top_p=0.5, top_k=3, max_new_tokens=200, topk_logprobs=4)
    sync.push([], version=1)
    assert seen[0].prompt_token_ids == PROBE.token_ids
    assert seen[0].sampling == Sampling(temperature=0.7, max_new_tokens=16)
