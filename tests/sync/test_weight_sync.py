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

from dppo_lightning.base.errors import EngineError, SyncError
from dppo_lightning.base.records import Prompt, Sequence
from dppo_lightning.generate.engine import EngineSpec, Request, RolloutEngine, Sampling, UpdateStats
from dppo_lightning.generate.inbox import Inbox
from dppo_lightning.generate.scripted import ScriptedEngine
from dppo_lightning.generate.transformers_engine import TransformersEngine
from dppo_lightning.sync.weight_sync import GROWTH, LIMITS, SAMPLES, ParityProbe, WeightSync
from tests.helpers.engines import changed

PROBE = Prompt("heldout/0", (7, 8, 9), "'()")
SECOND = Prompt("heldout/1", (9, 8, 7), ")('")
TOKENS = list(range(1, 13))
ONES = np.ones(len(TOKENS))
TrainerLogp = Callable[[list[Sequence]], list[np.ndarray]]


class Stale(TransformersEngine):
    """Says that it took the new weights, and keeps those that it was given first."""

    kept: list[tuple[str, Tensor]] | None = None

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> UpdateStats:
        given = [(name, tensor.clone()) for name, tensor in named_tensors]
        self.kept = self.kept or given
        return super().update_weights(self.kept, version)


class Behind(TransformersEngine):
    """Takes the new weights and goes on stamping the old version."""

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> UpdateStats:
        super().update_weights(named_tensors, max(version - 1, 0))
        return UpdateStats(0, 0, 0.0, version)


def logp_of(model: PreTrainedModel, temperature: float = 1.0) -> TrainerLogp:
    def of_one(sequence: Sequence) -> np.ndarray:
        with torch.no_grad():
            table = (model(torch.from_numpy(sequence.token_ids)[None]).logits[0] / temperature).log_softmax(-1)
        return np.array([table[place - 1, sequence.token_ids[place]].item() for place in sequence.generated])

    return lambda sequences: [of_one(sequence) for sequence in sequences]


def make_sync(
    engine: RolloutEngine,
    logp: TrainerLogp,
    dtype: str = "float32",
    tolerance: float | None = None,
    as_loaded: bool = True,
    prompts: tuple[Prompt, ...] = (PROBE, SECOND),
    **sampling: Any,
) -> WeightSync:
    return WeightSync(ParityProbe(Inbox(engine), prompts, Sampling(**sampling), dtype, tolerance, logp), as_loaded)


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


def scripted(off: Callable[[Request, int], Any], **settings: Any) -> ScriptedEngine:
    """Twelve tokens of log-prob -1 - ``off``, a number or one for each token."""
    engine = ScriptedEngine(lambda request, version: (TOKENS, list(-1.0 - off(request, version) * ONES)), **settings)
    engine.start(EngineSpec("none"))
    return engine


def minus_one(sequences: list[Sequence]) -> list[np.ndarray]:
    return [np.full(sequence.tokens, -1.0, np.float32) for sequence in sequences]


def after_updates(by: float) -> Callable[[Request, int], float]:
    return lambda request, version: by if version > 0 else 0.0


def bf16(mean: float) -> Callable[[Request, int], np.ndarray]:
    """Noise of a coarse engine, other for each request: ``mean`` on average, and ten times that on rare tokens."""

    def noise(request: Request, version: int) -> np.ndarray:
        drawn = np.random.default_rng([version, request.seed]).standard_t(3, len(TOKENS))
        return mean * drawn / 1.1  # the mean of |t| at 3 degrees of freedom

    return noise


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_same_weights_pass_and_the_report_says_what_was_done(
    temperature: float, model: PreTrainedModel, start: Callable[..., Any]
) -> None:
    sync = make_sync(start(TransformersEngine()), logp_of(model, temperature), temperature=temperature)
    report = sync.push(model.named_parameters(), version=3)
    assert 0 <= report.parity.mean <= report.parity.largest < 1e-4
    assert report.bytes == 4 * sum(parameter.numel() for parameter in model.parameters())
    assert report.version == 3
    assert sync.in_force(3)
    assert not sync.in_force(4)
    assert report.seconds > 0


def test_new_weights_arrive(model: PreTrainedModel, start: Callable[..., Any]) -> None:
    trained = copy.deepcopy(model)
    sync = make_sync(start(TransformersEngine()), logp_of(trained))
    sync.push(trained.named_parameters(), version=0)
    trained.load_state_dict(changed(model).state_dict())
    assert sync.push(trained.named_parameters(), version=1).parity.largest < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_that_drops_updates_is_refused(dtype: str, model: PreTrainedModel, start: Callable[..., Any]) -> None:
    trained = copy.deepcopy(model)
    sync = make_sync(start(Stale(), dtype=dtype), logp_of(trained), dtype)
    sync.push(trained.named_parameters(), version=0)
    trained.load_state_dict(changed(model).state_dict())
    with pytest.raises(SyncError, match=r"^after the update to version 1 .* does not hold the policy's weights, or"):
        sync.push(trained.named_parameters(), version=1)
    assert not sync.in_force(0)
    assert not sync.in_force(1)


