"""What every trust region promises, whichever it is."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace

import jsonargparse
import pytest
import torch

import dppo_lightning.trust_region as package
from dppo_lightning.trust_region import GSPO, Combined, DivergenceMask, NoTrustRegion, TokenStats, TrustRegion
from tests.trust_region.batches import Token, edge_batch, random_batch, token_at
from tests.trust_region.cases import CASES, DEFAULTS, TOKEN_SCOPE, Case


def indexed(stats: TokenStats, index) -> TokenStats:
    """The statistics of some of the tokens, with a gradient of their own."""
    picked = {}
    for field in fields(stats):
        value = getattr(stats, field.name)
        picked[field.name] = None if value is None else value.detach()[index].clone()
    picked["logp"].requires_grad_()
    return TokenStats(**picked)


def batch(case: Case, seed: int) -> list[Token]:
    """Random tokens and the edges, except for GSPO: its gradient is per sequence, and the edges mix advantages."""
    return random_batch(seed) if isinstance(case.region, GSPO) else random_batch(seed) + edge_batch()


def gradient_and_keep(region: TrustRegion, stats: TokenStats) -> tuple[torch.Tensor, torch.Tensor]:
    surrogate = region(stats)
    surrogate.loss.sum().backward()
    return stats.logp.grad, surrogate.keep


def test_every_public_region_is_in_the_list():
    public = {getattr(package, name) for name in package.__all__ if isinstance(getattr(package, name), type)}
    regions = {cls for cls in public if issubclass(cls, TrustRegion)} - {TrustRegion, DivergenceMask}
    assert regions == {type(case.region) for case in DEFAULTS}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_zero_advantage_gives_zero_gradient(case):
    stats = case.stats(batch(case, 6))
    gradient, _ = gradient_and_keep(case.region, stats)
    assert torch.equal(gradient[stats.advantage == 0], torch.zeros(int((stats.advantage == 0).sum())).double())
    none = case.choosing(replace(indexed(stats, slice(None)), advantage=torch.zeros_like(stats.advantage)))
    assert not gradient_and_keep(case.region, none)[0].any()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_stopped_tokens_have_zero_gradient(case):
    gradient, keep = gradient_and_keep(case.region, case.stats(batch(case, 7), dtype=torch.float32))
    assert not gradient[~keep].any()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_order_of_the_tokens_does_not_matter(case):
    stats = case.stats(random_batch(8, lengths=(20, 3, 50, 17)), dtype=torch.float32)
    order = torch.randperm(len(stats.logp), generator=torch.Generator().manual_seed(0))
    gradient, keep = gradient_and_keep(case.region, stats)
    permuted_gradient, permuted_keep = gradient_and_keep(case.region, indexed(stats, order))
    assert torch.equal(permuted_keep, keep[order])
    if case.region.scope == "token":
        assert torch.equal(permuted_gradient, gradient[order])
    else:
        torch.testing.assert_close(permuted_gradient, gradient[order])


@pytest.mark.parametrize("size", [1, 7, 64])
@pytest.mark.parametrize("case", TOKEN_SCOPE, ids=str)
def test_chunked_equals_unchunked_bit_for_bit(case, size):
    stats = case.stats(random_batch(9, lengths=(100, 1, 57, 43)), dtype=torch.float32)
    whole = case.region(stats)
    whole.loss.sum().backward()
    chunks = [indexed(stats, slice(start, start + size)) for start in range(0, len(stats.logp), size)]
    parts = [case.region(chunk) for chunk in chunks]
    for part in parts:
        part.loss.sum().backward()
    assert torch.equal(torch.cat([chunk.logp.grad for chunk in chunks]), stats.logp.grad)
    assert torch.equal(torch.cat([part.loss for part in parts]), whole.loss)
    assert torch.equal(torch.cat([part.keep for part in parts]), whole.keep)
    if whole.divergence is not None:
        assert torch.equal(torch.cat([part.divergence for part in parts]), whole.divergence)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_finite_for_probabilities_from_1e_12_to_almost_1(case):
    ends = [1e-12, 1e-9, 1e-6, 1e-3, 0.5, 0.999, 1 - 1e-5, 1 - 1e-7]
    tokens = [token_at(mu, pi, a, old) for mu in ends for pi in ends for a in (-2.0, 2.0) for old in (1e-12, 1 - 1e-7)]
    stats = case.stats(tokens, dtype=torch.float32)
    surrogate = case.region(stats)
    surrogate.loss.sum().backward()
    assert torch.isfinite(surrogate.loss).all()
    assert torch.isfinite(stats.logp.grad).all()
    if surrogate.divergence is not None:
        assert torch.isfinite(surrogate.divergence).all()
        assert (surrogate.divergence >= 0).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_certain_tokens_are_finite_and_have_not_moved(case):
    """log-probs of exactly 0: what a greedy or forced token gives."""
    zeros = torch.zeros(3)
    table = torch.tensor([[0.0, -torch.inf, -torch.inf]] * 3)
    stats = TokenStats(
        logp=zeros.clone().requires_grad_(),
        rollout_logp=zeros,
        advantage=torch.tensor([1.0, -1.0, 2.0]),
        recomputed_logp=zeros,
        topk_logp=table,
        rollout_topk_logp=table,
        entropy=zeros,
        sequence=torch.tensor([0, 0, 1]),
        position=torch.tensor([0, 1, 0]),
    )
    surrogate = case.region(case.choosing(stats))
    surrogate.loss.sum().backward()
    assert torch.isfinite(surrogate.loss).all()
    assert torch.isfinite(stats.logp.grad).all()
    assert surrogate.divergence is None or not surrogate.divergence.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_half_precision_log_probs_are_computed_with_in_float32(case, dtype):
    half = case.stats(random_batch(10), dtype=dtype)
    single = indexed(half, slice(None))
    assert single.logp.dtype == torch.float32
    from_half, from_single = case.region(half), case.region(single)
    assert from_half.loss.dtype == torch.float32
    assert torch.equal(from_half.loss, from_single.loss)
    assert torch.equal(from_half.keep, from_single.keep)
    if from_half.divergence is not None:
        assert from_half.divergence.dtype == torch.float32


@pytest.mark.parametrize("case", CASES, ids=str)
def test_thresholds_do_not_depend_on_the_default_dtype(case):
    """It is bf16 in Lightning's forward context of "bf16-true", in which 0.15 would be 0.1504."""
    stats = case.stats(random_batch(10) + edge_batch(), dtype=torch.float32)
    fine = case.region(stats)
    torch.set_default_dtype(torch.bfloat16)
    try:
        coarse = case.region(stats)
    finally:
        torch.set_default_dtype(torch.float32)
    assert coarse.loss.dtype == torch.float32
    assert torch.equal(coarse.loss, fine.loss)
    assert torch.equal(coarse.keep, fine.keep)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_tokens_give_an_empty_differentiable_loss(case):
    stats = indexed(case.stats(random_batch(11)), slice(0, 0))
    surrogate = case.region(stats)
    assert surrogate.loss.shape == surrogate.keep.shape == (0,)
    surrogate.loss.sum().backward()
    assert stats.logp.grad.shape == (0,)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_token_alone(case):
    stats = indexed(case.stats([token_at(0.4, 0.5, 1.0)], dtype=torch.float32), slice(0, 1))
    gradient, keep = gradient_and_keep(case.region, stats)
    assert gradient.shape == keep.shape == (1,)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_only_the_sampled_log_prob_carries_gradient(case):
    stats = case.stats(random_batch(12), dtype=torch.float32)
    others = {"rollout_logp", "recomputed_logp", "topk_logp", "rollout_topk_logp", "entropy"}
    watched = replace(stats, **{name: getattr(stats, name).clone().requires_grad_() for name in others})
    case.region(watched).loss.sum().backward()
    detached = ("DualClip", "SPO", "DRPO", "SAPO", "GSPO", "CovarianceKL")
    # mu and pi_old are data: a loss differentiable in the ratio depends on them, but nothing asks for that gradient
    silent = {"topk_logp", "rollout_topk_logp", "entropy"}
    silent |= set() if str(case).startswith(detached) else {"rollout_logp", "recomputed_logp"}
    assert all(getattr(watched, name).grad is None for name in silent)
    assert watched.logp.grad is not None


