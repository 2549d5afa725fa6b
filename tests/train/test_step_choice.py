"""A region that chooses among a step's tokens chooses among all of them, however the step is split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from dppo_lightning.base.batch import TrainingBatch, pack
from dppo_lightning.base.records import Sequence as TrainingSequence
from dppo_lightning.train.head import HeadOutput
from dppo_lightning.train.hooks import RunCallback
from dppo_lightning.train.scoring import choose_over_step, statistics
from dppo_lightning.trust_region import (
    BinaryTV,
    Combined,
    CovarianceClip,
    CovarianceKL,
    Surrogate,
    TokenStats,
    TokenStatsError,
    TrustRegion,
    weighted_surrogate,
)
from tests.helpers.runs import Letters, Run, fit, sgd

FRACTION = 0.2


@dataclass
class Tokens(RunCallback):
    """Micro-batches with what the head made of them, by optimizer step."""

    steps: list[list[tuple[TrainingBatch, HeadOutput]]] = field(default_factory=list)

    def on_tokens(self, trainer: Any, pl_module: Any, batch: TrainingBatch, output: HeadOutput) -> None:
        if len(self.steps) == trainer.global_step:
            self.steps.append([])
        self.steps[trainer.global_step].append((batch, output))


def picked_by_hand(tokens: list[tuple[float, float]]) -> list[bool]:
    """(A, log pi) of all tokens of a step: the fifth with the largest covariance, if positive."""
    advantages, logps = np.array(tokens, np.float64).T
    covariance = np.where(advantages == 0, 0.0, (advantages - advantages.mean()) * (logps - logps.mean()))
    least = np.sort(covariance)[-max(1, int(FRACTION * len(tokens)))]
    return ((covariance >= least) & (covariance > 0)).tolist()


def run(policy: str, region: TrustRegion, parts: int) -> tuple[Run, Tokens]:
    """Two steps on one rollout. KL-Cov's engine is coarse: where pi equals mu, |log pi - log mu| slopes by rounding."""
    seen = Tokens()
    dtype = "bfloat16" if isinstance(region, CovarianceKL) else "float32"
    done = fit(
        policy,
        {"trust_region": region, "optimizer": sgd(0.5), "shared_prompts": False},
        {"prompts": Letters(6), "steps_per_rollout": 2, "prompts_per_step": 2, "rollout_dtype": dtype},
        callbacks=[seen],
        max_steps=2,
        accumulate_grad_batches=parts,
    )
    return done, seen


@pytest.mark.parametrize("region", [CovarianceClip(FRACTION), CovarianceKL(FRACTION)], ids=["clip", "kl"])
def test_choice_and_update_do_not_depend_on_the_number_of_micro_batches(
    region: TrustRegion, tiny_policy_dir: str
) -> None:
    whole, _ = run(tiny_policy_dir, region, 1)
    for parts in (2, 4):
        split, seen = run(tiny_policy_dir, region, parts)
        assert [len(step) for step in seen.steps] == [parts, parts]
        assert split.metrics.of("train/masked_share") == pytest.approx(whole.metrics.of("train/masked_share"))
        for name, weight in whole.weights.items():
            torch.testing.assert_close(split.weights[name], weight, rtol=0, atol=1e-5)


def test_the_choice_is_that_of_the_whole_step_under_its_first_weights(tiny_policy_dir: str) -> None:
    """The second step of a rollout meets weights that the rollout's tokens were not sampled with."""
    _, seen = run(tiny_policy_dir, CovarianceClip(FRACTION), 3)
    assert len(seen.steps) == 2
    for step in seen.steps:
        tokens = [
            pair for batch, output in step for pair in zip(batch.advantage.tolist(), output.logp.tolist(), strict=True)
        ]
        stopped = [not keep for _, output in step for keep in output.keep.tolist()]
        assert stopped == picked_by_hand(tokens)
        assert 0 < sum(stopped) < len(stopped)
    moved = torch.cat([output.logp - batch.rollout_logp for batch, output in seen.steps[1]])
    assert moved.abs().max() > 1e-3, "the second step met the rollout's own weights"


def sequence(tokens: int, advantage: float) -> TrainingSequence:
    return TrainingSequence(
        token_ids=np.arange(tokens + 1),
        generated=np.arange(1, tokens + 1),
        rollout_logp=np.full(tokens, -1.0, np.float32),
        versions=np.zeros(tokens, np.int64),
        advantage=advantage,
    )


