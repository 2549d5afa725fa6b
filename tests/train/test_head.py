"""The head against full logits and plain autograd."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import dppo_lightning.train.logits
from dppo_lightning.base.batch import TrainingBatch
from dppo_lightning.train.head import PolicyHead
from dppo_lightning.train.logits import LogitTransform
from dppo_lightning.train.objective import Objective, ReferenceKL
from dppo_lightning.trust_region import BinaryKL, BinaryTV, NoTrustRegion, PPOClip, Surrogate, TokenStats, TrustRegion
from dppo_lightning.trust_region.divergence import DivergenceMask

TOKENS, WIDTH, VOCABULARY = 37, 16, 211


def make_batch(tokens: int = TOKENS, seed: int = 0) -> TrainingBatch:
    g = torch.Generator().manual_seed(seed)
    half = tokens // 2
    return TrainingBatch(
        input_ids=torch.zeros(2, 4, dtype=torch.int64),
        predict_index=torch.arange(tokens),
        targets=torch.randint(VOCABULARY, (tokens,), generator=g),
        rollout_logp=-6 * torch.rand(tokens, generator=g),
        advantage=torch.randn(tokens, generator=g),
        weight=torch.rand(tokens, generator=g),
        sequence=torch.tensor([0] * half + [1] * (tokens - half)),
        position=torch.tensor([*range(half), *range(tokens - half)]),
        version=torch.zeros(tokens, dtype=torch.int64),
        step=0,
        real_tokens=8,
        reference_logp=-6 * torch.rand(tokens, generator=g),
    )


def make_head(chunk_tokens: int | None, bias: bool = False, transform: LogitTransform | None = None) -> PolicyHead:
    torch.manual_seed(1)
    head = PolicyHead(nn.Linear(WIDTH, VOCABULARY, bias=bias), transform or LogitTransform())
    if chunk_tokens is not None:
        head.chunks = lambda n: (slice(i, min(i + chunk_tokens, n)) for i in range(0, max(n, 1), chunk_tokens))  # type: ignore[method-assign]
    return head


def full_logits(head: PolicyHead, hidden: Tensor) -> Tensor:
    """The same logits written as the formula says, in plain autograd."""
    z = nn.functional.linear(hidden, head.weight, head.bias) * head.transform.scale
    if head.transform.softcap is not None:
        z = head.transform.softcap * torch.tanh(z / head.transform.softcap)
    return z / head.transform.temperature


def full_loss(head: PolicyHead, hidden: Tensor, batch: TrainingBatch, objective: Objective) -> Tensor:
    table = full_logits(head, hidden).log_softmax(dim=-1)
    tokens = TokenStats(
        logp=table[torch.arange(len(hidden)), batch.targets],
        rollout_logp=batch.rollout_logp,
        advantage=batch.advantage,
        entropy=-(table.exp() * table).sum(dim=-1),
        sequence=batch.sequence,
        position=batch.position,
    )
    return (batch.weight * objective(tokens, batch.reference_logp).loss).sum()


class SequenceRatio(TrustRegion):
    """A region whose every token's loss depends on all tokens."""

    scope = "sequence"

    def forward(self, tokens: TokenStats) -> Surrogate:
        ratio = (tokens.logp - tokens.rollout_logp).mean().exp()
        return Surrogate(-tokens.advantage * ratio, torch.ones_like(tokens.logp, dtype=torch.bool))