@pytest.mark.parametrize("case", CASES, ids=str)
def test_surrogate_has_one_value_for_each_token(case):
    tokens = random_batch(13)
    surrogate = case.region(case.stats(tokens, dtype=torch.float32))
    assert surrogate.loss.shape == surrogate.keep.shape == (len(tokens),)
    assert surrogate.keep.dtype == torch.bool
    for constant in (surrogate.keep, surrogate.divergence, surrogate.weight):
        assert constant is None or (constant.shape == (len(tokens),) and not constant.requires_grad)
    assert (surrogate.weight is not None) == case.region.composable


@pytest.mark.parametrize("case", CASES, ids=str)
def test_only_what_is_declared_is_read(case):
    stats = case.stats(random_batch(14), dtype=torch.float32)
    reads = {"logp", "rollout_logp", "advantage"} | (case.region.needs & {"recomputed_logp", "entropy", "chosen"})
    reads |= {"topk_logp", "rollout_topk_logp"} if case.region.needs & {"topk", "full"} else set()
    reads |= {"sequence", "position"} if case.region.scope == "sequence" else set()
    bare = replace(stats, **{field.name: None for field in fields(stats) if field.name not in reads})
    assert torch.equal(case.region(bare).loss, case.region(stats).loss)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_description_names_region_thresholds_and_anchor(case):
    described = case.region.describe()
    assert all(isinstance(value, str) for value in described.values())
    assert described["region"].startswith(type(case.region).__name__)
    assert "recomputed" in described["anchor"] or case.region.anchor == "rollout"
    if isinstance(case.region, Combined):
        members = case.region.members
        assert described["region"] == f"Combined({', '.join(type(member).__name__ for member in members)})"
        for place, member in enumerate(members, start=1):
            for key, value in member.describe().items():
                assert key == "region" or described[f"{place}.{type(member).__name__}.{key}"] == value
        return
    for name in inspect.signature(type(case.region)).parameters:
        value = getattr(case.region, name)
        assert described[name] == ("none" if value is None else value if isinstance(value, str) else f"{value:g}")


