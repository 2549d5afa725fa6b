"""A prompt that is forwarded once, in a row without padding, trains like one row a sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen3Config,
)

from dppo_lightning.base.batch import pack
from dppo_lightning.base.packing import Segment, SegmentLayout, lay_out, split_by_tokens, worth_sharing
from dppo_lightning.base.records import Sequence
from dppo_lightning.train.attention import supports_segments
from dppo_lightning.train.objective import Objective, ReferenceKL
from dppo_lightning.train.policy import Policy
from dppo_lightning.trust_region import BinaryTV
from tests.helpers.models import SMALL, SMALL_VOCABULARY, save_random_model
from tests.helpers.records import make_sequence

PACKED = {
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SMALL),
    "mistral": MistralConfig(**SMALL, sliding_window=None),
    "gpt2": GPT2Config(vocab_size=SMALL_VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0),
}
IN_ROWS = {
    "sliding window": MistralConfig(**SMALL, sliding_window=16),
    "softcap": Gemma2Config(**SMALL, layer_types=["full_attention"] * 2, sliding_window=None),
    "sinks": GptOssConfig(**SMALL, num_local_experts=2, layer_types=["full_attention"] * 2, sliding_window=None),
    "recurrent": MambaConfig(vocab_size=SMALL_VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4),
}


@pytest.fixture(scope="module", params=PACKED)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_random_model(PACKED[request.param], tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_random_model(PACKED["llama"], tmp_path_factory.mktemp("llama"))


def make_sequences(groups: list[tuple[int, list[int]]], seed: int = 0) -> list[Sequence]:
    """One group for each (prompt length, completion lengths), its sequences shuffled among the others'."""
    rng = np.random.default_rng(seed)
    sequences = []
    for prompt_length, lengths in groups:
        prompt = rng.integers(2, SMALL_VOCABULARY, prompt_length)
        for length in lengths:
            ids, logp = rng.integers(2, SMALL_VOCABULARY, length), rng.uniform(-6, -3, length)
            sequences.append(make_sequence(prompt, ids, logp, float(rng.normal())))
    return [sequences[i] for i in rng.permutation(len(sequences))]


MIXED = [(30, [5, 1, 17]), (12, [40]), (9, [3, 3]), (30, [2, 2, 60, 1]), (4, [6, 5])]


def train(policy: Policy, sequences: list[Sequence], layout: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    policy.zero_grad()
    batch = pack(sequences, np.linspace(0.5, 1.5, len(sequences)), layout)
    output = policy.head(policy.hidden_states(batch), batch, Objective(BinaryTV(), ReferenceKL()))
    output.loss.backward()
    return output.logp, {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-12))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_of_one_row_a_sample(folder: Path, checkpointing: bool) -> None:
    policy = Policy(str(folder), gradient_checkpointing=checkpointing).train()
    assert policy.layout == "packed"
    sequences = make_sequences(MIXED)
    logp, plain = train(policy, sequences, "rows")
    packed_logp, packed = train(policy, sequences, "packed")
    torch.testing.assert_close(packed_logp, logp, rtol=1e-5, atol=1e-5)
    assert packed.keys() == plain.keys()
    whole = torch.cat([gradient.flatten() for gradient in plain.values()])
    assert relative(torch.cat([packed[name].flatten() for name in plain]), whole) < 1e-5
    # A key's bias moves all scores of a query alike: its gradient is zero up to rounding, and has no relative error.
    floor = 1e-6 * whole.norm()
    assert all((packed[name] - plain[name]).norm() < 1e-5 * plain[name].norm() + floor for name in plain)


@settings(max_examples=25, deadline=None)
@given(groups=st.lists(st.tuples(st.integers(1, 40), st.lists(st.integers(1, 40), min_size=1, max_size=5)), max_size=4))
def test_log_probs_do_not_depend_on_the_layout(llama: Path, groups: list[tuple[int, list[int]]]) -> None:
    policy = load_once(str(llama))
    sequences = make_sequences(groups)
    weights = np.ones(len(sequences))
    rows, packed = (policy.logp(pack(sequences, weights, layout)) for layout in ("rows", "packed"))
    torch.testing.assert_close(packed, rows, rtol=1e-5, atol=1e-5)


_LOADED: dict[str, Policy] = {}


