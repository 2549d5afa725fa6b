"""The check that every model passes at load: what is trained is what the model computes, or the model is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Phi3Config, PhimoeConfig, PreTrainedConfig

import dppo_lightning.base.pretrained
from dppo_lightning.base.batch import pack
from dppo_lightning.base.errors import ConfigError
from dppo_lightning.base.packing import Segment, SegmentLayout
from dppo_lightning.base.pretrained import load_model
from dppo_lightning.base.records import Sequence
from dppo_lightning.generate.engine import EngineSpec
from dppo_lightning.generate.transformers_engine import TransformersEngine
from dppo_lightning.train.attention import UNUSED, segment_attention
from dppo_lightning.train.logits import LogitTransform
from dppo_lightning.train.model_check import _draw
from dppo_lightning.train.policy import Policy
from tests.helpers.errors import config_error
from tests.helpers.log_probs import log_probs
from tests.helpers.models import SMALL, SMALL_VOCABULARY, save_character_tokenizer, save_random_model
from tests.helpers.records import random_sequence
from tests.helpers.runs import QUIET, build

EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [8.0] * 4,
}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
RECURRENT = {
    "vocab_size": SMALL_VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "lru_width": 32,
    "attention_window_size": 8,
}


def hugging_face(name: str, **settings: Any) -> PreTrainedConfig:
    return getattr(transformers, f"{name}Config")(**settings)


def phi3(pretrained: int = 48) -> PreTrainedConfig:
    rope = LONGROPE | {"original_max_position_embeddings": pretrained}
    return Phi3Config(**SMALL, sliding_window=None, original_max_position_embeddings=pretrained, rope_parameters=rope)


def stretched() -> PreTrainedConfig:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    return LlamaConfig(**SMALL | {"max_position_embeddings": 48}, rope_parameters=rope)


TRAINED: dict[str, tuple[PreTrainedConfig, str]] = {
    "layers that keep back keyword arguments": (hugging_face("Nemotron", **SMALL), "rows"),
    "a scale that multiplies": (hugging_face("HyperCLOVAX", **SMALL, logits_scaling=0.25), "packed"),
    "the same name, which divides": (hugging_face("Granite", **SMALL, logits_scaling=4.0), "packed"),
    "a scale of another name": (hugging_face("Cohere", **SMALL, logit_scale=0.3), "packed"),
    "a scale of the hybrid's own": (hugging_face("FalconH1", **SMALL, **MAMBA, lm_head_multiplier=0.2), "rows"),
    "a cap of another name": (hugging_face("RecurrentGemma", **RECURRENT, logits_soft_cap=2.0), "rows"),
    "a cap on logits and one on attention": (
        hugging_face("Gemma2", **SMALL, attn_logit_softcapping=1.0, final_logit_softcapping=2.0),
        "rows",
    ),
    "router noise": (MixtralConfig(**SMALL, **EXPERTS, router_jitter_noise=0.1), "packed"),
    "router noise by default": (PhimoeConfig(**SMALL | {"max_position_embeddings": 64}, **EXPERTS), "packed"),
    "a prefix that names nothing": (
        hugging_face("Llama4Text", **SMALL, intermediate_size_mlp=64, num_local_experts=2),
        "rows",
    ),
    "frequencies that follow the length": (stretched(), "packed"),
    "a decoder that is called by another door": (
        hugging_face(
            "OPT",
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            vocab_size=SMALL_VOCABULARY,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
        ),
        "packed",
    ),
}
SPARSE = SMALL | {
    "head_dim": 8, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "index_n_heads": 2, "index_head_dim": 16,
    "index_topk": 100,
}  # fmt: skip
REFUSED: dict[str, tuple[PreTrainedConfig, str]] = {
    "an encoder": (hugging_face("Bert", **SMALL | {"head_dim": None}), "not causal"),
    "a layer before the projection": (hugging_face("ModernBertDecoder", **SMALL | {"head_dim": None}), "between"),
    "an encoder of narrow embeddings": (
        hugging_face("Electra", **SMALL | {"head_dim": None, "embedding_size": 16}),
        "between",
    ),
    "attention to a few tokens, chosen among later ones too": (
        hugging_face("DeepseekV32", **SPARSE),
        "DeepseekV32",
    ),
}


def save(config: PreTrainedConfig, folder: Path) -> str:
    """A model whose distributions are far from uniform."""
    return save_random_model(config, folder, spread=4.0)


def sequence(prompt: int, tokens: int, seed: int) -> Sequence:
    return random_sequence(prompt, tokens, seed, ids=(2, SMALL_VOCABULARY))


SHORT = [sequence(20, 10, 0), sequence(20, 4, 0), sequence(5, 25, 1)]
LONG = [sequence(50, 10, 2), sequence(50, 30, 2), sequence(60, 4, 3)]


def plain(folder: str, sequences: list[Sequence]) -> torch.Tensor:
    """Log-probs of the Hugging Face model as it is, each sequence alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    found = []
    for row in sequences:
        first = int(row.generated[0])
        with torch.no_grad():
            found.append(log_probs(model, row.token_ids[:first], row.token_ids[first:]).float())
    return torch.cat(found)


