"""The policy's forward pass: hidden states where tokens are generated, and log-probs from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dppo_lightning.base.batch import pack
from dppo_lightning.base.packing import Layout
from dppo_lightning.train.objective import Objective, ReferenceKL
from dppo_lightning.train.policy import Policy
from dppo_lightning.trust_region import BinaryTV
from tests.helpers.log_probs import log_probs
from tests.helpers.records import make_sequence

PROMPT = range(3, 15)
SEQUENCES = [
    make_sequence(PROMPT, [20, 21, 22], -4.0, 1.0),
    make_sequence(PROMPT, [30], -4.0, 1.0),
    make_sequence([7, 8], [9, 10, 11, 12], -4.0, 1.0),
]


@pytest.mark.parametrize("layout", ["rows", "packed"])
def test_log_probs_are_those_of_the_hugging_face_model_on_each_sequence_alone(
    tiny_model_dir: str, layout: Layout
) -> None:
    logp = Policy(tiny_model_dir, temperature=0.7).logp(pack(SEQUENCES, np.ones(3), layout))
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    expected = []
    for sequence in SEQUENCES:
        first = int(sequence.generated[0])
        with torch.no_grad():
            expected.append(log_probs(model, sequence.token_ids[:first], sequence.token_ids[first:], 0.7).float())
    torch.testing.assert_close(logp, torch.cat(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["rows", "packed"])
def test_an_empty_micro_batch_gives_every_parameter_a_zero_gradient(tiny_model_dir: str, layout: Layout) -> None:
    policy, batch = Policy(tiny_model_dir), pack([], np.zeros(0), layout)
    policy.head(policy.hidden_states(batch), batch, Objective(BinaryTV(), ReferenceKL())).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in policy.parameters())


def test_a_saved_model_is_the_one_that_was_loaded(tiny_model_dir: str, tmp_path: Path) -> None:
    policy = Policy(tiny_model_dir)
    policy.model.save_pretrained(tmp_path)
    again = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    assert all(torch.equal(again[name], weight) for name, weight in policy.named_weights())