def step_of(parts: Sequence[Sequence[TrainingSequence]]) -> list[TokenStats]:
    logps = iter(np.random.default_rng(0).normal(-1, 0.3, 100).astype(np.float32))
    batches = [pack(list(part), np.ones(len(part))) for part in parts]
    return [statistics(b, torch.tensor([next(logps) for _ in range(b.tokens)])) for b in batches]


class Seen(TrustRegion):
    """Chooses every sequence's first token."""

    needs = frozenset({"chosen"})

    def choose(self, tokens: TokenStats) -> torch.Tensor:
        self.seen = tokens
        return tokens.position == 0

    def forward(self, tokens: TokenStats) -> Surrogate:
        return weighted_surrogate(tokens, tokens.chosen)


def test_every_micro_batch_gets_its_own_part_and_one_without_tokens_gets_none() -> None:
    region = Seen()
    parts = [[sequence(3, 1.0), sequence(1, -1.0)], [], [sequence(2, 0.5)]]
    chosen = choose_over_step(region, step_of(parts))
    assert [one.tolist() for one in chosen] == [[True, False, False, True], [], [True, False]]
    assert region.seen.sequence is not None
    assert region.seen.sequence.tolist() == [0, 0, 0, 1, 2, 2]
    assert [one.tolist() for one in choose_over_step(region, step_of([[], []]))] == [[], []]


def test_the_same_tokens_in_another_order_give_the_same_choice() -> None:
    """Which tokens come first depends on ranks and micro-batches."""
    (tokens,) = step_of([[sequence(5, 1.0), sequence(4, -0.7), sequence(7, 0.3)]])
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    shuffled = TokenStats(tokens.logp[order], tokens.rollout_logp[order], tokens.advantage[order])
    for region in (CovarianceClip(0.3), Combined([CovarianceClip(0.3), CovarianceClip(0.1), BinaryTV()])):
        assert torch.equal(region.choose(shuffled), region.choose(tokens)[order])


def test_tokens_that_tie_are_chosen_together_whichever_comes_first() -> None:
    logp, advantage = torch.tensor([-0.1, -0.1, -0.1, -3.0, -3.0]), torch.tensor([1.0, 1.0, 1.0, -1.0, 1.0])
    chosen = CovarianceClip(0.2).choose(TokenStats(logp, logp, advantage))
    assert chosen.tolist() == [False, False, False, True, False]
    # the same tokens in two completions of a prompt: rounding tells them apart, and depends on the micro-batch
    logp, advantage = torch.tensor([-0.1, -0.1 - 3e-7, -3.0, -3.0 + 5e-7]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    assert CovarianceClip(0.25).choose(TokenStats(logp, logp, advantage)).tolist() == [True] * 4


@pytest.mark.parametrize("wrong", [torch.zeros(5, dtype=torch.bool), torch.zeros(6)], ids=["short", "no bools"])
def test_a_choice_that_is_not_one_bool_for_each_token_is_refused(wrong: torch.Tensor) -> None:
    region = Seen()
    region.choose = lambda tokens: wrong  # type: ignore[method-assign]
    with pytest.raises(TokenStatsError, match=r"Seen\.choose must return a bool for each of 6 tokens"):
        choose_over_step(region, step_of([[sequence(6, 1.0)]]))


def test_a_region_that_chooses_is_given_its_choice_or_an_error() -> None:
    (tokens,) = step_of([[sequence(6, 1.0)]])
    for region in (CovarianceClip(), Combined([CovarianceClip(), BinaryTV()])):
        with pytest.raises(TokenStatsError, match="needs chosen, which TokenStats does not have"):
            region(tokens)


class Ageing(BinaryTV):
    """Keeps the age of every token that it is asked about, one entry for each call."""

    needs = frozenset({"age"})

    def __init__(self) -> None:
        super().__init__()
        self.ages: list[list[int]] = []

    def forward(self, tokens: TokenStats) -> Surrogate:
        assert tokens.age is not None
        self.ages.append(tokens.age.unique().tolist())
        return super().forward(tokens)


def test_a_region_is_told_how_old_each_token_is(tiny_policy_dir: str) -> None:
    region = Ageing()
    fit(tiny_policy_dir, {"trust_region": region, "optimizer": sgd(0.1)}, {"steps_per_rollout": 2}, max_steps=4)
    assert region.ages == [[0], [1], [0], [1]]
