"""The head over a wide vocabulary, in float32 and with bf16 products, against full logits in double precision.

Wide: several pieces of the vocabulary in a product, and chunks that hold more tokens than the workspace of their sums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import dppo_lightning.train.projection
from dppo_lightning.base.batch import TrainingBatch
from dppo_lightning.base.errors import ConfigError
from dppo_lightning.train.head import HeadOutput, PolicyHead
from dppo_lightning.train.logits import LogitTransform, Tables
from dppo_lightning.train.objective import Objective, ReferenceKL
from dppo_lightning.trust_region import FullKL, FullTV, NoTrustRegion, TokenStats

TOKENS, WIDTH, VOCABULARY = 300, 16, 9000
MODES = ("float32", "bf16 weights", "bf16 autocast")
TOLERANCE = {"float32": 1e-5, "bf16 weights": 5e-3, "bf16 autocast": 5e-3}  # norms; a bf16 has 8 bits: 2^-9 each
TRANSFORMS = {"plain": LogitTransform(), "all": LogitTransform(scale=0.7, softcap=3.0, temperature=0.8)}
OBJECTIVES = {
    "many tokens": Objective(NoTrustRegion(), ReferenceKL()),
    "few tokens": Objective(NoTrustRegion(), ReferenceKL()),
    "entropy": Objective(NoTrustRegion(), ReferenceKL(), entropy_coefficient=2.0),
}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_head(mode: str, bias: bool, transform: str = "plain", logits_mib: int = 64) -> PolicyHead:
    head = PolicyHead(nn.Linear(WIDTH, VOCABULARY, bias=bias), TRANSFORMS[transform], logits_mib)
    head.weight.data = 0.5 * random(VOCABULARY, WIDTH, seed=1)
    if head.bias is not None:
        head.bias.data = random(VOCABULARY, seed=2)
    return head.bfloat16() if mode == "bf16 weights" else head


def make_hidden(mode: str) -> Tensor:
    hidden = random(TOKENS, WIDTH, seed=3)
    return hidden.bfloat16() if mode == "bf16 weights" else hidden


@contextmanager
def precision(mode: str) -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "bf16 autocast"):
        yield


def in_double(mode: str, head: PolicyHead, hidden: Tensor) -> tuple[list[Tensor], Tensor]:
    """Hidden states, weight and bias as the products see them, in double precision, and [N, V] log-probs of them."""
    seen = [hidden, head.weight] if mode == "float32" else [hidden.bfloat16(), head.weight.bfloat16()]
    leaves = [x.detach().double().requires_grad_() for x in (*seen, *([] if head.bias is None else [head.bias]))]
    z = nn.functional.linear(*leaves) * head.transform.scale
    if head.transform.softcap is not None:
        z = head.transform.softcap * torch.tanh(z / head.transform.softcap)
    return leaves, (z / head.transform.temperature).log_softmax(dim=-1)


def make_batch(table: Tensor, few: bool) -> TrainingBatch:
    """Likely targets, and ratios around 1."""
    targets = table.detach().exp().multinomial(1, generator=torch.Generator().manual_seed(4)).squeeze(1)
    places, logp = torch.arange(TOKENS), table.detach().gather(1, targets[:, None]).squeeze(1)
    advantage = random(TOKENS, seed=5)
    return TrainingBatch(
        input_ids=torch.zeros(2, 4, dtype=torch.int64),
        predict_index=places,
        targets=targets,
        rollout_logp=(logp.float() + 0.2 * random(TOKENS, seed=6)).clamp(max=0),
        advantage=torch.where(places % 3 > 0, 0.0, advantage) if few else advantage,
        weight=random(TOKENS, seed=7).abs() / TOKENS,
        sequence=torch.zeros(TOKENS, dtype=torch.int64),
        position=places,
        version=torch.zeros(TOKENS, dtype=torch.int64),
        step=0,
        real_tokens=8,
    )


def sampled(table: Tensor, batch: TrainingBatch) -> Tensor:
    return table.gather(1, batch.targets[:, None]).squeeze(1)


def entropy_in_double(table: Tensor) -> Tensor:
    return -(table.exp() * table).sum(dim=-1)


def loss_in_double(table: Tensor, batch: TrainingBatch, objective: Objective) -> Tensor:
    tokens = TokenStats(
        logp=sampled(table, batch),
        rollout_logp=batch.rollout_logp.double(),
        advantage=batch.advantage.double(),
        entropy=entropy_in_double(table),
    )
    return (batch.weight.double() * objective(tokens, None).loss).sum()


def assert_near(mine: Tensor, wanted: Tensor, tolerance: float) -> None:
    """By the norm of the difference: of the whole, and of each tenth, so that no piece can be missing or turned."""
    size = -(-len(wanted) // 10)
    for part, reference in zip((mine, *mine.split(size)), (wanted, *wanted.split(size)), strict=True):
        assert (part - reference).norm() <= tolerance * reference.norm()


@pytest.mark.parametrize(("bias", "transform"), [(False, "plain"), (True, "all")])
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_full_logits_in_double_precision(
    mode: str, name: str, bias: bool, transform: str
) -> None:
    head, hidden = make_head(mode, bias, transform, logits_mib=6), make_hidden(mode).requires_grad_()
    assert [rows.stop - rows.start for rows in head.chunks(TOKENS)] == [150, 150]
    assert len(Tables(150, head.weight).scratch) < 150
    leaves, table = in_double(mode, head, hidden)
    batch = make_batch(table, few=name != "many tokens")
    exact = loss_in_double(table, batch, OBJECTIVES[name])
    wanted = torch.autograd.grad(exact, leaves)

    with precision(mode):
        output: HeadOutput = head(hidden, batch, OBJECTIVES[name])
    mine = torch.autograd.grad(output.loss, [hidden, *head.parameters()])

    torch.testing.assert_close(output.loss.double(), exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.logp.double(), sampled(table, batch), rtol=0, atol=1e-4)
    torch.testing.assert_close(output.entropy.double(), entropy_in_double(table), rtol=0, atol=1e-4)
    for gradient, reference, leaf in zip(mine, wanted, [hidden, *head.parameters()], strict=True):
        assert gradient.dtype == leaf.dtype
        assert_near(gradient.double(), reference, TOLERANCE[mode])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_scoring_gives_the_log_probs_of_full_logits(mode: str, bias: bool) -> None:
    head, hidden = make_head(mode, bias), make_hidden(mode)
    _, table = in_double(mode, head, hidden)
    batch = make_batch(table, few=False)
    with precision(mode):
        logp = head(hidden, batch)
    torch.testing.assert_close(logp.double(), sampled(table, batch), rtol=0, atol=1e-4)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_scoring_and_training_agree_on_log_probs(
    mode: str, bias: bool, rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``rounded`` is how a GPU multiplies: the product is a bf16, to which no bias is added."""
    if rounded:
        monkeypatch.setattr(dppo_lightning.train.projection, "sums_in_float32", lambda dtype, device: False)
    head, hidden = make_head(mode, bias), make_hidden(mode)
    batch = make_batch(in_double(mode, head, hidden)[1], few=False)
    with precision(mode):
        scored = head(hidden, batch)
        trained = head(hidden.requires_grad_(), batch, OBJECTIVES["many tokens"])
    torch.testing.assert_close(trained.logp, scored, rtol=0, atol=2e-6)
    if rounded:
        dtype = torch.float32 if mode == "float32" else torch.bfloat16
        product = (hidden.detach().to(dtype) @ head.weight.detach().to(dtype).t()).double()
        table = (product if head.bias is None else product + head.bias.detach().double()).log_softmax(dim=-1)
        torch.testing.assert_close(scored.double(), sampled(table, batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_divergences_of_whole_vocabularies_are_those_of_full_logits(mode: str) -> None:
    head, hidden, moved = make_head(mode, bias=True, logits_mib=16), make_hidden(mode), random(TOKENS, WIDTH, seed=8)
    assert len(Tables(TOKENS, head.weight).scratch) < 0.5 * TOKENS
    _, old = in_double(mode, head, hidden)
    new_hidden = hidden + 0.3 * moved.to(hidden.dtype)
    _, new = in_double(mode, head, new_hidden)
    batch = dataclasses.replace(make_batch(new, few=False), rollout_hidden=hidden)
    with precision(mode):
        head.remember_rollout()
        tv = head(new_hidden, batch, Objective(FullTV(), ReferenceKL()), {"full_kl": FullKL()})
    torch.testing.assert_close(tv.divergence.double(), (old.exp() - new.exp()).abs().sum(-1) / 2, rtol=0, atol=1e-5)
    kl = (old.exp() * (old - new)).sum(-1)
    torch.testing.assert_close(tv.diagnostics["full_kl"].double(), kl, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_the_head_does_not_depend_on_the_default_dtype(mode: str) -> None:
    """It is bf16 in Lightning's forward context of "bf16-true"."""
    head, hidden = make_head(mode, bias=True), make_hidden(mode)
    batch = make_batch(in_double(mode, head, hidden)[1], few=False)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            with precision(mode):
                output = head(hidden.clone().requires_grad_(), batch, OBJECTIVES["entropy"])
                found.append((head(hidden, batch), output.logp, output.entropy, output.loss.detach()))
        finally:
            torch.set_default_dtype(torch.float32)
    for coarse, fine in zip(*found, strict=True):
        assert coarse.dtype == torch.float32
        assert torch.equal(coarse, fine)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_loss_in_float16_is_refused_and_scoring_is_not(autocast: bool) -> None:
    head, hidden = make_head("float32", bias=True), make_hidden("float32")
    batch = make_batch(in_double("float32", head, hidden)[1], few=False)
    exact = head(hidden, batch)
    if not autocast:
        head.half()
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        torch.testing.assert_close(head(hidden, batch), exact, rtol=0, atol=0.02)
        with pytest.raises(ConfigError, match="bf16-mixed") as caught:
            head(hidden.requires_grad_(), batch, OBJECTIVES["many tokens"])
    assert "\n" not in str(caught.value)
