"""Each region against its method, re-derived in float64 with plain Python loops."""

from __future__ import annotations

import pytest
import torch

from dppo_lightning.trust_region import DRPO, GSPO, SAPO, SPO, DualClip
from tests.trust_region import reference
from tests.trust_region.batches import edge_batch, random_batch
from tests.trust_region.cases import CASES

BATCHES = {
    "random-0": random_batch(0),
    "random-1": random_batch(1, lengths=(5, 2, 30)),
    "random-2": random_batch(2, drift=3.0),
    "edges": edge_batch(),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_is_the_finite_difference_of_the_published_objective(case, batch):
    tokens = BATCHES[batch]
    stats = case.stats(tokens)
    surrogate = case.region(stats)
    surrogate.loss.sum().backward()

    _, keeps = case.reference(tokens, [token.lp for token in tokens])
    assert surrogate.keep.tolist() == keeps
    expected = torch.tensor(reference.gradient(case.reference, tokens), dtype=torch.float64)
    torch.testing.assert_close(stats.logp.grad, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_gives_the_float64_gradient(case):
    tokens = random_batch(3)
    gradients = []
    for dtype in (torch.float64, torch.float32):
        stats = case.stats(tokens, dtype=dtype)
        surrogate = case.region(stats)
        assert surrogate.loss.dtype == dtype
        surrogate.loss.sum().backward()
        gradients.append(stats.logp.grad.double())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=2e-5, atol=1e-6)


DIFFERENTIABLE = (DualClip, SPO, DRPO, SAPO, GSPO)


@pytest.mark.parametrize("case", [case for case in CASES if isinstance(case.region, DIFFERENTIABLE)], ids=str)
def test_losses_differentiable_in_the_ratio_have_the_published_value(case):
    tokens = random_batch(4)
    losses, _ = case.reference(tokens, [token.lp for token in tokens])
    surrogate = case.region(case.stats(tokens))
    torch.testing.assert_close(surrogate.loss.detach(), torch.tensor(losses, dtype=torch.float64))


DIVERGENCES = {
    "BinaryTV": reference.binary_tv,
    "BinaryKL": reference.binary_kl,
    "TopKTV-3": lambda token: reference.partition_tv(token, 3),
    "TopKKL-3": lambda token: reference.partition_kl(token, 3),
    "TopKTV-replace": lambda token: reference.partition_tv(token, 3, "replace"),
    "TopKKL-replace": lambda token: reference.partition_kl(token, 3, "replace"),
    "FullTV": lambda token: reference.partition_tv(token, None),
    "FullKL": lambda token: reference.partition_kl(token, None),
    "DRPO": reference.binary_tv,
    "BandPO": reference.binary_kl,
    "BandPO-tv": reference.binary_tv,
    "BandPO-chi2": reference.binary_chi2,
    "BinaryTV-recomputed": lambda token: reference.binary_tv(token, "recomputed"),
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_reported_divergence_is_the_formula(name):
    case = next(case for case in CASES if str(case) == name)
    tokens = random_batch(5) + edge_batch()
    tokens = [token for token in tokens if len(token.mu) == len(tokens[0].mu)] if name.startswith("Full") else tokens
    divergence = case.region(case.stats(tokens)).divergence
    expected = torch.tensor([DIVERGENCES[name](token) for token in tokens], dtype=torch.float64)
    torch.testing.assert_close(divergence, expected, rtol=1e-6, atol=1e-8)


def test_batches_reach_both_sides_of_every_mask():
    """A mask that never fired, or always did, would make the tests above say nothing."""
    fired, spared = set(), set()
    for tokens in BATCHES.values():
        for case in CASES:
            keep = case.region(case.stats(tokens)).keep
            fired |= {str(case)} if not keep.all() else set()
            spared |= {str(case)} if keep.any() else set()
    never_stop = ("NoTrust", "TruncatedIS", "CISPO", "SPO", "DRPO", "SAPO", "CovarianceKL")
    assert spared == {str(case) for case in CASES}
    assert fired == {str(case) for case in CASES if not str(case).startswith(never_stop)}
