"""Every region inside the real head: against full logits and plain autograd, and chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from dppo_lightning.base.batch import TrainingBatch
from dppo_lightning.train.head import HeadOutput, PolicyHead
from dppo_lightning.train.logits import LogitTransform
from dppo_lightning.train.objective import Objective, ReferenceKL
from dppo_lightning.train.scoring import choose_over_step, statistics
from dppo_lightning.trust_region import BinaryTV, FullTV, TokenStats, TokenStatsError, TrustRegion
from dppo_lightning.trust_region.topk import diagnostic_divergences
from tests.trust_region.cases import CASES, DEFAULTS, Case

TOKENS, WIDTH, VOCABULARY = 41, 16, 211
LENGTHS = (17, 1, 23)


def eighths(generator: torch.Generator, *shape: int) -> Tensor:
    """Multiples of 1/8: their dot products are exact in float32, in whatever order a chunk's product sums them."""
    return torch.randint(-8, 9, shape, generator=generator) / 8


@dataclass(frozen=True)
class Scene:
    """A rollout, and a policy that has moved since."""

    batch: TrainingBatch
    hidden: Tensor
    weight: Tensor
    rollout_weight: Tensor
    rollout_table: Tensor  # [N, V] log mu, whole


def scene(region: TrustRegion, seed: int = 0) -> Scene:
    g = torch.Generator().manual_seed(seed)
    rollout_hidden, rollout_weight = eighths(g, TOKENS, WIDTH), eighths(g, VOCABULARY, WIDTH)
    hidden = rollout_hidden + eighths(g, TOKENS, WIDTH) * (torch.rand(TOKENS, 1, generator=g) < 0.5)
    weight = rollout_weight + eighths(g, VOCABULARY, WIDTH) * (torch.rand(VOCABULARY, 1, generator=g) < 0.2)
    table = (rollout_hidden @ rollout_weight.t()).log_softmax(dim=-1)
    sampled = table.exp().multinomial(1, generator=g)
    top = table.topk(region.k or 5, dim=-1)
    inside = (top.indices == sampled).any(dim=-1, keepdim=True)
    rollout_logp = table.gather(1, sampled)
    advantages = torch.tensor([1.3, 0.0, -0.8]).repeat_interleave(torch.tensor(LENGTHS))
    batch = TrainingBatch(
        input_ids=torch.zeros(3, 24, dtype=torch.int64),
        predict_index=torch.arange(TOKENS),
        targets=sampled.squeeze(1),
        rollout_logp=rollout_logp.squeeze(1),
        advantage=advantages,
        weight=torch.full((TOKENS,), 1 / 64),
        sequence=torch.arange(3).repeat_interleave(torch.tensor(LENGTHS)),
        position=torch.cat([torch.arange(length) for length in LENGTHS]),
        version=torch.zeros(TOKENS, dtype=torch.int64),
        step=0,
        real_tokens=72,
        topk_ids=torch.cat([top.indices, sampled], dim=1),
        rollout_topk_logp=torch.cat([top.values, rollout_logp.masked_fill(inside, -torch.inf)], dim=1),
        recomputed_logp=rollout_logp.squeeze(1) + 0.3 * torch.randn(TOKENS, generator=g).clamp(max=0),
        rollout_hidden=rollout_hidden,
    )
    if "chosen" in region.needs:
        logp = (hidden @ weight.t()).log_softmax(dim=-1).gather(1, sampled).squeeze(1)
        (chosen,) = choose_over_step(region, [statistics(batch, logp)])
        batch = replace(batch, chosen=chosen)
    return Scene(batch, hidden, weight, rollout_weight, table)


def through_head(
    case: Case, given: Scene, chunk_tokens: int | None, diagnostics: bool = False
) -> tuple[HeadOutput, Tensor, Tensor]:
    """The head's output, and the gradients of hidden states and weight."""
    head = PolicyHead(nn.Linear(WIDTH, VOCABULARY, bias=False), LogitTransform())
    head.weight.data = given.rollout_weight.clone()
    head.remember_rollout()
    head.weight.data = given.weight.clone()
    if chunk_tokens is not None:
        head.chunks = lambda n: (slice(i, min(i + chunk_tokens, n)) for i in range(0, n, chunk_tokens))  # type: ignore[method-assign]
    hidden = given.hidden.clone().requires_grad_()
    measured = diagnostic_divergences(case.region) if diagnostics else {}
    output = head(hidden, given.batch, Objective(case.region, ReferenceKL()), measured)
    output.loss.backward()
    assert hidden.grad is not None
    assert head.weight.grad is not None
    return output, hidden.grad, head.weight.grad


