"""What the module keeps of rollout time, and what comes of it when the policy has moved."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from transformers import AutoModelForCausalLM

from dppo_lightning.base.batch import pack
from dppo_lightning.base.records import Sequence
from dppo_lightning.scaling.ranks import Controller, Ranks
from dppo_lightning.train.module import DPPOModule
from dppo_lightning.train.policy import Policy
from dppo_lightning.trust_region import BinaryTV, Combined, FullKL, FullTV, PPOClip, TopKTV, TrustRegion

LENGTHS = ((3, 6), (2, 1), (5, 9), (1, 4))  # prompt, completion


def sequences() -> list[Sequence]:
    rng = np.random.default_rng(0)
    rows = []
    for prompt, completion in LENGTHS:
        rows.append(
            Sequence(
                token_ids=rng.integers(96, size=prompt + completion),
                generated=np.arange(prompt, prompt + completion),
                rollout_logp=-rng.random(completion).astype(np.float32),
                versions=np.zeros(completion, np.int64),
                advantage=1.0,
            )
        )
    return rows


def make_module(
    folder: str, region: TrustRegion, precision: Precision | None = None, temperature: float = 0.8, **arguments: Any
) -> DPPOModule:
    """A module in training, as far as ``annotate`` sees it."""
    module = DPPOModule(folder, region, **arguments)
    module.policy = Policy(folder, temperature)
    module.trainer = SimpleNamespace(
        precision_plugin=precision or Precision(),
        accumulate_grad_batches=2,
        strategy=SimpleNamespace(precision_plugin=precision or Precision(), root_device=torch.device("cpu")),
        datamodule=SimpleNamespace(steps_per_rollout=1, controller=Controller(Ranks())),
    )
    module.configure_model()
    return module


def whole_distributions(folder: str, weights: dict[str, torch.Tensor], rows: list[Sequence]) -> torch.Tensor:
    """Log-probs at every id and generated position, by the model as it is in transformers, a row at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.load_state_dict(weights, strict=False)
    found = []
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.from_numpy(row.token_ids)[None]).logits[0] / 0.8
            found.append(logits.log_softmax(dim=-1)[row.generated - 1])
    return torch.cat(found)


def counted_passes(module: DPPOModule) -> list[int]:
    """Grows by one for each forward pass of the policy."""
    passes: list[int] = []
    original = module.policy.hidden_states
    module.policy.hidden_states = lambda batch: (passes.append(batch.tokens), original(batch))[1]
    return passes