def test_an_engine_that_is_wrong_as_loaded_is_told_from_one_that_an_update_makes_wrong() -> None:
    """0.3 nats, as an engine's repacked experts were seen to make: in bfloat16 it used to pass."""
    with pytest.raises(SyncError, match=r"0\.3 nats .* as loaded, before any update, .* another model") as as_loaded:
        make_sync(scripted(lambda request, version: 0.3), minus_one, "bfloat16").push([], version=0)
    sync = make_sync(scripted(after_updates(0.3)), minus_one, "bfloat16")
    sync.push([], version=0)
    with pytest.raises(SyncError, match=r"after the update to version 1 .* 0\.3 nats .* as loaded by 0: ") as updated:
        sync.push([], version=1)
    continued = make_sync(scripted(after_updates(0.3)), minus_one, "bfloat16", as_loaded=False)
    with pytest.raises(SyncError, match=r"after the update to version 7 .* not compared before an update") as unknown:
        continued.push([], version=7)
    lines = {str(refusal.value) for refusal in (as_loaded, updated, unknown)}
    assert len(lines) == 3
    assert not any("\n" in line for line in lines)


@pytest.mark.parametrize("dtype", sorted(LIMITS))
def test_an_update_of_the_same_weights_that_makes_the_engine_another_model_is_refused_at_once(dtype: str) -> None:
    """The first update brings the weights that the engine has already, so nothing may change."""

    class Repacks(ScriptedEngine):
        updated = False

        def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> UpdateStats:
            self.updated = True
            return super().update_weights(named_tensors, version)

    engine = Repacks(lambda request, version: (TOKENS, list(-1.0 - 0.3 * engine.updated * ONES)))
    engine.start(EngineSpec("none"))
    with pytest.raises(SyncError, match=r"version 0 .* in another form than those that it loads itself"):
        make_sync(engine, minus_one, dtype).push([], version=0)


@pytest.mark.parametrize("mean", [0.002, 0.04])
def test_a_coarse_engine_that_is_right_passes_for_200_updates_and_its_wrong_twin_does_not(mean: float) -> None:
    sync = make_sync(scripted(bf16(mean)), minus_one, "bfloat16")
    found = [sync.push([], version).parity for version in range(200)]
    assert max(one.largest for one in found) > 10 * mean
    assert np.mean([one.mean for one in found]) == pytest.approx(mean, rel=0.1)

    noise = bf16(mean)
    wrong = make_sync(
        scripted(lambda request, version: noise(request, version) + (0.3 if version else 0.0)), minus_one, "bfloat16"
    )
    wrong.push([], version=0)
    with pytest.raises(SyncError, match="version 1"):
        wrong.push([], version=1)


def test_one_violation_leads_to_a_second_probe_and_two_stop_the_run(caplog: pytest.LogCaptureFixture) -> None:
    def only_the_first(request: Request, version: int) -> float:
        return 0.5 if version and request.prompt_token_ids == PROBE.token_ids else 0.0

    sync = make_sync(scripted(only_the_first), minus_one)
    sync.push([], version=0)
    assert sync.push([], version=1).parity.largest == pytest.approx(0.5)
    assert "a second probe found 0 nats" in caplog.text
    alone = make_sync(scripted(only_the_first), minus_one, prompts=(PROBE,))
    alone.push([], version=0)
    with pytest.raises(SyncError, match="version 1"):
        alone.push([], version=1)


def test_what_the_pair_showed_first_bounds_what_comes_later() -> None:
    def grown(times: float) -> WeightSync:
        sync = make_sync(scripted(lambda request, version: 0.04 * (times if version else 1)), minus_one, "bfloat16")
        sync.push([], version=0)
        return sync

    limit = (GROWTH * 0.04 + LIMITS["bfloat16"].floor) / 0.04
    grown(limit - 0.01).push([], version=1)
    with pytest.raises(SyncError, match=r"accepted: 0\.15 on average, unless"):
        grown(limit + 0.01).push([], version=1)