def logp(policy: Policy, sequences: list[Sequence]) -> torch.Tensor:
    return policy.logp(pack(sequences, np.ones(len(sequences)), policy.layout))


def refusal(folder: str, **settings: Any) -> str:
    """What is said of a model that is refused when it is loaded."""
    message = config_error(Policy, folder, **settings)
    assert message.startswith("model.policy: ")
    return message


@pytest.mark.parametrize("name", TRAINED)
def test_log_probs_are_those_of_the_model_itself(name: str, tmp_path: Path) -> None:
    config, layout = TRAINED[name]
    folder = save(config, tmp_path)
    policy = Policy(folder)
    assert (policy.layout, bool(policy.why_rows)) == (layout, layout == "rows")
    torch.testing.assert_close(logp(policy, SHORT), plain(folder, SHORT), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_computes_something_else_is_refused_by_name(name: str, tmp_path: Path) -> None:
    config, what = REFUSED[name]
    message = refusal(save(config, tmp_path))
    assert what in message
    assert type(AutoModelForCausalLM.from_config(config)).__name__ in message


def test_chosen_tokens_do_not_matter_to_a_run_that_has_no_more(tmp_path: Path) -> None:
    folder = save(hugging_face("DeepseekV32", **SPARSE), tmp_path)
    policy = Policy(folder, longest=100)
    torch.testing.assert_close(logp(policy, SHORT), plain(folder, SHORT), rtol=0, atol=2e-5)
    refusal(folder, longest=101)


def test_why_a_model_is_not_packed_is_said(tmp_path: Path) -> None:
    policy = Policy(save(TRAINED["layers that keep back keyword arguments"][0], tmp_path))
    assert "do not hand on" in policy.why_rows
    assert policy.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("longest", "sequences"), [(48, SHORT), (49, LONG), (None, LONG)])
def test_longrope_takes_the_factors_that_the_longest_sequence_of_the_run_asks_for(
    longest: int | None, sequences: list[Sequence], tmp_path: Path
) -> None:
    folder = save(phi3(), tmp_path)
    policy = Policy(folder, longest=longest)
    torch.testing.assert_close(logp(policy, sequences), plain(folder, sequences), rtol=0, atol=2e-5)


@pytest.mark.parametrize("longest", [48, 128])
@pytest.mark.parametrize("config", [phi3, stretched])
def test_a_short_sequence_does_not_depend_on_a_long_one_beside(config: Any, longest: int, tmp_path: Path) -> None:
    policy = Policy(save(config(), tmp_path), longest=longest)
    torch.testing.assert_close(logp(policy, SHORT + LONG)[:39], logp(policy, SHORT), rtol=0, atol=2e-5)


def test_the_engine_of_transformers_takes_the_same_factors(tmp_path: Path) -> None:
    folder = save(phi3(), tmp_path)
    engine = TransformersEngine()
    for longest in (48, 96):
        engine.start(EngineSpec(folder, "float32", longest, 0, (1,)))
        assert engine._decoder is not None
        mine = dict(Policy(folder, longest=longest).model.named_buffers())["model.rotary_emb.inv_freq"]
        assert torch.equal(dict(engine._decoder.model.named_buffers())["model.rotary_emb.inv_freq"], mine)
    engine.close()


@pytest.mark.parametrize("name", ["router noise", "router noise by default"])
def test_recomputed_activations_are_free_of_noise_too(name: str, tmp_path: Path) -> None:
    folder = save(TRAINED[name][0], tmp_path)
    batch = pack(SHORT, np.ones(len(SHORT)), "packed")
    gradients = []
    for checkpointing in (False, True):
        policy = Policy(folder, gradient_checkpointing=checkpointing).train()
        assert any(module.training for module in policy.model.modules()) is checkpointing
        policy.hidden_states(batch).square().sum().backward()
        gradients.append({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_noise_in_training_mode_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Policy, "train", nn.Module.train)
    assert "random numbers" in refusal(save(TRAINED["router noise"][0], tmp_path))


def test_frequencies_that_follow_the_neighbours_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dppo_lightning.base.pretrained, "settle_frequencies", lambda *_: None)
    assert "how many come after it" in refusal(save(phi3(pretrained=24), tmp_path))