@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_class_path_builds_the_region_from_yaml(case):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TrustRegion, "trust_region")
    prefix = "dppo_lightning.trust_region."
    config: dict = {"class_path": prefix + type(case.region).__name__}
    if str(case) == "VACO":
        config["init_args"] = {"delta": 0.1}
    if str(case) == "Combined":
        config["init_args"] = {"masks": [{"class_path": prefix + "IcePop"}, {"class_path": prefix + "BinaryTV"}]}
    built = parser.instantiate_classes(parser.parse_object({"trust_region": config})).trust_region
    assert type(built) is type(case.region)
    assert built.describe() == case.region.describe()


@pytest.mark.parametrize("case", [case for case in CASES if case.region.composable], ids=str)
def test_weight_is_what_combining_multiplies(case):
    """Combined with a region that does nothing is the region itself, up to the ratio, which is pi / mu."""
    stats = case.stats(random_batch(15))
    alone = case.region(stats)
    both = Combined([case.region, NoTrustRegion()])
    together = both(replace(stats, chosen=both.choose(stats)) if "chosen" in both.needs else stats)
    ratio = (stats.logp - stats.rollout_logp).exp().detach()
    expected = torch.where(alone.keep, -stats.advantage * ratio * alone.weight, 0.0)
    torch.testing.assert_close(together.loss.detach(), expected)
    assert torch.equal(together.keep, alone.keep)
    if not (case.region.anchor == "recomputed" and str(case).startswith(("PPOClip", "CISPO"))):
        torch.testing.assert_close(together.loss.detach(), alone.loss.detach())