def test_a_server_that_another_run_has_left_is_measured_after_its_first_update(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Used(ScriptedEngine):
        updated = False

        def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> UpdateStats:
            self.updated = True
            return super().update_weights(named_tensors, version)

    engine = Used(lambda request, version: (TOKENS, list(-1.0 - (0.01 if engine.updated else 2.0) * ONES)))
    engine.start(EngineSpec("none"))
    sync = make_sync(engine, minus_one, "bfloat16")
    sync.push([], version=0)
    assert "it had loaded other weights" in caplog.text
    assert sync.probe.first is not None
    assert sync.probe.first.mean == pytest.approx(0.01)


def test_an_engine_with_another_temperature_is_refused(model: PreTrainedModel, start: Callable[..., Any]) -> None:
    sync = make_sync(start(TransformersEngine()), logp_of(model, 1.0), "bfloat16", temperature=0.5)
    with pytest.raises(SyncError, match="differ by"):
        sync.push(model.named_parameters(), version=0)


def test_an_engine_that_stamps_another_version_is_refused(model: PreTrainedModel, start: Callable[..., Any]) -> None:
    sync = make_sync(start(Behind()), logp_of(model))
    with pytest.raises(SyncError, match="weight version 4, not 5"):
        sync.push(model.named_parameters(), version=5)
    assert not sync.in_force(5)


def test_a_probe_that_cannot_be_generated_is_refused_with_its_reason() -> None:
    engine = scripted(after_updates(0.0), failures={"probe/2/0/3": "out of memory"})
    with pytest.raises(SyncError, match="probe could not be generated: out of memory"):
        make_sync(engine, minus_one).push([], version=2)


def test_a_refused_update_leaves_the_engine_generating(tiny_model_dir: str) -> None:
    engine = ScriptedEngine(vocabulary=96, delay=1.0, check_weights=True)
    engine.start(EngineSpec(tiny_model_dir))
    sync = make_sync(engine, minus_one)
    arrived: list[str] = []
    sync.probe.inbox.submit(
        [Request("mine", (1, 2), Sampling(max_new_tokens=2), 0)], lambda r: arrived.append(r.request_id)
    )
    with pytest.raises(SyncError, match="missing: "):
        sync.push([], version=1)
    sync.probe.inbox.collect(timeout=5.0)
    assert arrived == ["mine"]


def test_an_engine_that_dies_in_an_update_says_so_itself(tiny_model_dir: str) -> None:
    class Dies(ScriptedEngine):
        def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> UpdateStats:
            self.spec = None
            raise EngineError("out of memory")

    engine = Dies(vocabulary=96, delay=1.0)
    engine.start(EngineSpec(tiny_model_dir))
    sync = make_sync(engine, minus_one)
    sync.probe.inbox.submit([Request("mine", (1, 2), Sampling(max_new_tokens=2), 0)], lambda result: None)
    with pytest.raises(EngineError, match="out of memory"):
        sync.push([], version=1)


def test_wrong_names_are_refused_and_the_version_stays(model: PreTrainedModel, start: Callable[..., Any]) -> None:
    sync = make_sync(start(TransformersEngine()), logp_of(model))
    sync.push(model.named_parameters(), version=0)
    with pytest.raises(SyncError, match="missing: "):
        sync.push(list(model.named_parameters())[1:], version=1)
    assert sync.in_force(0)


@settings(deadline=None)
@given(off=st.floats(-2, 2), tolerance=st.floats(1e-4, 1.5))
def test_the_users_tolerance_is_that_of_a_single_token(off: float, tolerance: float) -> None:
    off = float(np.float32(-1.0 - off)) + 1.0  # as the engine can say it
    one = np.zeros(len(TOKENS))
    one[-1] = -off
    for dtype in LIMITS:
        sync = make_sync(scripted(lambda request, version: one), minus_one, dtype, tolerance)
        if abs(off) <= tolerance:
            assert sync.push([], version=1).parity.largest == pytest.approx(abs(off))
        else:
            with pytest.raises(SyncError, match=r"differ by .*data\.parity_tolerance accepts"):
                sync.push([], version=1)


@pytest.mark.parametrize("tolerance", [None, 1e9])
def test_log_probs_that_are_not_numbers_are_refused(tolerance: float | None) -> None:
    with pytest.raises(SyncError, match="differ by nan"):
        make_sync(scripted(lambda *_: float("nan")), minus_one, "bfloat16", tolerance).push([], version=1)


def test_a_bf16_engine_passes_as_bf16_and_not_as_float32(model: PreTrainedModel, start: Callable[..., Any]) -> None:
    engine = start(TransformersEngine(), dtype="bfloat16")
    assert make_sync(engine, logp_of(model), "bfloat16").push(model.named_parameters(), 0).parity.largest > 0
    with pytest.raises(SyncError, match=r"data\.rollout_dtype"):
        make_sync(start(TransformersEngine(), dtype="bfloat16"), logp_of(model)).push(model.named_parameters(), 0)


def test_coarser_dtypes_have_wider_limits() -> None:
    float32, float16, bfloat16 = (LIMITS[name] for name in ("float32", "float16", "bfloat16"))
    assert 0 < float32.first < float16.first < bfloat16.first < 0.2
    assert 0 < float32.floor < float16.floor < bfloat16.floor < 0.05


def test_probes_are_short_differ_in_seed_and_are_drawn_from_the_whole_distribution() -> None:
    seen: list[Request] = []

    def script(request: Request, version: int) -> tuple[list[int], list[float]]:
        seen.append(request)
        return [1], [-1.0]

    engine = ScriptedEngine(script)
    engine.start(EngineSpec("none"))
    sync = make_sync(engine, minus_one, temperature=0.7, top_p=0.5, top_k=3, max_new_tokens=200, topk_logprobs=4)
    for version in (0, 1, 2):
        sync.push([], version=version)
    assert {request.prompt_token_ids for request in seen} == {PROBE.token_ids}
    assert {request.sampling for request in seen} == {Sampling(temperature=0.7, max_new_tokens=16)}
    assert len(seen) == 4 * SAMPLES  # one probe as loaded, one after each update
    assert len({request.seed for request in seen}) == 3 * SAMPLES  # as loaded and after the first, the same