def load_once(folder: str) -> Policy:
    return _LOADED.setdefault(folder, Policy(folder))


def test_a_completion_does_not_see_its_neighbours(llama: Path) -> None:
    policy = Policy(str(llama))
    prompt, one, other = make_sequences([(20, [8])])[0], *make_sequences([(20, [8, 8])], seed=1)
    sequences = []
    for sequence in (one, other):
        ids = np.concatenate([prompt.token_ids[:20], sequence.token_ids[20:]])
        sequences.append(Sequence(ids, sequence.generated, sequence.rollout_logp, sequence.versions))
    together = policy.logp(pack(sequences, np.ones(2), "packed"))
    alone = policy.logp(pack(sequences[:1], np.ones(1), "packed"))
    torch.testing.assert_close(together[:8], alone, rtol=1e-5, atol=1e-5)


def test_no_pad_token_reaches_the_model_when_packed() -> None:
    batch = pack(make_sequences(MIXED), np.ones(12), "packed")
    assert batch.input_ids.numel() == batch.real_tokens


def test_bf16_log_probs_agree_between_layouts(llama: Path) -> None:
    policy = Policy(str(llama)).bfloat16()
    sequences = make_sequences(MIXED)
    weights = np.ones(len(sequences))
    rows, packed = (policy.logp(pack(sequences, weights, layout)) for layout in ("rows", "packed"))
    # two kernels with 8 bits of mantissa differ by 6e-4; without any mask it would be 0.06
    torch.testing.assert_close(packed, rows, atol=3e-3, rtol=0)


@pytest.mark.parametrize("name", IN_ROWS)
def test_attention_that_cannot_be_replaced_falls_back_to_rows(name: str) -> None:
    assert not supports_segments(AutoModelForCausalLM.from_config(IN_ROWS[name]))


def test_sharing_can_be_switched_off(llama: Path) -> None:
    policy = Policy(str(llama), shared_prompts=False)
    assert policy.layout == "rows"
    assert policy.model.config._attn_implementation == "sdpa"


def test_a_saved_policy_does_not_ask_for_our_attention(llama: Path, tmp_path: Path) -> None:
    Policy(str(llama)).model.save_pretrained(tmp_path)
    assert "dppo" not in (tmp_path / "config.json").read_text()


def test_without_segments_the_model_runs_as_it_always_did(llama: Path) -> None:
    ids = torch.randint(2, SMALL_VOCABULARY, (2, 11))
    padding = torch.tensor([[0] * 4 + [1] * 7, [1] * 11])
    expected = AutoModelForCausalLM.from_pretrained(llama)(ids, attention_mask=padding).logits
    logits = Policy(str(llama)).model(ids, attention_mask=padding).logits
    torch.testing.assert_close(logits[padding.bool()], expected[padding.bool()])


def test_segments_of_unlike_length_are_not_padded_to_each_other() -> None:
    prompt = Segment(0, 300)
    layout = SegmentLayout.of([prompt, *(Segment(300 + 20 * i, 20, prompt) for i in range(4))])
    assert sorted(tuple(block.own.shape) for block in layout.blocks) == [(1, 300), (4, 20)]


@pytest.mark.parametrize(
    ("prompt", "samples", "length", "worth"),
    [(256, 8, 64, True), (60, 8, 26, True), (64, 8, 256, True), (32, 2, 1024, False), (64, 8, 1024, False)],
)
def test_a_prompt_is_shared_at_the_shapes_where_that_was_measured_to_be_faster(
    prompt: int, samples: int, length: int, worth: bool
) -> None:
    assert worth_sharing(prompt, [length] * samples) is worth
    sequences = make_sequences([(prompt, [length] * samples)])
    laid = lay_out(sequences, "packed")
    assert laid.saved_tokens == (prompt * (samples - 1) if worth else 0)
    assert laid.real_tokens == samples * (prompt + length - 1) - laid.saved_tokens


def test_one_sequence_and_a_short_beginning_share_nothing() -> None:
    assert not worth_sharing(1000, [5])
    assert not worth_sharing(7, [5] * 64)


def test_splitting_counts_a_prompt_that_is_not_shared_for_every_sequence() -> None:
    sequences = make_sequences([(64, [1024] * 4), (64, [1024] * 2)])
    assert [len(part) for part in split_by_tokens(sequences, 3, "packed")] == [2, 2, 2]