OBJECTIVES = {
    "binary_tv": Objective(BinaryTV(0.05), ReferenceKL()),
    "binary_kl": Objective(BinaryKL(0.01), ReferenceKL()),
    "ppo": Objective(PPOClip(), ReferenceKL()),
    "capped": Objective(NoTrustRegion(max_ratio=2.0), ReferenceKL()),
    "kl_k1": Objective(BinaryTV(), ReferenceKL(0.3, "k1")),
    "kl_k2": Objective(BinaryTV(), ReferenceKL(0.3, "k2")),
    "kl_k3": Objective(BinaryTV(), ReferenceKL(0.3, "k3")),
    "entropy": Objective(BinaryTV(), ReferenceKL(), entropy_coefficient=0.2),
    "sequence": Objective(SequenceRatio(), ReferenceKL(0.1), entropy_coefficient=0.1),
}
TRANSFORMS = {
    "plain": LogitTransform(),
    "all": LogitTransform(scale=0.7, softcap=3.0, temperature=0.8),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradients_equal_those_of_full_logits(name: str, bias: bool, transform: str) -> None:
    batch, objective = make_batch(), OBJECTIVES[name]
    head = make_head(8, bias, TRANSFORMS[transform])
    hidden = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(2))
    mine, plain = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    expected = full_loss(head, plain, batch, objective)
    parameters = list(head.parameters())
    reference = torch.autograd.grad(expected, [plain, *parameters])

    output = head(mine, batch, objective)
    gradients = torch.autograd.grad(3.0 * output.loss, [mine, *parameters])

    torch.testing.assert_close(output.loss, expected.detach(), rtol=1e-5, atol=1e-5)
    for gradient, wanted in zip(gradients, reference, strict=True):
        torch.testing.assert_close(gradient, 3.0 * wanted, rtol=1e-4, atol=1e-5)  # fp32 sums in another order


