"""The contract of RolloutEngine, one suite for every engine."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dppo_lightning.base.errors import EngineError, SyncError
from dppo_lightning.base.records import Completion
from dppo_lightning.generate.engine import EngineSpec, Failed, RolloutEngine
from dppo_lightning.generate.scripted import ScriptedEngine
from dppo_lightning.generate.transformers_engine import TransformersEngine
from dppo_lightning.generate.vllm.embedded import VLLMEmbedded
from dppo_lightning.generate.vllm.remote import VLLMRemote
from tests.helpers.engines import LONG, LONGS, PROMPT, Case, ask, changed, error, forward_logp, weights

TOLERANCE = 1e-4
ENGINES: dict[str, Callable[[], RolloutEngine]] = {
    "scripted": lambda: ScriptedEngine(
        vocabulary=96, delay=lambda request: float(request.sampling.max_new_tokens), check_weights=True
    ),
    "transformers": TransformersEngine,
    "vllm": lambda: VLLMEmbedded(kv_cache_gib=0.25),
    "remote": lambda: VLLMRemote(kv_cache_gib=0.25),
}
WITHOUT_VLLM = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
REAL = [
    *("transformers-tied", "transformers-untied"),
    *(pytest.param(f"vllm-{kind}", marks=WITHOUT_VLLM) for kind in ("tied", "untied")),
    *(pytest.param(f"remote-{kind}", marks=[WITHOUT_VLLM, pytest.mark.slow]) for kind in ("tied", "untied")),
]
every_engine = pytest.mark.parametrize("case", ["scripted-tied", *REAL], indirect=True)
real_engines = pytest.mark.parametrize("case", REAL, indirect=True)


@pytest.fixture(scope="module")
def started(tiny_model_dir: str, tiny_untied_dir: str) -> Iterator[Callable[[str], Case]]:
    """Starts each engine once."""
    cases: dict[str, Case] = {}

    def start(name: str) -> Case:
        if name not in cases:
            kind, ties = name.split("-")
            model = tiny_model_dir if ties == "tied" else tiny_untied_dir
            spec = EngineSpec(model, max_model_len=512, max_logprobs=8, stop_token_ids=(42,))
            engine = ENGINES[kind]()
            environment = dict(os.environ)
            generator = torch.get_rng_state()
            engine.start(spec)
            assert dict(os.environ) == environment
            assert torch.equal(torch.get_rng_state(), generator)
            cases[name] = Case(engine, spec, AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
        return cases[name]

    yield start
    for case in cases.values():
        case.engine.close()


@pytest.fixture
def case(request: pytest.FixtureRequest, started: Callable[[str], Case]) -> Case:
    """An engine at version 0, with nothing in flight."""
    case = started(request.param)
    case.engine.update_weights(weights(case.model), version=0)
    assert case.engine.health().in_flight == 0
    return case


@every_engine
def test_a_completion_ends_at_a_stop_id_or_at_its_limit(case: Case) -> None:
    completions = case.generate([ask(f"{i}", seed=i, max_new_tokens=40) for i in range(24)])
    for completion in completions:
        stops = np.isin(completion.token_ids, case.spec.stop_token_ids)
        assert not stops[:-1].any()
        assert completion.finish_reason == ("stop" if stops[-1] else "length")
        assert stops[-1] or len(completion) == 40
        assert len(completion.logp) == len(completion.versions) == len(completion)
        assert completion.token_ids.dtype == completion.versions.dtype == np.int64
        assert completion.logp.dtype == np.float32
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}


@every_engine
def test_a_text_ends_at_max_model_len(case: Case) -> None:
    prompt = [i % 90 for i in range(500)]
    completions = case.generate([ask(f"{i}", prompt, seed=i, max_new_tokens=50) for i in range(4)])
    assert all(len(c) == 12 or c.finish_reason == "stop" for c in completions)
    assert "length" in {completion.finish_reason for completion in completions}


@real_engines
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_a_forward_pass(case: Case, temperature: float) -> None:
    for completion in case.generate([ask(f"{i}", seed=i, temperature=temperature) for i in range(8)]):
        assert error(case.model, completion, temperature=temperature) < TOLERANCE


@real_engines
def test_greedy_takes_the_most_likely_token_and_reports_it_at_temperature_one(case: Case) -> None:
    (completion,) = case.generate([ask(temperature=0.0, top_k=2)])
    full = forward_logp(case.model, PROMPT, completion)
    assert completion.token_ids.tolist() == full.argmax(1).tolist()
    assert error(case.model, completion) < TOLERANCE


@real_engines
def test_tokens_are_drawn_from_the_distribution(case: Case) -> None:
    draws = 2000
    completions = case.generate([ask(f"{i}", seed=i, max_new_tokens=1) for i in range(draws)])
    counts = np.bincount([completion.token_ids[0] for completion in completions], minlength=96)
    probability = forward_logp(case.model, PROMPT, completions[0])[0].exp().numpy()
    likely = probability > 0.01
    deviations = (counts - draws * probability)[likely] / np.sqrt(draws * probability * (1 - probability))[likely]
    assert likely.sum() >= 5
    assert np.abs(deviations).max() < 4.5


@real_engines
@pytest.mark.parametrize("truncation", [{"top_k": 3}, {"top_p": 0.6}, {"top_k": 8, "top_p": 0.8}])
def test_truncated_sampling_reports_the_renormalised_distribution(case: Case, truncation: dict[str, float]) -> None:
    for completion in case.generate([ask(f"{i}", seed=i, **truncation) for i in range(4)]):
        for token, logp, row in zip(
            completion.token_ids, completion.logp, forward_logp(case.model, PROMPT, completion).exp(), strict=True
        ):
            kept, mass = {}, 0.0
            best = row.argsort(descending=True).tolist()[: int(truncation.get("top_k", 96))]
            total = float(row[best].sum())
            for candidate in best:
                if mass < truncation.get("top_p", 1.0):
                    kept[candidate] = float(row[candidate])
                    mass += kept[candidate] / total
            assert abs(np.log(kept[token] / sum(kept.values())) - logp) < TOLERANCE


@real_engines
def test_the_most_likely_tokens_are_reported_when_asked_for(case: Case) -> None:
    plain, few, many = case.generate([ask(f"{k}", seed=k, topk_logprobs=k) for k in (0, 2, 8)])
    assert plain.topk_ids is None
    assert plain.topk_logp is None
    for completion, k in ((few, 2), (many, 8)):
        values, ids = forward_logp(case.model, PROMPT, completion).topk(k)
        assert np.array_equal(completion.topk_ids, ids.numpy())
        assert np.abs(completion.topk_logp - values.numpy()).max() < TOLERANCE
        assert completion.topk_logp.dtype == np.float32
        assert error(case.model, completion) < TOLERANCE


@every_engine
def test_tokens_depend_on_prompt_and_seed_but_not_on_company(case: Case) -> None:
    (alone,) = case.generate([ask("alone", seed=5)])
    company = [ask(f"{i}", range(10, 12 + i), seed=100 + i, max_new_tokens=4 + i) for i in range(20)]
    first, *_, last = case.generate([ask("first", seed=5), *company, ask("last", seed=6)])
    assert first.token_ids.tolist() == alone.token_ids.tolist()
    assert last.token_ids.tolist() != alone.token_ids.tolist()


@real_engines
def test_more_prompts_than_fit_in_one_step_are_sampled_as_they_would_be_alone(case: Case) -> None:
    prompts = [[(place * (i + 3)) % 89 for i in range(300)] for place in range(1, 41)]  # 12,000 tokens
    company = case.generate([ask(f"{i}", prompt, seed=i) for i, prompt in enumerate(prompts)])
    for i in (0, 20, 39):
        (alone,) = case.generate([ask("alone", prompts[i], seed=i)])
        assert company[i].token_ids.tolist() == alone.token_ids.tolist()
        assert error(case.model, company[i], prompts[i]) < TOLERANCE


@real_engines
def test_an_update_replaces_every_weight(case: Case) -> None:
    new = changed(case.model)
    (before,) = case.generate([ask()])
    stats = case.engine.update_weights(weights(new), version=3)
    assert stats.version == case.engine.health().version == 3
    assert stats.tensors == len(list(new.parameters()))
    assert stats.bytes == 4 * sum(parameter.numel() for parameter in new.parameters())
    for completion in case.generate([ask(f"{i}", seed=i) for i in range(4)]):
        assert (completion.versions == 3).all()
        assert error(new, completion) < TOLERANCE
    assert (before.versions == 0).all()
    assert error(new, before) > 100 * TOLERANCE


@real_engines
def test_an_update_forgets_cached_prefixes(case: Case) -> None:
    new, prompt = changed(case.model), [i % 89 for i in range(300)]
    for version, model in enumerate((case.model, new)):
        case.engine.update_weights(weights(model), version)
        for name in ("first", "cached"):
            (completion,) = case.generate([ask(name, prompt)])
            assert error(model, completion, prompt) < TOLERANCE


@pytest.mark.parametrize("case", [name for name in REAL if "untied" not in str(name)], indirect=True)
@pytest.mark.parametrize(
    "names", [{"model.embed_tokens.weight"}, {"lm_head.weight"}, {"model.embed_tokens.weight", "lm_head.weight"}]
)
def test_of_tied_weights_one_name_is_enough(case: Case, names: set[str]) -> None:
    new = changed(case.model)
    given = {name: tensor for name, tensor in new.state_dict().items() if "embed" not in name and "lm_head" not in name}
    given |= dict.fromkeys(names, new.get_input_embeddings().weight)
    case.engine.update_weights(given.items(), version=1)
    (completion,) = case.generate([ask()])
    assert error(new, completion) < TOLERANCE


@every_engine
@pytest.mark.parametrize("fault", ["missing", "unknown", "shape"])
def test_wrong_weights_are_refused_and_the_old_ones_stay(case: Case, fault: str) -> None:
    given = dict(changed(case.model).named_parameters())
    name = "model.layers.1.mlp.up_proj.weight"
    if fault == "missing":
        del given[name]
    elif fault == "unknown":
        name = "model.layers.7.mlp.up_proj.weight"
        given[name] = given["model.norm.weight"]
    else:
        given[name] = given[name][1:]
    with pytest.raises(SyncError, match=name):
        case.engine.update_weights(given.items(), version=1)
    assert case.engine.health().version == 0
    (completion,) = case.generate([ask()])
    assert (completion.versions == 0).all()
    if not isinstance(case.engine, ScriptedEngine):
        assert error(case.model, completion) < TOLERANCE


@every_engine
def test_an_update_in_flight_changes_only_what_comes_after_it(case: Case) -> None:
    new = changed(case.model)
    finished = case.begin_long()
    case.engine.pause()
    case.engine.update_weights(weights(new), version=1)
    case.engine.resume()
    in_flight = case.wait(len(LONGS) - len(finished)).values()
    crossing = 0
    for completion in in_flight:
        assert isinstance(completion, Completion)
        assert (np.diff(completion.versions) >= 0).all()
        old, new_ones = completion.versions == 0, completion.versions == 1
        assert (old | new_ones).all()
        assert old[:7].all()
        if new_ones.any():
            crossing += 1
            if not isinstance(case.engine, ScriptedEngine):
                assert error(case.model, completion, where=old) < TOLERANCE
                assert error(new, completion, where=new_ones) < TOLERANCE
                assert error(case.model, completion, where=new_ones) > TOLERANCE
    assert crossing > 0


@every_engine
def test_aborted_requests_come_back_with_what_they_have(case: Case) -> None:
    results = case.begin_long()
    even = {request.id for request in LONGS[::2]}
    case.engine.abort([*even, "never submitted"])
    results |= case.wait(len(LONGS) - len(results))
    for name, completion in results.items():
        assert isinstance(completion, Completion)
        assert completion.finish_reason in (("abort", "stop") if name in even else ("length", "stop"))
        if completion.finish_reason == "abort":
            assert 7 <= len(completion) < LONG
            assert (completion.versions == 0).all()
        if not isinstance(case.engine, ScriptedEngine):
            assert error(case.model, completion) < TOLERANCE
    assert "abort" in {completion.finish_reason for completion in results.values()}
    assert case.engine.poll(timeout=0) == []


@every_engine
def test_a_request_that_never_began_can_be_aborted(case: Case) -> None:
    case.engine.pause()
    case.engine.submit([ask("a", topk_logprobs=0), ask("b")])
    case.engine.abort(["a"])
    (aborted,) = case.engine.poll(timeout=5)
    assert (aborted.request_id, aborted.finish_reason, len(aborted)) == ("a", "abort", 0)
    case.engine.resume()
    assert list(case.wait(1)) == ["b"]


@every_engine
def test_a_paused_engine_does_nothing_and_goes_on_as_if_it_had_not_paused(case: Case) -> None:
    expected = case.generate(LONGS)
    results = case.begin_long()
    case.engine.pause()
    results |= {result.request_id: result for result in case.engine.poll(timeout=0)}
    assert case.engine.poll(timeout=0.1) == []
    assert case.engine.health().in_flight == len(LONGS) - len(results) > 0
    case.engine.resume()
    results |= case.wait(len(LONGS) - len(results))
    for request, whole in zip(LONGS, expected, strict=True):
        assert results[request.id].token_ids.tolist() == whole.token_ids.tolist()


@every_engine
@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (ask(prompt=()), "empty"),
        (ask(prompt=[1] * 512), "512 tokens"),
        (ask(prompt=[1, 96]), "token id 96"),
        (ask(prompt=[-1, 4]), "token id -1"),
        (ask(topk_logprobs=9), "9 log-probs"),
    ],
)
def test_an_impossible_request_fails_alone(case: Case, request_: object, reason: str) -> None:
    case.engine.submit([request_, ask("good")])
    results = case.wait(2)
    failed = results["a"]
    assert isinstance(failed, Failed)
    assert reason in failed.reason
    assert isinstance(results["good"], Completion)


@every_engine
def test_poll_returns_at_once_when_nothing_is_in_flight(case: Case) -> None:
    assert case.engine.poll() == []  # else it waits until the test's time limit
    assert case.engine.poll(timeout=1e6) == []


@every_engine
def test_poll_keeps_to_its_timeout(case: Case) -> None:
    results = case.begin_long()
    while found := case.engine.poll(timeout=0.001):
        results |= {result.request_id: result for result in found}
    assert len(results) < len(LONGS)  # it has come back with nothing, and there was something to wait for
    case.engine.abort([request.id for request in LONGS])
    case.wait(len(LONGS) - len(results))


@every_engine
def test_health_tells_version_and_requests_in_flight(case: Case) -> None:
    case.engine.pause()
    case.engine.submit([ask("a"), ask("b")])
    health = case.engine.health()
    assert (health.alive, health.version, health.in_flight) == (True, 0, 2)
    assert health.description
    case.engine.resume()
    case.wait(2)
    assert case.engine.health().in_flight == 0


@every_engine
def test_generation_leaves_the_global_generator_alone(case: Case) -> None:
    before = torch.get_rng_state()
    case.generate([ask()])
    case.engine.update_weights(weights(case.model), version=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert "vllm" not in sys.modules


@pytest.mark.parametrize("kind", ENGINES)
def test_an_engine_can_be_closed_twice_and_does_not_serve_afterwards(kind: str) -> None:
    engine = ENGINES[kind]()
    engine.close()
    engine.close()
    assert not engine.health().alive
    with pytest.raises(EngineError, match="not running"):
        engine.submit([ask()])
