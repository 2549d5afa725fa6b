"""The token loss: surrogate, KL to the reference and entropy bonus, against the formulas written with math."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.train.objective import KLKind, Objective, ReferenceKL, kl_estimate
from dppo_lightning.trust_region import NoTrustRegion, TokenStats, TrustRegion

KINDS: tuple[KLKind, ...] = ("k1", "k2", "k3")
VALUE = {
    "k1": lambda lp, ref: lp - ref,
    "k2": lambda lp, ref: (lp - ref) ** 2 / 2,
    "k3": lambda lp, ref: math.exp(ref - lp) - 1 - (ref - lp),
}
SLOPE = {
    "k1": lambda lp, ref: 1.0,
    "k2": lambda lp, ref: lp - ref,
    "k3": lambda lp, ref: 1 - math.exp(ref - lp),
}
log_probs = st.floats(-8, 0, width=32)


def make_tokens(logp: list[float], advantage: list[float], entropy: list[float] | None = None) -> TokenStats:
    return TokenStats(
        logp=torch.tensor(logp, requires_grad=True),
        rollout_logp=torch.tensor(logp),
        advantage=torch.tensor(advantage),
        entropy=None if entropy is None else torch.tensor(entropy, requires_grad=True),
    )


@pytest.mark.parametrize("kind", KINDS)
@given(pairs=st.lists(st.tuples(log_probs, log_probs), min_size=1, max_size=8))
def test_kl_estimates_have_the_value_and_slope_of_their_formula(kind: KLKind, pairs: list[tuple[float, float]]) -> None:
    logp = torch.tensor([lp for lp, _ in pairs], requires_grad=True)
    kl = kl_estimate(logp, torch.tensor([ref for _, ref in pairs]), kind)
    (slope,) = torch.autograd.grad(kl.sum(), logp)
    assert kl.tolist() == pytest.approx([VALUE[kind](lp, ref) for lp, ref in pairs], rel=1e-5, abs=1e-6)
    assert slope.tolist() == pytest.approx([SLOPE[kind](lp, ref) for lp, ref in pairs], rel=1e-5, abs=1e-6)


@given(lp=log_probs, gap=st.floats(-(2**-10), 2**-10, width=32))
def test_k3_keeps_its_sign_where_the_policies_nearly_agree(lp: float, gap: float) -> None:
    logp = torch.tensor([lp])
    reference = logp - gap
    exact = (logp - reference).double()
    k3 = kl_estimate(logp, reference, "k3").item()
    assert k3 >= 0
    assert k3 == pytest.approx((exact**2 / 2 - exact**3 / 6 + exact**4 / 24).item(), rel=1e-5)


@given(gap=st.floats(-(2**-10), 2**-10, width=32))
def test_k3_has_the_slope_of_its_formula_where_the_policies_nearly_agree(gap: float) -> None:
    logp = torch.tensor([gap], requires_grad=True)
    (slope,) = torch.autograd.grad(kl_estimate(logp, torch.zeros(1), "k3").sum(), logp)
    assert slope.item() == pytest.approx(-math.expm1(-gap), rel=1e-5, abs=1e-12)


def test_k1_and_k3_estimate_the_kl_of_the_sampling_policy_without_bias() -> None:
    policy = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    exact = sum(p * math.log(p / q) for p, q in zip(policy.tolist(), reference.tolist(), strict=True))
    for kind in ("k1", "k3"):
        assert (policy * kl_estimate(policy.log(), reference.log(), kind)).sum().item() == pytest.approx(exact)


@pytest.mark.parametrize("kind", KINDS)
def test_kl_in_the_loss_adds_its_value_and_its_gradient(kind: KLKind) -> None:
    logp, reference, advantage = [-0.5, -2.0, -3.0], [-1.0, -2.0, -0.5], [1.0, -2.0, 0.0]
    tokens = make_tokens(logp, advantage)
    result = Objective(NoTrustRegion(), ReferenceKL(0.25, kind))(tokens, torch.tensor(reference))
    (slope,) = torch.autograd.grad(result.loss.sum(), tokens.logp)
    pairs = list(zip(logp, reference, advantage, strict=True))
    assert result.loss.tolist() == pytest.approx([-a + 0.25 * VALUE[kind](lp, ref) for lp, ref, a in pairs], abs=1e-6)
    assert slope.tolist() == pytest.approx([-a + 0.25 * SLOPE[kind](lp, ref) for lp, ref, a in pairs], abs=1e-6)
    assert result.kl is not None
    assert result.kl.tolist() == pytest.approx([VALUE[kind](lp, ref) for lp, ref, _ in pairs], abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_kl_in_the_reward_is_measured_and_leaves_the_loss_alone(kind: KLKind) -> None:
    tokens = make_tokens([-0.5, -2.0], [1.0, -2.0])
    result = Objective(NoTrustRegion(), ReferenceKL(0.25, kind, "reward"))(tokens, torch.tensor([-1.0, -1.0]))
    (slope,) = torch.autograd.grad(result.loss.sum(), tokens.logp)
    assert slope.tolist() == [-1.0, 2.0]
    assert result.loss.tolist() == [-1.0, 2.0]
    assert result.kl is not None
    assert result.kl.tolist() == pytest.approx([VALUE[kind](-0.5, -1.0), VALUE[kind](-2.0, -1.0)])


def test_without_a_coefficient_no_reference_is_needed() -> None:
    tokens = make_tokens([-0.5, -2.0], [1.0, -2.0])
    result = Objective(NoTrustRegion(), ReferenceKL())(tokens, None)
    assert result.loss.tolist() == [-1.0, 2.0]
    assert result.kl is None


def test_the_entropy_bonus_lowers_the_loss_and_pulls_entropy_up() -> None:
    tokens = make_tokens([-0.5, -2.0], [1.0, -2.0], entropy=[0.5, 2.0])
    result = Objective(NoTrustRegion(), ReferenceKL(), entropy_coefficient=0.1)(tokens, None)
    (slope,) = torch.autograd.grad(result.loss.sum(), tokens.entropy)
    assert result.loss.tolist() == pytest.approx([-1.0 - 0.05, 2.0 - 0.2])
    assert slope.tolist() == pytest.approx([-0.1, -0.1])  # a descent step raises entropy


def test_without_a_bonus_entropy_has_no_gradient() -> None:
    tokens = make_tokens([-0.5], [1.0], entropy=[0.5])
    result = Objective(NoTrustRegion(), ReferenceKL())(tokens, None)
    assert torch.autograd.grad(result.loss.sum(), tokens.entropy, allow_unused=True) == (None,)


def test_an_entropy_bonus_without_entropy_is_an_error() -> None:
    objective = Objective(NoTrustRegion(), ReferenceKL(), entropy_coefficient=0.1)
    with pytest.raises(ConfigError, match="entropy of every token"):
        objective(make_tokens([-0.5], [1.0]), None)


@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_coefficients_below_zero_are_refused(value: float) -> None:
    with pytest.raises(ConfigError, match=r"model\.kl\.coefficient must be >= 0"):
        ReferenceKL(value)
    with pytest.raises(ConfigError, match="entropy_coefficient must be >= 0"):
        Objective(NoTrustRegion(), ReferenceKL(), value)


def test_the_settings_of_kl_cannot_be_changed_in_a_run() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ReferenceKL().coefficient = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("needs", "k", "scope", "reason"),
    [
        ({"logits"}, 0, "token", r"needs must be among .* got \['logits'\]"),
        ({"topk"}, 0, "token", "set k to how many ids"),
        ({"topk", "full"}, 4, "token", "choose one of them"),
        ({"full"}, 0, "sequence", 'its scope must be "token"'),
    ],
)
def test_a_region_that_asks_for_what_cannot_be_given_is_refused(
    needs: set[str], k: int, scope: str, reason: str
) -> None:
    region = TrustRegion()
    region.needs, region.k, region.scope = frozenset(needs), k, scope  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=reason):
        Objective(region, ReferenceKL())
