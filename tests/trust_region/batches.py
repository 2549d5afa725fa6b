"""Batches of generated tokens as plain Python numbers, and the TokenStats that a region is given for them."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch

from dppo_lightning.trust_region import TokenStats


@dataclass(frozen=True)
class Token:
    """One generated token with the two whole distributions that it was drawn from and is trained with."""

    mu: list[float]
    pi: list[float]
    sampled: int
    old: float
    advantage: float
    sequence: int
    position: int

    @property
    def lmu(self) -> float:
        return math.log(self.mu[self.sampled])

    @property
    def lp(self) -> float:
        return math.log(self.pi[self.sampled])

    @property
    def lold(self) -> float:
        return math.log(self.old)

    def top(self, k: int) -> list[int]:
        """mu's k most likely ids, most likely first."""
        return sorted(range(len(self.mu)), key=lambda i: (-self.mu[i], i))[:k]


def softmax(logits: list[float]) -> list[float]:
    largest = max(logits)
    exps = [math.exp(x - largest) for x in logits]
    return [x / sum(exps) for x in exps]


def token_at(mu: float, pi: float, advantage: float, old: float | None = None, vocabulary: int = 12) -> Token:
    """A token with the given probabilities; the others share what is left, unequally."""
    shares = softmax([0.3 * i for i in range(vocabulary - 1)])
    return Token(
        [mu] + [(1 - mu) * share for share in shares],
        [pi] + [(1 - pi) * share for share in reversed(shares)],
        0,
        mu if old is None else old,
        advantage,
        0,
        0,
    )


def in_sequences(tokens: list[Token], lengths: list[int]) -> list[Token]:
    """The tokens dealt to sequences of the given lengths, in order."""
    assert sum(lengths) == len(tokens)
    places = [(sequence, position) for sequence, length in enumerate(lengths) for position in range(length)]
    return [
        Token(token.mu, token.pi, token.sampled, token.old, token.advantage, sequence, position)
        for token, (sequence, position) in zip(tokens, places, strict=True)
    ]


def random_batch(seed: int, lengths: tuple[int, ...] = (9, 1, 14, 6), vocabulary: int = 12, drift: float = 1.0):
    """Tokens sampled from peaked and flat mu; one advantage for each sequence, one of them 0."""
    rng = random.Random(seed)
    tokens = []
    for sequence, length in enumerate(lengths):
        advantage = 0.0 if sequence == 1 else rng.choice([-1, 1]) * rng.uniform(0.2, 2)
        scale = rng.choice([0.5, 2.0, 4.0])
        for position in range(length):
            logits = [scale * rng.gauss(0, 1) for _ in range(vocabulary)]
            mu = softmax(logits)
            pi = softmax([x + drift * rng.choice([0.01, 0.3, 1.0]) * rng.gauss(0, 1) for x in logits])
            sampled = rng.choices(range(vocabulary), mu)[0]
            old = min(mu[sampled] * math.exp(rng.choice([0.02, 0.6]) * rng.gauss(0, 1)), 0.999)
            tokens.append(Token(mu, pi, sampled, old, advantage, sequence, position))
    return tokens


EDGES = [
    (1e-4, 1e-2),
    (1e-2, 1e-4),
    (0.99, 0.80),
    (0.80, 0.99),
    (0.3, 0.3),
    (1e-12, 1e-10),
    (1 - 1e-7, 0.5),
    (0.9, 0.2),
]


def edge_batch() -> list[Token]:
    """Rare and near-certain tokens, both signs of A and A = 0, and a recomputed anchor that disagrees with mu."""
    tokens = []
    for mu, pi in EDGES:
        for advantage in (1.0, -1.5, 0.0):
            # advantages that differ a little, so that no two covariances are tied
            tokens.append(token_at(mu, pi, advantage, old=mu**0.98))
            tokens.append(token_at(mu, pi, advantage * 1.01, old=pi))
            tokens.append(token_at(mu, pi, advantage * 1.02, old=0.05 if mu > 0.5 else 0.6))
    return in_sequences(tokens, [3, 20, 1, len(tokens) - 24])


def stats(
    tokens: list[Token], k: int = 5, full: bool = False, dtype: torch.dtype = torch.float64, requires_grad: bool = True
) -> TokenStats:
    """TokenStats with everything that any region may ask for."""

    def tensor(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64).to(dtype)

    rows_pi, rows_mu = [], []
    for token in tokens:
        ids = list(range(len(token.mu))) if full else token.top(k)
        lpi, lmu = [math.log(token.pi[i]) for i in ids], [math.log(token.mu[i]) for i in ids]
        if not full:
            # whatever stands in an unused slot of pi must not matter
            lpi.append(token.lp)
            lmu.append(-math.inf if token.sampled in ids else token.lmu)
        rows_pi.append(lpi)
        rows_mu.append(lmu)
    return TokenStats(
        logp=tensor([token.lp for token in tokens]).requires_grad_(requires_grad),
        rollout_logp=tensor([token.lmu for token in tokens]),
        advantage=tensor([token.advantage for token in tokens]),
        recomputed_logp=tensor([token.lold for token in tokens]),
        topk_logp=torch.tensor(rows_pi, dtype=torch.float64).to(dtype),
        rollout_topk_logp=torch.tensor(rows_mu, dtype=torch.float64).to(dtype),
        entropy=tensor([-sum(p * math.log(p) for p in token.pi) for token in tokens]),
        sequence=torch.tensor([token.sequence for token in tokens]),
        position=torch.tensor([token.position for token in tokens]),
    )