def move(module: DPPOModule) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("tied", [True, False])
def test_full_divergences_compare_the_policy_with_that_of_rollout_time(
    tied: bool, tiny_model_dir: str, tiny_untied_dir: str
) -> None:
    folder, rows = tiny_model_dir if tied else tiny_untied_dir, sequences()
    module = make_module(folder, FullTV(), divergence_diagnostics=True)
    module.annotate(rows)
    before = {name: weight.clone() for name, weight in module.policy.named_weights()}
    move(module)
    batch = pack(rows, np.ones(len(rows)))
    measured = {name: region for name, region in module.diagnostics.items() if name.startswith("full")}
    output = module.policy.head(module.policy.hidden_states(batch), batch, module.objective, measured)

    mu = whole_distributions(folder, before, rows)
    pi = whole_distributions(folder, dict(module.policy.named_weights()), rows)
    tv = 0.5 * (mu.exp() - pi.exp()).abs().sum(dim=-1)
    kl = (mu.exp() * (mu - pi)).sum(dim=-1)
    assert tv.max() > 0.1
    torch.testing.assert_close(output.divergence, tv, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(output.diagnostics["full_tv"], tv, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(output.diagnostics["full_kl"], kl, rtol=1e-3, atol=1e-5)


def test_hidden_states_and_recomputed_log_probs_share_one_pass(tiny_model_dir: str) -> None:
    rows = sequences()
    module = make_module(tiny_model_dir, Combined([FullTV(), PPOClip(anchor="recomputed")]))
    passes = counted_passes(module)
    module.annotate(rows)
    assert sum(passes) == sum(row.tokens for row in rows)
    expected = whole_distributions(tiny_model_dir, {}, rows)
    sampled = expected.gather(1, torch.cat([torch.from_numpy(row.token_ids[row.generated]) for row in rows])[:, None])
    torch.testing.assert_close(
        torch.cat([torch.from_numpy(row.recomputed_logp) for row in rows]), sampled.squeeze(1), rtol=1e-4, atol=1e-5
    )
    assert [tuple(row.rollout_hidden.shape) for row in rows] == [(completion, 64) for _, completion in LENGTHS]
    assert not any(row.rollout_hidden.requires_grad for row in rows)
    assert pack(rows, np.ones(len(rows))).rollout_hidden.shape == (20, 64)


@pytest.mark.parametrize("region", [BinaryTV(), TopKTV()], ids=["binary", "topk"])
def test_what_no_one_asks_for_is_not_computed(region: TrustRegion, tiny_model_dir: str) -> None:
    rows, module = sequences(), make_module(tiny_model_dir, region)
    passes = counted_passes(module)
    module.annotate(rows)
    assert not passes
    assert module.policy.head.rollout_weight is None
    assert all(row.rollout_hidden is None and row.recomputed_logp is None for row in rows)


def test_in_bf16_what_is_kept_is_as_coarse_as_training_and_no_coarser(tiny_model_dir: str) -> None:
    rows = sequences()
    precision = MixedPrecision("bf16-mixed", "cpu")
    module = make_module(tiny_model_dir, FullKL(), precision)
    module.annotate(rows)
    assert {row.rollout_hidden.dtype for row in rows} == {torch.bfloat16}
    assert module.policy.head.rollout_weight.dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")
    row = rows[:1]  # alone in its micro-batch then and now, so that no padding moves a bit
    module.annotate(row)
    batch = pack(row, np.ones(1))
    with precision.forward_context():
        output = module.policy.head(module.policy.hidden_states(batch), batch, module.objective)
    assert not output.divergence.any()


@pytest.mark.parametrize("precision", [None, MixedPrecision("bf16-mixed", "cpu")], ids=["32-true", "bf16-mixed"])
def test_log_probs_are_scored_in_the_precision_of_training(precision: Any, tiny_model_dir: str) -> None:
    rows = sequences()
    module = make_module(tiny_model_dir, PPOClip(anchor="recomputed"), precision)
    module.scorer.reference = module.policy
    batch = pack(rows, np.ones(len(rows)), module.layout)
    with module.trainer.precision_plugin.forward_context(), torch.no_grad():
        training = module.policy.head(module.policy.hidden_states(batch), batch)
    share = [rows]
    module.annotate(rows)
    (_, remembered), *_ = found = module.scorer.remember_share(share, frozenset({"recomputed_logp"}))
    assert len(remembered) == rows[0].tokens
    scored = (
        module.scorer.policy_share(share),
        module.scorer.reference_share(share),
        [logp for _, logp in found],
    )
    for logps in scored:
        assert torch.equal(torch.from_numpy(np.concatenate(logps)), training)
    exact = module.policy.head(module.policy.hidden_states(batch), batch)
    assert (exact == training).all() == (precision is None)


@pytest.mark.parametrize("needs", [["full"], ["recomputed_logp"], ["full", "recomputed_logp"]], ids=" ".join)
def test_a_sequences_piece_is_sent_without_its_micro_batch(needs: list[str], tiny_model_dir: str) -> None:
    rows, module = sequences() * 16, make_module(tiny_model_dir, FullTV())
    module.scorer.reference = module.policy

    def size(piece: Any) -> int:
        return 0 if piece is None else piece.nbytes

    for found in (
        module.scorer.remember_share([rows], frozenset(needs)),
        module.scorer.remember_share([rows[:32], rows[32:]], frozenset(needs)),
        [
            (logp, None)
            for score in (module.scorer.policy_share, module.scorer.reference_share)
            for logp in score([rows])
        ],
    ):
        for pieces in found:
            assert 0 < sum(map(size, pieces)) <= len(pickle.dumps(pieces)) < sum(map(size, pieces)) + 1000


def test_the_engine_is_asked_for_as_many_log_probs_as_something_needs() -> None:
    assert DPPOModule("none", BinaryTV()).topk == 0
    assert DPPOModule("none", TopKTV(k=7)).topk == 7
    assert DPPOModule("none", BinaryTV(), divergence_diagnostics=True).topk == 20
    assert DPPOModule("none", TopKTV(k=7), divergence_diagnostics=True).topk == 7
    assert DPPOModule("none", FullTV(), divergence_diagnostics=True).topk == 20