@pytest.mark.parametrize("name", OBJECTIVES)
def test_chunked_equals_unchunked(name: str) -> None:
    batch, hidden = make_batch(), torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(2))
    results = []
    for chunk in (None, 1, 5):
        head = make_head(chunk)
        leaf = hidden.clone().requires_grad_()
        output = head(leaf, batch, OBJECTIVES[name])
        output.loss.backward()
        results.append((leaf.grad, head.weight.grad, output))
    for grad, weight_grad, output in results[1:]:
        torch.testing.assert_close(grad, results[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(weight_grad, results[0][1], rtol=1e-5, atol=1e-6)
        assert torch.equal(output.keep, results[0][2].keep)
        torch.testing.assert_close(output.entropy, results[0][2].entropy)


def test_no_objective_gives_log_probs_without_gradient() -> None:
    batch, head = make_batch(), make_head(8, transform=LogitTransform(temperature=0.5))
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    logp = head(hidden, batch)
    expected = full_logits(head, hidden).log_softmax(-1)[torch.arange(TOKENS), batch.targets]
    assert not logp.requires_grad
    torch.testing.assert_close(logp, expected.detach())


def test_an_empty_micro_batch_is_a_connected_zero() -> None:
    head, hidden = make_head(8), torch.randn(0, WIDTH, requires_grad=True)
    output = head(hidden, make_batch(0), OBJECTIVES["binary_tv"])
    output.loss.backward()
    assert output.loss.item() == 0
    assert head.weight.grad is not None
    assert not head.weight.grad.any()
    assert hidden.grad is not None


def test_an_empty_micro_batch_is_a_connected_zero_for_a_sequence_region() -> None:
    head, hidden = make_head(8), torch.randn(0, WIDTH, requires_grad=True)
    output = head(hidden, make_batch(0), Objective(BinarySequence(), ReferenceKL()))
    output.loss.backward()
    assert not head.weight.grad.any()


class BinarySequence(BinaryTV):
    scope = "sequence"


def test_bf16_products_leave_statistics_in_fp32() -> None:
    batch = make_batch()
    head, hidden = make_head(8), torch.randn(TOKENS, WIDTH)
    exact = head(hidden, batch, OBJECTIVES["binary_tv"])
    coarse = head.bfloat16()(hidden.bfloat16().requires_grad_(), batch, OBJECTIVES["binary_tv"])
    assert coarse.logp.dtype == torch.float32
    assert coarse.loss.dtype == torch.float32
    torch.testing.assert_close(coarse.logp, exact.logp, atol=0.05, rtol=0)  # 8 bits of mantissa on logits of order 1
    coarse.loss.backward()
    assert head.weight.grad.dtype == torch.bfloat16


def test_logits_of_bf16_products_are_not_rounded_to_bf16() -> None:
    """Logits of order 10, where rounded ones would put a token's entropy off by 1e-3 and more."""
    allowed = torch.backends.mkldnn.matmul.fp32_precision
    batch, head = make_batch(), make_head(8)
    head.weight.data = torch.randn(VOCABULARY, WIDTH).bfloat16()
    hidden = torch.randn(TOKENS, WIDTH).bfloat16()
    table = (hidden.float() @ head.weight.detach().float().t()).log_softmax(-1)
    entropy = -(table.exp() * table).sum(dim=-1)
    logp = table[torch.arange(TOKENS), batch.targets]
    output = head(hidden.requires_grad_(), batch, OBJECTIVES["binary_tv"])
    torch.testing.assert_close(output.entropy, entropy, rtol=0, atol=1e-4)
    torch.testing.assert_close(output.logp, logp, rtol=0, atol=1e-4)
    torch.testing.assert_close(head(hidden, batch), logp, rtol=0, atol=1e-4)
    assert torch.backends.mkldnn.matmul.fp32_precision == allowed


def test_entropy_is_computed_when_asked_for_or_needed() -> None:
    batch, head, hidden = make_batch(), make_head(8), torch.randn(TOKENS, WIDTH)
    asked = head(hidden, batch, OBJECTIVES["binary_tv"])
    spared = head(hidden, batch, OBJECTIVES["binary_tv"], entropy=False)
    needed = head(hidden, batch, OBJECTIVES["entropy"], entropy=False)
    assert spared.entropy is None
    assert torch.equal(spared.logp, asked.logp)
    assert torch.equal(needed.entropy, asked.entropy)
    assert head(hidden, batch, OBJECTIVES["sequence"], entropy=False).entropy is not None  # has an entropy bonus


def test_under_autocast_products_are_bf16_and_gradients_keep_the_parameters_dtype() -> None:
    batch, head = make_batch(), make_head(8)
    hidden = torch.randn(TOKENS, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        output = head(hidden.bfloat16().requires_grad_(), batch, OBJECTIVES["binary_tv"])
    output.loss.backward()
    rounded = PolicyHead(nn.Linear(WIDTH, VOCABULARY, bias=False), LogitTransform())
    rounded.weight.data = head.weight.detach().bfloat16()
    assert torch.equal(output.logp, rounded(hidden.bfloat16(), batch, OBJECTIVES["binary_tv"]).logp)
    assert head.weight.grad.dtype == torch.float32


def test_tied_weights_receive_both_gradients() -> None:
    embedding = nn.Embedding(VOCABULARY, WIDTH)
    projection = nn.Linear(WIDTH, VOCABULARY, bias=False)
    projection.weight = embedding.weight
    head, batch = PolicyHead(projection, LogitTransform()), make_batch()
    ids = torch.arange(TOKENS)
    head(embedding(ids), batch, OBJECTIVES["binary_tv"]).loss.backward()
    mine = embedding.weight.grad.clone()
    embedding.weight.grad = None
    full_loss(head, embedding(ids), batch, OBJECTIVES["binary_tv"]).backward()
    torch.testing.assert_close(mine, embedding.weight.grad, rtol=1e-4, atol=1e-5)


class TopKProbe(DivergenceMask):
    """Records the top-K statistics that it is given."""

    needs = frozenset({"topk"})
    k = 3

    def divergence(self, tokens: TokenStats) -> Tensor:
        self.seen = tokens
        return torch.zeros_like(tokens.logp)


def test_topk_log_probs_are_gathered_by_id() -> None:
    batch, head = make_batch(), make_head(None)
    ids = torch.randint(VOCABULARY, (TOKENS, 4))
    batch = dataclasses.replace(batch, topk_ids=ids, rollout_topk_logp=torch.full((TOKENS, 4), -1.0))
    hidden, region = torch.randn(TOKENS, WIDTH), TopKProbe(0.1)
    head(hidden, batch, Objective(region, ReferenceKL()))
    expected = full_logits(head, hidden).log_softmax(-1).gather(1, ids)
    torch.testing.assert_close(region.seen.topk_logp, expected.detach())


class FullProbe(TopKProbe):
    needs = frozenset({"full"})


def test_full_regions_see_both_whole_distributions() -> None:
    batch, head = make_batch(), make_head(None)
    old_hidden, hidden = torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, WIDTH)
    head.remember_rollout()
    old = full_logits(head, old_hidden).log_softmax(-1).detach()
    with torch.no_grad():
        head.weight.add_(0.1)
    batch = dataclasses.replace(batch, rollout_hidden=old_hidden)
    region = FullProbe(0.1)
    head(hidden, batch, Objective(region, ReferenceKL()))
    torch.testing.assert_close(region.seen.rollout_topk_logp, old)
    torch.testing.assert_close(region.seen.topk_logp, full_logits(head, hidden).log_softmax(-1).detach())


def test_diagnostics_are_measured_beside_the_region() -> None:
    batch, head = make_batch(), make_head(8)
    output = head(torch.randn(TOKENS, WIDTH), batch, OBJECTIVES["ppo"], {"binary_tv": BinaryTV()})
    expected = (output.logp.exp() - batch.rollout_logp.exp()).abs()
    torch.testing.assert_close(output.diagnostics["binary_tv"], expected)


def test_a_chunk_is_as_large_as_the_memory_budget_allows_and_at_least_one_token() -> None:
    head = PolicyHead(nn.Linear(2, 1 << 18), LogitTransform(), logits_mib=4)
    assert [rows.stop - rows.start for rows in head.chunks(9)] == [3, 3, 3]  # no short one at the end
    tight = PolicyHead(nn.Linear(2, 1 << 20), LogitTransform(), logits_mib=1)
    assert [rows.stop - rows.start for rows in tight.chunks(2)] == [1, 1]


def test_tokens_without_a_gradient_take_no_part_in_the_products() -> None:
    batch, head = make_batch(), make_head(8)
    batch = dataclasses.replace(batch, advantage=torch.where(torch.arange(TOKENS) % 3 > 0, 0.0, batch.advantage))
    objective = Objective(NoTrustRegion(), ReferenceKL())
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    plain = torch.autograd.grad(full_loss(head, hidden, batch, objective), [hidden, head.weight])
    mine = torch.autograd.grad(head(hidden, batch, objective).loss, [hidden, head.weight])
    for gradient, wanted in zip(mine, plain, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6)
    assert not mine[0][batch.advantage == 0].any()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_frozen_projection_costs_no_weight_gradient(
    bias: bool, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, head, hidden = make_batch(), make_head(8, bias), torch.randn(TOKENS, WIDTH, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        (wanted,) = torch.autograd.grad(head(hidden, batch, OBJECTIVES["ppo"]).loss, hidden)
    sums: list[str] = []
    monkeypatch.setattr(Tensor, "addmm_", lambda *_, **__: sums.append("fp32"))
    monkeypatch.setattr(dppo_lightning.train.logits, "_add_rounded", lambda *_: sums.append("bf16"))
    for trains in (True, False):
        head.requires_grad_(trains)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = head(hidden, batch, OBJECTIVES["ppo"]).loss
        assert (len(sums) == 5) == trains  # one a chunk
        sums.clear()
    loss.backward()
    torch.testing.assert_close(hidden.grad, wanted)
    assert head.weight.grad is None


def test_the_loss_can_be_differentiated_once() -> None:
    head = make_head(8)
    loss = head(torch.randn(TOKENS, WIDTH, requires_grad=True), make_batch(), OBJECTIVES["ppo"]).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        loss.backward()


def test_gradients_are_within_1e_5_of_double_precision() -> None:
    batch, head = make_batch(), make_head(8)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    exact_hidden, weight = hidden.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()
    table = (exact_hidden @ weight.t()).log_softmax(dim=-1)
    tokens = TokenStats(
        logp=table[torch.arange(TOKENS), batch.targets],
        rollout_logp=batch.rollout_logp.double(),
        advantage=batch.advantage.double(),
    )
    exact = (batch.weight.double() * NoTrustRegion()(tokens).loss).sum()
    wanted = torch.autograd.grad(exact, [exact_hidden, weight])
    mine = torch.autograd.grad(
        head(hidden, batch, Objective(NoTrustRegion(), ReferenceKL())).loss, [hidden, head.weight]
    )
    for gradient, reference in zip(mine, wanted, strict=True):
        assert (gradient - reference).norm() < 1e-5 * reference.norm()
