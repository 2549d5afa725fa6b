"""The policy's forward pass: hidden states where tokens are generated, and log-probs from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from dppo_lightning.batch import pack
from dppo_lightning.objective import Objective, ReferenceKL
from dppo_lightning.packing import Layout
from dppo_lightning.policy import Policy
from dppo_lightning.records import Completion, Prompt, Sequence
from dppo_lightning.trust_region import BinaryTV

VOCABULARY = 61


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    path = tmp_path_factory.mktemp("llama")
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return str(path)


def make_sequence(prompt: list[int], tokens: list[int]) -> Sequence:
    completion = Completion(
        request_id="r",
        token_ids=np.array(tokens),
        logp=np.full(len(tokens), -4.0, np.float32),
        finish_reason="stop",
        versions=np.zeros(len(tokens), np.int64),
    )
    return Sequence.from_completion(Prompt("p", tuple(prompt), ""), completion, 1.0)


SEQUENCES = [make_sequence(list(range(3, 15)), [20, 21, 22]), make_sequence(list(range(3, 15)), [30]),
             make_sequence([7, 8], [9, 10, 11, 12])]  # fmt: skip


@pytest.mark.parametrize("layout", ["rows", "packed"])
def test_log_probs_are_those_of_the_hugging_face_model_on_each_sequence_alone(folder: str, layout: Layout) -> None:
    logp = Policy(folder, temperature=0.7).logp(pack(SEQUENCES, np.ones(3), layout))
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = []
    for sequence in SEQUENCES:
        ids = torch.from_numpy(sequence.token_ids)
        with torch.no_grad():
            table = (model(ids[None]).logits[0] / 0.7).log_softmax(dim=-1)
        expected.append(table[sequence.generated - 1, ids[sequence.generated]])
    torch.testing.assert_close(logp, torch.cat(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["rows", "packed"])
def test_an_empty_micro_batch_gives_every_parameter_a_zero_gradient(folder: str, layout: Layout) -> None:
    policy, batch = Policy(folder), pack([], np.zeros(0), layout)
    policy.head(policy.hidden_states(batch), batch, Objective(BinaryTV(), ReferenceKL())).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in policy.parameters())


def test_a_saved_model_is_the_one_that_was_loaded(folder: str, tmp_path: Path) -> None:
    policy = Policy(folder)
    policy.model.save_pretrained(tmp_path)
    again = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    assert all(torch.equal(again[name], weight) for name, weight in policy.named_weights())