def by_full_logits(case: Case, given: Scene) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients with every logit at once, in plain autograd."""
    hidden, weight = given.hidden.clone().requires_grad_(), given.weight.clone().requires_grad_()
    table, batch = (hidden @ weight.t()).log_softmax(dim=-1), given.batch
    full = "full" in case.region.needs
    tokens = TokenStats(
        logp=table.gather(1, batch.targets[:, None]).squeeze(1),
        rollout_logp=batch.rollout_logp,
        advantage=batch.advantage,
        recomputed_logp=batch.recomputed_logp,
        topk_logp=(table if full else table.gather(1, batch.topk_ids)).detach(),
        rollout_topk_logp=given.rollout_table if full else batch.rollout_topk_logp,
        sequence=batch.sequence,
        position=batch.position,
        chosen=batch.chosen,
    )
    loss = (batch.weight * case.region(tokens).loss).sum()
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradient_are_those_of_full_logits(case: Case) -> None:
    given = scene(case.region)
    output, hidden_grad, weight_grad = through_head(case, given, 8)
    loss, expected_hidden, expected_weight = by_full_logits(case, given)
    torch.testing.assert_close(output.loss.detach(), loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hidden_grad, expected_hidden, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weight_grad, expected_weight, rtol=1e-4, atol=1e-6)
    assert output.loss.dtype == output.surrogate_loss.dtype == torch.float32


@pytest.mark.parametrize("size", [1, 7, 16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_chunks_give_the_bits_of_the_whole(case: Case, size: int) -> None:
    given = scene(case.region, seed=1)
    whole, hidden_grad, weight_grad = through_head(case, given, None, diagnostics=True)
    parts, parts_hidden_grad, parts_weight_grad = through_head(case, given, size, diagnostics=True)
    for name in ("logp", "surrogate_loss", "token_loss", "keep", "entropy"):
        assert torch.equal(getattr(parts, name), getattr(whole, name)), name
    assert (parts.divergence is None) == (whole.divergence is None)
    assert whole.divergence is None or torch.equal(parts.divergence, whole.divergence)
    for name, divergence in whole.diagnostics.items():
        assert torch.equal(parts.diagnostics[name], divergence), name
    # a token's gradient is a sum over the vocabulary, and the weight's one over chunks: their order differs
    torch.testing.assert_close(parts_hidden_grad, hidden_grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(parts_weight_grad, weight_grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_cheap_divergences_bound_the_exact_ones_from_below_beside_any_region(case: Case) -> None:
    output, _, _ = through_head(case, scene(case.region, seed=2), 8, diagnostics=True)
    measured = output.diagnostics
    for kind in ("tv", "kl"):
        binary, topk, full = (measured[f"{name}_{kind}"] for name in ("binary", "topk", "full"))
        assert (binary <= topk + 1e-5).all()
        assert (topk <= full + 1e-5).all()
        assert (binary < full - 1e-3).any()


@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_an_empty_micro_batch_asks_nothing_of_the_region(case: Case) -> None:
    """Packing no sequence gives no optional statistic either."""
    given = scene(case.region)
    columns = ("targets", "rollout_logp", "advantage", "weight", "sequence", "position", "version", "predict_index")
    optional = ("topk_ids", "rollout_topk_logp", "recomputed_logp", "rollout_hidden", "chosen")
    nothing = {name: getattr(given.batch, name)[:0] for name in columns} | dict.fromkeys(optional)
    empty = replace(given, batch=replace(given.batch, **nothing), hidden=given.hidden[:0])
    output, hidden_grad, weight_grad = through_head(case, empty, None, diagnostics=True)
    assert output.loss.item() == 0
    assert output.keep.shape == output.logp.shape == (0,)
    assert hidden_grad.shape == (0, WIDTH)
    assert not weight_grad.any()


def test_a_policy_that_has_not_moved_has_no_divergence_in_any_precision() -> None:
    case = Case(FullTV(), lambda: ([], []))
    given = scene(case.region)
    head = PolicyHead(nn.Linear(WIDTH, VOCABULARY, bias=True), LogitTransform(temperature=0.7))
    hidden = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", torch.bfloat16):
        head.remember_rollout()
        batch = replace(given.batch, rollout_hidden=hidden.to(head.product_dtype))
        output = head(hidden, batch, Objective(case.region, ReferenceKL()))
    assert head.rollout_weight.dtype == torch.bfloat16
    assert not output.divergence.any()


@pytest.mark.parametrize("lost", ["rollout_hidden", "rollout_weight"])
def test_what_is_missing_of_rollout_time_is_an_error_and_topk_never_stands_in_for_it(lost: str) -> None:
    given = scene(FullTV())
    head = PolicyHead(nn.Linear(WIDTH, VOCABULARY, bias=False), LogitTransform())
    batch = given.batch
    if lost == "rollout_hidden":
        head.remember_rollout()
        batch = replace(batch, rollout_hidden=None)
    with pytest.raises(TokenStatsError, match="rollout_hidden") as refusal:
        head(given.hidden, batch, Objective(FullTV(), ReferenceKL()))
    assert "\n" not in str(refusal.value)


def test_a_diagnostic_without_the_engines_topk_is_an_error() -> None:
    given = scene(BinaryTV())
    batch = replace(given.batch, topk_ids=None, rollout_topk_logp=None)
    head = PolicyHead(nn.Linear(WIDTH, VOCABULARY, bias=False), LogitTransform())
    head.remember_rollout()
    with pytest.raises(TokenStatsError, match="TopKTV needs topk_logp"):
        head(given.hidden, batch, Objective(BinaryTV(), ReferenceKL()), diagnostic_divergences(BinaryTV()))
