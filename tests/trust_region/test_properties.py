"""What holds for all inputs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dppo_lightning.trust_region import (
    CPPO,
    VACO,
    BandPO,
    BinaryKL,
    BinaryTV,
    Combined,
    DualClip,
    FullKL,
    FullTV,
    IcePop,
    MinimalMask,
    MiniRL,
    NoTrustRegion,
    PPOClip,
    PredictiveMask,
    RelaxedClip,
    SequenceMask,
    Surrogate,
    TokenStats,
    TopKKL,
    TopKTV,
    TruncatedIS,
    TrustRegion,
)
from tests.trust_region import reference as ref
from tests.trust_region.batches import Token, softmax, stats

QUICK = settings(max_examples=100, deadline=None)


@st.composite
def tokens(draw, least_vocabulary: int = 3) -> list[Token]:
    """A few tokens over one vocabulary, their distributions from flat to almost certain."""
    vocabulary = draw(st.integers(least_vocabulary, 9))
    logits = st.lists(st.floats(-12, 12), min_size=vocabulary, max_size=vocabulary)
    batch = []
    for position in range(draw(st.integers(1, 6))):
        mu, pi = softmax(draw(logits)), softmax(draw(logits))
        sampled = draw(st.integers(0, vocabulary - 1))
        advantage = draw(st.sampled_from([-2.0, -0.5, 0.0, 0.5, 2.0]))
        old = draw(st.floats(1e-6, 0.999))
        batch.append(Token(mu, pi, sampled, old, advantage, draw(st.integers(0, 2)), position))
    return batch


def run(region: TrustRegion, batch: list[Token], **kwargs) -> tuple[Surrogate, torch.Tensor]:
    given_stats = stats(batch, k=region.k or 5, full="full" in region.needs, **kwargs)
    surrogate = region(given_stats)
    surrogate.loss.sum().backward()
    return surrogate, given_stats.logp.grad


def divergences(region: TrustRegion, batch: list[Token], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return run(region, batch, dtype=dtype)[0].divergence


@QUICK
@given(tokens(), st.integers(1, 9), st.sampled_from(["append", "replace"]))
def test_binary_is_at_most_topk_is_at_most_full(batch, k, sampled_token):
    """App. B: merging tokens into a bucket cannot raise a divergence.

    In float64, as it is about the formulas: float32 log-probs leave 1 - sum of S an error of 1e-7, which moves the
    KL of a rest that pi has all but given up.
    """
    double = torch.float64
    for binary, topk, full in ((BinaryTV, TopKTV, FullTV), (BinaryKL, TopKKL, FullKL)):
        low = divergences(binary(), batch, double)
        middle = divergences(topk(k=k, sampled_token=sampled_token), batch, double)
        high = divergences(full(), batch, double)
        slack = 2e-6 + 1e-5 * high
        assert (low <= middle + slack).all()
        assert (middle <= high + slack).all()


@QUICK
@given(tokens(), st.integers(1, 9))
def test_pinsker(batch, k):
    for tv, kl in ((BinaryTV(), BinaryKL()), (TopKTV(k=k), TopKKL(k=k)), (FullTV(), FullKL())):
        assert (divergences(tv, batch) ** 2 <= divergences(kl, batch) / 2 + 2e-6).all()


@QUICK
@given(tokens())
def test_topk_of_all_but_one_token_equals_full(batch):
    """K = V - 1 leaves one token to the rest bucket, so nothing is merged."""
    k = len(batch[0].mu) - 1
    for topk, full in ((TopKTV(k=k), FullTV()), (TopKKL(k=k), FullKL())):
        torch.testing.assert_close(
            divergences(topk, batch, torch.float64), divergences(full, batch, torch.float64), rtol=1e-5, atol=1e-9
        )


@QUICK
@given(tokens(), st.integers(1, 5), st.integers(1, 4), st.sampled_from(["append", "replace"]))
def test_unused_slots_do_not_matter(batch, k, unused, sampled_token):
    """Top-K tensors of any width: -inf in rollout_topk_logp marks an empty slot, whatever pi says there."""
    narrow = stats(batch, k=k)
    columns = torch.full((len(batch), unused), -math.inf).double()
    # between the K ids and the sampled token's own column, which stays last
    wide = TokenStats(
        logp=narrow.logp,
        rollout_logp=narrow.rollout_logp,
        advantage=narrow.advantage,
        topk_logp=torch.cat([torch.full_like(columns, -0.1), narrow.topk_logp], dim=1),
        rollout_topk_logp=torch.cat([columns, narrow.rollout_topk_logp], dim=1),
    )
    for region in (TopKTV(k=k, sampled_token=sampled_token), TopKKL(k=k, sampled_token=sampled_token)):
        torch.testing.assert_close(region(wide).divergence, region(narrow).divergence, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(PredictiveMask(k=k)(wide).loss, PredictiveMask(k=k)(narrow).loss)


@QUICK
@given(tokens(), st.floats(1e-3, 0.9))
def test_a_token_that_moves_back_is_never_stopped(batch, threshold):
    back = torch.tensor([token.advantage * (token.lp - token.lmu) <= 0 for token in batch])
    regions = [
        BinaryTV(threshold),
        BinaryKL(threshold),
        TopKTV(threshold, k=2),
        TopKKL(threshold, k=2),
        FullTV(threshold),
        FullKL(threshold),
        PPOClip(threshold, threshold),
        DualClip(threshold, threshold, dual=None),
        RelaxedClip(threshold, threshold),
        MinimalMask(threshold),
        BandPO(threshold),
        BandPO(threshold, "tv"),
        BandPO(threshold, "chi2"),
        VACO(threshold),
        CPPO(threshold, budget=threshold),
        Combined([BinaryTV(threshold), PPOClip(threshold, threshold)]),
    ]
    for region in regions:
        assert run(region, batch)[0].keep[back].all(), region.describe()

    back_to_old = torch.tensor([token.advantage * (token.lp - token.lold) <= 0 for token in batch])
    for region in (
        MiniRL(threshold, threshold),
        BinaryTV(threshold, anchor="recomputed"),
        BinaryKL(threshold, anchor="recomputed"),
        PPOClip(threshold, threshold, anchor="recomputed"),
    ):
        assert run(region, batch)[0].keep[back_to_old].all(), region.describe()


@QUICK
@given(tokens(), st.floats(0.01, 0.5))
def test_stopped_tokens_are_outside_and_moving_out(batch, delta):
    outward = torch.tensor([token.advantage * (token.lp - token.lmu) > 0 for token in batch])
    for region in (BinaryTV(delta), BinaryKL(delta), TopKKL(delta, k=2), FullTV(delta)):
        surrogate, _ = run(region, batch)
        assert torch.equal(~surrogate.keep, outward & (surrogate.divergence > delta))


@QUICK
@given(tokens())
def test_an_infinite_threshold_is_no_trust_region(batch):
    _, free = run(NoTrustRegion(), batch)
    inf = math.inf
    regions = [
        BinaryTV(inf),
        BinaryKL(inf),
        TopKTV(inf, k=2),
        TopKKL(inf, k=2),
        FullTV(inf),
        FullKL(inf),
        PredictiveMask(inf, k=2, max_ratio=None),
        SequenceMask(inf),
        SequenceMask(inf, "mean"),
        VACO(inf),
        CPPO(1e9, budget=1e9),
        BandPO(inf),
        BandPO(inf, "tv"),
        BandPO(inf, "chi2"),
        IcePop(0, inf),
        TruncatedIS(inf),
        RelaxedClip(alpha=1),
    ]
    for region in regions:
        surrogate, gradient = run(region, batch)
        assert surrogate.keep.all(), region.describe()
        assert torch.equal(gradient, free), region.describe()


@QUICK
@given(tokens(), st.floats(0.001, 0.6))
def test_bandpo_is_the_binary_mask_of_its_divergence(batch, delta):
    for divergence, twin in (("tv", BinaryTV(delta)), ("kl", BinaryKL(delta))):
        band, gradient = run(BandPO(delta, divergence), batch)
        surrogate, twin_gradient = run(twin, batch)
        for name in ("loss", "keep", "divergence", "weight"):
            assert torch.equal(getattr(band, name), getattr(surrogate, name)), name
        assert torch.equal(gradient, twin_gradient)


NEAR_EDGES = st.one_of(
    st.floats(-27, 0),  # of log p, down to 1e-12
    st.floats(-27, -1e-6).map(lambda x: math.log1p(-math.exp(x))),  # up to 1 - 1e-12
)


@settings(max_examples=400, deadline=None)
@given(
    NEAR_EDGES,
    NEAR_EDGES,
    st.sampled_from([-2.0, -0.5, 0.0, 0.5, 2.0]),
    st.floats(1e-3, 3),
    st.sampled_from(["tv", "kl", "chi2"]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_bandpo_stops_outside_the_band_whose_bounds_a_bisection_finds(
    log_mu, log_pi, advantage, delta, divergence, dtype
):
    logs = torch.tensor([[log_mu], [log_pi]], dtype=dtype).clamp(max=-(2.0**-24))
    mu, pi = logs.double().exp().flatten().tolist()
    low, high = ref.band(mu, delta, divergence)
    assume(all(abs(pi - mu * bound) > 1e-5 * min(pi, 1 - pi) for bound in (low, high)))  # not on the edge itself
    tokens = TokenStats(logs[1].clone().requires_grad_(), logs[0], torch.tensor([advantage], dtype=dtype))
    surrogate = BandPO(delta, divergence)(tokens)
    surrogate.loss.sum().backward()
    stopped = (advantage > 0 and pi > mu * high) or (advantage < 0 and pi < mu * low)
    assert surrogate.keep.item() != stopped
    expected = 0.0 if stopped else -advantage * pi / mu
    assert tokens.logp.grad.item() == pytest.approx(expected, rel=1e-4)
    assert surrogate.loss.item() == pytest.approx(expected, rel=1e-4)


@QUICK
@given(tokens(), st.floats(0.05, 0.9), st.floats(0.05, 3))
def test_dual_clip_without_dual_is_ppo(batch, low, high):
    surrogate, gradient = run(DualClip(low, high, dual=None), batch)
    ppo, ppo_gradient = run(PPOClip(low, high), batch)
    assert torch.equal(surrogate.keep, ppo.keep)
    torch.testing.assert_close(gradient, ppo_gradient)


@QUICK
@given(tokens(), st.floats(1.01, 5))
def test_dual_clip_stops_only_more_negative_tokens(batch, dual):
    plain, clipped = run(DualClip(dual=None), batch)[0].keep, run(DualClip(dual=dual), batch)[0].keep
    far = torch.tensor([token.advantage < 0 and token.lp - token.lmu > math.log(dual) for token in batch])
    assume(all(abs(token.lp - token.lmu - math.log(dual)) > 1e-9 for token in batch))
    assert torch.equal(clipped, plain & ~far)


@QUICK
@given(tokens())
def test_matching_engines_make_dppo_plain_policy_gradient(batch):
    """One update per rollout with pi = mu gives D = 0: nothing is stopped and the weight is 1."""
    same = [Token(t.mu, t.mu, t.sampled, t.old, t.advantage, t.sequence, t.position) for t in batch]
    advantages = torch.tensor([token.advantage for token in same]).double()
    for region in (BinaryTV(), BinaryKL(), TopKTV(k=3), TopKKL(k=3), FullTV(), FullKL()):
        surrogate, gradient = run(region, same)
        assert surrogate.keep.all()
        torch.testing.assert_close(surrogate.divergence, torch.zeros_like(advantages), atol=1e-9, rtol=0)
        torch.testing.assert_close(gradient, -advantages)


@QUICK
@given(tokens(), st.floats(0.05, 0.4))
def test_a_smaller_threshold_stops_more(batch, delta):
    for make in (BinaryTV, BinaryKL, lambda d: TopKTV(d, k=2), FullKL, SequenceMask, VACO, BandPO, CPPO):
        tight, wide = run(make(delta), batch)[0].keep, run(make(2 * delta), batch)[0].keep
        assert (wide | ~tight).all()


@QUICK
@given(tokens())
def test_members_of_a_combination_only_take_away(batch):
    members = [IcePop(), BinaryTV(0.1), RelaxedClip(), VACO(0.2)]
    keep = run(Combined(members), batch)[0].keep
    assert torch.equal(keep, torch.stack([run(member, batch)[0].keep for member in members]).all(dim=0))


@QUICK
@given(tokens(), st.permutations(range(6)))
def test_sequence_regions_follow_position_not_order(batch, order):
    shuffled = [batch[i] for i in order if i < len(batch)]
    for region in (CPPO(0.1, budget=0.01), VACO(0.1), SequenceMask(0.02, "mean")):
        keep = {id(t): bool(k) for t, k in zip(batch, run(region, batch)[0].keep, strict=True)}
        assert [keep[id(t)] for t in shuffled] == run(region, shuffled)[0].keep.tolist()