def test_packing_that_mixes_sequences_is_found_and_not_used(
    tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, assembled = SegmentLayout.of, SegmentLayout.__dict__["of"]

    def one(_: type, segments: list[Segment]) -> SegmentLayout:
        return of([Segment(0, sum(segment.length for segment in segments))])

    monkeypatch.setattr(SegmentLayout, "of", classmethod(one))
    policy = Policy(tiny_model_dir)
    assert policy.layout == "rows"
    assert "sequences beside" in policy.why_rows
    monkeypatch.setattr(SegmentLayout, "of", assembled)
    assert Policy(tiny_model_dir).layout == "packed"


def test_logits_that_the_head_does_not_know_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LogitTransform, "of_model", lambda *_: LogitTransform())
    folder = save(TRAINED["a scale that multiplies"][0], tmp_path)
    assert "those of its own logits" in refusal(folder)


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.37, None), (1 / 3, 5.0), (1.0, 30.0)])
@pytest.mark.parametrize("spread", [0.2, 20.0])
def test_scale_and_cap_are_those_by_which_the_model_makes_logits(
    scale: float, softcap: float | None, spread: float
) -> None:
    product = torch.randn(50, SMALL_VOCABULARY, generator=torch.Generator().manual_seed(0)) * spread
    logits = LogitTransform(scale, softcap).apply_(product.clone())
    config = LlamaConfig(**SMALL, some_cap=softcap, an_inverse=3)
    found = LogitTransform.of_model(config, product, logits, temperature=0.7)
    assert found is not None
    assert found.scale == pytest.approx(scale, rel=1e-6)
    assert (found.softcap, found.temperature) == (softcap, 0.7)


@pytest.mark.parametrize("change", [torch.sin, torch.zeros_like, lambda x: x + 1, lambda x: x.roll(1, 1)])
def test_logits_made_in_another_way_have_no_transform(change: Any) -> None:
    product = torch.randn(50, SMALL_VOCABULARY, generator=torch.Generator().manual_seed(0))
    assert LogitTransform.of_model(LlamaConfig(**SMALL), product, change(product), 1.0) is None


def heads(tokens: int) -> torch.Tensor:
    return torch.ones(1, 2, tokens, 4)


def test_attention_refuses_the_mask_of_segments_without_segments() -> None:
    mask = torch.ones(UNUSED, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match="hand on"):
        segment_attention(nn.Module(), heads(3), heads(3), heads(3), mask)


@pytest.mark.parametrize("argument", ["sliding_window", "softcap", "s_aux", "position_bias", "dropout"])
def test_attention_over_segments_refuses_what_it_does_not_know(argument: str) -> None:
    batch = pack(SHORT, np.ones(3), "packed")
    x = heads(batch.input_ids.shape[1])
    given: dict[str, Any] = {argument: 0.5}
    with pytest.raises(NotImplementedError, match=argument):
        segment_attention(nn.Module(), x, x, x, None, segments=batch.segments, **given)


@pytest.mark.parametrize("context", [4, 16, 32, 4096])
def test_the_checked_sequences_fit_the_context_and_hold_no_special_id(context: int) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, image_token_id=7, extra_token_ids=[8, 9]))
    model.config.max_position_embeddings = context
    for seed in range(5):
        short, long = _draw(model, seed)
        assert len(short.token_ids) < len(long.token_ids) <= context
        assert not {0, 1, 7, 8, 9} & {*short.token_ids.tolist(), *long.token_ids.tolist()}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def test_the_check_does_not_depend_on_the_dtype_that_a_precision_sets(tiny_model_dir: str) -> None:
    with default_dtype(torch.bfloat16), torch.autocast("cpu", dtype=torch.bfloat16):
        policy = Policy(tiny_model_dir)
        assert torch.get_default_dtype() == torch.bfloat16
    assert policy.layout == "packed"


def test_the_check_multiplies_in_float32_whatever_a_user_allows_in_training(tiny_model_dir: str) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert Policy(tiny_model_dir).layout == "packed"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_weights_in_16_bits_are_checked_in_16_bits(tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dppo_lightning.train.policy, "load_model", lambda *a: load_model(*a).bfloat16())
    policy = Policy(tiny_model_dir)
    assert (policy.layout, policy.head.weight.dtype) == ("packed", torch.bfloat16)


def test_the_check_draws_nothing_from_global_generators_and_leaves_no_gradient(tiny_model_dir: str) -> None:
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    policy = Policy(tiny_model_dir)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.random.get_state()[1].tolist() == state[1]
    assert all(p.grad is None and p.requires_grad for p in policy.parameters())


class NeverStarted(TransformersEngine):
    def start(self, spec: EngineSpec) -> None:
        raise AssertionError("the engine was started")


@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_a_model_that_is_refused_costs_no_start_of_an_engine(verb: str, tmp_path: Path) -> None:
    folder = save(hugging_face("ModernBertDecoder", **SMALL | {"head_dim": None}), tmp_path)
    save_character_tokenizer(folder)
    model, data = build(folder, data={"engine": NeverStarted()})
    with pytest.raises(ConfigError, match="ModernBertDecoderForCausalLM"):
        getattr(pl.Trainer(**QUIET, max_steps=1), verb)(model, datamodule=data)


def test_a_module_that_is_fitted_again_starts_an_engine_again(tiny_policy_dir: str) -> None:
    model, data = build(tiny_policy_dir)
    for _ in range(2):
        pl.Trainer(**QUIET, max_steps=1).fit(model, datamodule=data)
        assert data.stream is None
