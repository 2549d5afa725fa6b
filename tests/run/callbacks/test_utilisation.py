"""FLOPs of a training step, against torch's own counter; the speed of a matrix product; what is logged of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from dppo_lightning.base.batch import TrainingBatch, pack
from dppo_lightning.base.packing import Layout
from dppo_lightning.base.records import Completion, Prompt, Sequence
from dppo_lightning.run.callbacks.utilisation import ModelWork, Utilisation, attended_pairs, product_speed
from dppo_lightning.train.policy import Policy
from tests.helpers.runs import fit

PROMPTS, LENGTHS = (9, 17), ((5, 30), (12,))


def sequences() -> list[Sequence]:
    """Two prompts with two completions and one."""
    rng = np.random.default_rng(0)
    rows = []
    for index, (length, completions) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        prompt = Prompt(str(index), tuple(rng.integers(0, 95, length).tolist()), "")
        for tokens in completions:
            ids, logp = rng.integers(0, 95, tokens), np.full(tokens, -4.0, np.float32)
            completion = Completion("", ids, logp, "stop", np.zeros(tokens, np.int64))
            rows.append(Sequence.from_completion(prompt, completion, 1.0))
    return rows


def batch_in(layout: Layout) -> TrainingBatch:
    return pack(sequences(), np.ones(3), layout)


def seen_by_hand(layout: Layout) -> int:
    """Each position of a sequence sees itself and what came before; the last id predicts nothing and is left out."""
    if layout == "rows":
        whole = [p + t - 1 for p, ts in zip(PROMPTS, LENGTHS, strict=True) for t in ts]
        return sum(place + 1 for length in whole for place in range(length))
    shared = sum(range(1, 9 + 1)) + sum(sum(range(10, 9 + t)) for t in LENGTHS[0])
    alone = sum(range(1, 17 + 12))
    return shared + alone


@pytest.mark.parametrize("layout", ["rows", "packed"])
def test_pairs_are_counted_without_padding_and_a_shared_prompt_once(layout: Layout) -> None:
    assert int(attended_pairs(batch_in(layout))) == seen_by_hand(layout)


@pytest.mark.parametrize("tied", [True, False])
def test_products_agree_with_torchs_counter(tied: bool, tiny_model_dir: str, tiny_untied_dir: str) -> None:
    policy = Policy(tiny_model_dir if tied else tiny_untied_dir)
    work, batch = ModelWork.from_policy(policy), batch_in("packed")
    assert work is not None
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        hidden = policy.hidden_states(batch)
        hidden.sum().backward()
    counts = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    assert counts["aten.mm"] == pytest.approx(work.token * batch.real_tokens, rel=0.02)


def test_attention_agrees_with_torchs_counter_where_every_pair_is_seen(tiny_model_dir: str) -> None:
    """The plain kernel multiplies T x T; T (T + 1) / 2 pairs are seen, so they are counted for the whole square."""
    tokens = 64
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, attn_implementation="sdpa")
    work = ModelWork.from_policy(Policy(tiny_model_dir))
    assert work is not None
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.arange(tokens)[None]).logits.sum().backward()
    counts = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    assert counts["aten.bmm"] == pytest.approx(work.pair * tokens**2, rel=0.02)
    assert counts["aten.mm"] == pytest.approx((work.token + work.generated + work.gradient) * tokens, rel=0.02)


def test_what_is_frozen_needs_no_gradient_of_its_own(tiny_untied_dir: str) -> None:
    policy = Policy(tiny_untied_dir)
    whole = ModelWork.from_policy(policy)
    policy.requires_grad_(False)
    frozen = ModelWork.from_policy(policy)
    assert whole is not None
    assert frozen is not None
    assert (frozen.token, frozen.gradient) == (whole.token * 4 // 6, whole.gradient // 2)
    assert (frozen.pair, frozen.generated) == (whole.pair, whole.generated)


def test_a_mixture_of_experts_is_not_counted(tiny_model_dir: str) -> None:
    policy = Policy(tiny_model_dir)
    policy.model.config.num_local_experts = 8
    assert ModelWork.from_policy(policy) is None


def test_the_speed_of_a_product_is_of_this_machine() -> None:
    assert 1e8 < product_speed(torch.float32, "cpu", seconds=0.01) < 1e14


def test_utilisation_is_logged_with_every_step(tiny_policy_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dppo_lightning.run.callbacks.utilisation.product_speed", lambda dtype, device: 1e9)
    run = fit(tiny_policy_dir, callbacks=[Utilisation()], max_steps=2, accumulate_grad_batches=2)
    logged = run.metrics.of("perf/flops_utilisation")
    assert len(logged) == 2
    assert run.module.policy is not None
    work = ModelWork.from_policy(run.module.policy)
    assert work is not None
    # Between the work of the generated tokens alone, none with a gradient, and that of whole padded rows.
    for share, tokens, seconds in zip(
        logged, run.metrics.of("train/tokens"), run.metrics.of("time/train"), strict=True
    ):
        least = (work.token + work.generated) * (tokens - 12) / seconds / 1e9
        most = work.flops(12 * 9, 12 * 45, tokens, tokens) / seconds / 1e9
        assert least < share < most


def test_packing_is_logged(tiny_policy_dir: str) -> None:
    for shared in (True, False):
        run = fit(tiny_policy_dir, module={"shared_prompts": shared})
        assert run.metrics.of("perf/packed") == [float(shared)]
