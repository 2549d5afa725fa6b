"""Each method re-derived from its paper with plain Python floats and loops: no tensors, none of the package's code.

A reference is ``method(tokens, lps, **settings) -> (losses, keeps)``. ``tokens`` are the tokens as they are; ``lps``
are the log-probs at which the objective is evaluated. What a method holds constant (masks, detached weights) is taken
from ``tokens``, what it differentiates from ``lps``: finite differences in ``lps`` give the published gradient.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

from tests.trust_region.batches import Token

Result = tuple[list[float], list[bool]]


def by_sequence(tokens: list[Token]) -> list[list[int]]:
    groups: dict[int, list[int]] = defaultdict(list)
    for i, token in enumerate(tokens):
        groups[token.sequence].append(i)
    return [sorted(group, key=lambda i: tokens[i].position) for group in groups.values()]


def anchor_of(token: Token, anchor: str) -> float:
    return token.lmu if anchor == "rollout" else token.lold


def importance_weighted(tokens, lps, keeps, cap=math.inf, floor=0.0, anchor="rollout") -> Result:
    """-A M r, differentiable in r, or -A M sg(clamped r) log pi where a clamp is set."""
    losses = []
    for token, lp, keep in zip(tokens, lps, keeps, strict=True):
        denominator = anchor_of(token, anchor)
        if cap == math.inf and floor == 0.0:
            losses.append(-token.advantage * math.exp(lp - denominator) if keep else 0.0)
        else:
            constant = min(max(math.exp(token.lp - denominator), floor), cap)
            losses.append(-token.advantage * constant * lp if keep else 0.0)
    return losses, keeps


def no_region(tokens, lps, cap=math.inf) -> Result:
    return importance_weighted(tokens, lps, [True] * len(tokens), cap)


def clip_keeps(tokens, low, high, anchor) -> list[bool]:
    keeps = []
    for token in tokens:
        ratio = math.exp(token.lp - anchor_of(token, anchor))
        if token.advantage > 0:
            keeps.append(ratio <= high(token))
        elif token.advantage < 0:
            keeps.append(ratio >= low(token))
        else:
            keeps.append(True)
    return keeps


def ppo(tokens, lps, low=0.2, high=0.2, anchor="rollout", cap=math.inf) -> Result:
    keeps = clip_keeps(tokens, lambda _: 1 - low, lambda _: 1 + high, anchor)
    return importance_weighted(tokens, lps, keeps, cap, anchor=anchor)


def dual_clip(tokens, lps, low=0.2, high=0.2, dual=3.0, anchor="rollout") -> Result:
    losses, keeps = [], []
    for token, lp in zip(tokens, lps, strict=True):
        a, ratio = token.advantage, math.exp(lp - anchor_of(token, anchor))
        loss = max(-a * ratio, -a * min(max(ratio, 1 - low), 1 + high))
        losses.append(min(loss, -a * dual) if a < 0 else loss)
        now = math.exp(token.lp - anchor_of(token, anchor))
        keeps.append(not ((a > 0 and now > 1 + high) or (a < 0 and (now < 1 - low or now > dual))))
    return losses, keeps


def relaxed_clip(tokens, lps, low=0.2, high=0.2, alpha=0.1, side="both") -> Result:
    def rare(token: Token, which: str) -> bool:
        return token.mu[token.sampled] < alpha and side in (which, "both")

    keeps = clip_keeps(
        tokens,
        lambda token: -math.inf if rare(token, "low") else 1 - low,
        lambda token: math.inf if rare(token, "high") else 1 + high,
        "rollout",
    )
    return importance_weighted(tokens, lps, keeps)


def mini_rl(tokens, lps, low=0.2, high=0.28, cap=math.inf) -> Result:
    keeps = clip_keeps(tokens, lambda _: 1 - low, lambda _: 1 + high, "recomputed")
    return importance_weighted(tokens, lps, keeps, cap)


def cispo(tokens, lps, low=None, high=0.28, anchor="rollout") -> Result:
    floor = 0.0 if low is None else 1 - low
    return importance_weighted(tokens, lps, [True] * len(tokens), 1 + high, floor, anchor)


def minimal_mask(tokens, lps, delta=0.5) -> Result:
    keeps = [not (t.advantage < 0 and t.mu[t.sampled] - t.pi[t.sampled] >= delta) for t in tokens]
    return importance_weighted(tokens, lps, keeps)


def ice_pop(tokens, lps, low=0.5, high=5.0) -> Result:
    losses, keeps = [], []
    for token, lp in zip(tokens, lps, strict=True):
        k = math.exp(token.lold - token.lmu)
        weight = k if low <= k <= high else 0.0
        losses.append(-token.advantage * weight * math.exp(lp - token.lold))
        keeps.append(low <= k <= high)
    return losses, keeps


def binary_tv(token: Token, anchor: str = "rollout") -> float:
    return abs(math.exp(anchor_of(token, anchor)) - token.pi[token.sampled])


def binary_kl(token: Token, anchor: str = "rollout") -> float:
    p, q = math.exp(anchor_of(token, anchor)), token.pi[token.sampled]
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def binary_chi2(token: Token) -> float:
    p, q = token.mu[token.sampled], token.pi[token.sampled]
    return (p - q) ** 2 / p + (p - q) ** 2 / (1 - p)


def partition(token: Token, k: int | None, sampled_token: str) -> list[tuple[float, float]]:
    """(mu, pi) of S and the rest; ``k`` None is the whole vocabulary."""
    if k is None:
        return list(zip(token.mu, token.pi, strict=True))
    ids = token.top(k)
    if token.sampled not in ids:
        ids = [*ids, token.sampled] if sampled_token == "append" else [*ids[:-1], token.sampled]
    pairs = [(token.mu[i], token.pi[i]) for i in ids]
    return [*pairs, (max(1 - sum(p for p, _ in pairs), 1e-12), max(1 - sum(q for _, q in pairs), 1e-12))]


def partition_tv(token: Token, k: int | None, sampled_token: str = "append") -> float:
    return sum(abs(p - q) for p, q in partition(token, k, sampled_token)) / 2


def partition_kl(token: Token, k: int | None, sampled_token: str = "append") -> float:
    return sum(p * math.log(p / q) for p, q in partition(token, k, sampled_token) if p > 0)


def outward(token: Token, anchor: str = "rollout") -> bool:
    return token.advantage * (math.exp(token.lp - anchor_of(token, anchor)) - 1) > 0


def dppo(
    tokens,
    lps,
    divergence: Callable[[Token], float],
    delta: float | None = None,
    low: float | None = None,
    high: float | None = None,
    cap: float = math.inf,
    anchor: str = "rollout",
) -> Result:
    keeps = []
    for token in tokens:
        threshold = delta
        if token.advantage > 0 and high is not None:
            threshold = high
        if token.advantage < 0 and low is not None:
            threshold = low
        keeps.append(not (outward(token, anchor) and divergence(token) > threshold))
    return importance_weighted(tokens, lps, keeps, cap)


def predictive(tokens, lps, delta=0.15, k=20, cap=5.0) -> Result:
    keeps = []
    for token in tokens:
        ids = set(token.top(k)) | {token.sampled}
        dot = token.pi[token.sampled] - token.mu[token.sampled]
        dot += sum(token.pi[i] * (token.mu[i] - token.pi[i]) for i in ids)
        keeps.append(not (partition_kl(token, k) > delta and token.advantage * dot > 0))
    return importance_weighted(tokens, lps, keeps, cap)


def spo(tokens, lps, epsilon=0.2) -> Result:
    losses = []
    for token, lp in zip(tokens, lps, strict=True):
        r = math.exp(lp - token.lmu)
        losses.append(-(r * token.advantage - abs(token.advantage) * (r - 1) ** 2 / (2 * epsilon)))
    return losses, [True] * len(tokens)


def drpo(tokens, lps, delta=0.15) -> Result:
    losses = []
    for token, lp in zip(tokens, lps, strict=True):
        r = math.exp(min(max(lp - token.lmu, -20.0), 20.0))
        penalty = abs(token.advantage) * token.mu[token.sampled] * (r - 1) ** 2 / (2 * delta)
        losses.append(-token.advantage * r + penalty)
    return losses, [True] * len(tokens)


def sapo(tokens, lps, positive=1.0, negative=1.05, anchor="rollout") -> Result:
    losses = []
    for token, lp in zip(tokens, lps, strict=True):
        tau = positive if token.advantage > 0 else negative
        x = tau * (math.exp(lp - anchor_of(token, anchor)) - 1)
        gate = 1 / (1 + math.exp(-x)) if x > -700 else 0.0
        losses.append(-token.advantage * gate * 4 / tau)
    return losses, [True] * len(tokens)


def gspo(tokens, lps, low=3e-4, high=4e-4, anchor="rollout") -> Result:
    losses, keeps = [0.0] * len(tokens), [True] * len(tokens)
    for group in by_sequence(tokens):
        s = math.exp(sum(lps[i] - anchor_of(tokens[i], anchor) for i in group) / len(group))
        now = math.exp(sum(tokens[i].lp - anchor_of(tokens[i], anchor) for i in group) / len(group))
        for i in group:
            a = tokens[i].advantage
            losses[i] = max(-a * s, -a * min(max(s, 1 - low), 1 + high))
            keeps[i] = not ((a > 0 and now > 1 + high) or (a < 0 and now < 1 - low))
    return losses, keeps


def sequence_mask(tokens, lps, delta=0.1, reduce="max") -> Result:
    keeps = [True] * len(tokens)
    for group in by_sequence(tokens):
        kls = [binary_kl(tokens[i]) for i in group]
        value = max(kls) if reduce == "max" else sum(kls) / len(kls)
        for i in group:
            keeps[i] = value <= delta
    return importance_weighted(tokens, lps, keeps)


def vaco(tokens, lps, delta) -> Result:
    keeps = [True] * len(tokens)
    for group in by_sequence(tokens):
        mean = sum(abs(math.exp(tokens[i].lp - tokens[i].lmu) - 1) for i in group) / 2 / len(group)
        for i in group:
            keeps[i] = not (mean > delta and tokens[i].advantage * math.copysign(1, tokens[i].lp - tokens[i].lmu) > 0)
            if tokens[i].lp == tokens[i].lmu:
                keeps[i] = True
    return importance_weighted(tokens, lps, keeps)


def cppo(tokens, lps, delta=0.15, w_min=0.8, budget=0.02) -> Result:
    keeps = [True] * len(tokens)
    for group in by_sequence(tokens):
        length, spent, granted = len(group), 0.0, 0.0
        for t, i in enumerate(group, start=1):
            w = 1 - (1 - w_min) * (t - 1) / max(length - 1, 1)
            z = w * binary_tv(tokens[i])
            keeps[i] = not outward(tokens[i]) or z <= min(delta, delta + budget * granted - spent)
            spent, granted = spent + z, granted + w
    return importance_weighted(tokens, lps, keeps)


def band(p: float, delta: float, divergence: str) -> tuple[float, float]:
    """The ratios at which the binary f-divergence is delta, by a scan from 1 outwards and bisection."""

    def value(r: float) -> float:
        q = p * r
        if divergence == "tv":
            return abs(p - q)
        if divergence == "chi2":
            return (p - q) ** 2 / p + (p - q) ** 2 / (1 - p)
        return p * math.log(p / q) + (1 - p) * (math.log1p(-p) - math.log1p(-q))

    def root(outside: float) -> float:
        if divergence != "kl" and value(outside) <= delta:
            return outside
        inside = 1.0
        for _ in range(200):
            middle = (inside + outside) / 2
            if middle in (inside, outside):
                break
            if p * middle < 1 and value(middle) <= delta:
                inside = middle
            else:
                outside = middle
        return inside

    return root(0.0), root(1 / p)


def band_po(tokens, lps, delta=0.05, divergence="kl") -> Result:
    bounds = {id(token): band(token.mu[token.sampled], delta, divergence) for token in tokens}
    keeps = clip_keeps(tokens, lambda t: bounds[id(t)][0], lambda t: bounds[id(t)][1], "rollout")
    return importance_weighted(tokens, lps, keeps)


def covariances(tokens) -> list[float]:
    mean_a = sum(t.advantage for t in tokens) / len(tokens)
    mean_lp = sum(t.lp for t in tokens) / len(tokens)
    return [(t.advantage - mean_a) * (t.lp - mean_lp) for t in tokens]


def picked(tokens, fraction) -> list[bool]:
    values = [c if t.advantage != 0 else 0.0 for c, t in zip(covariances(tokens), tokens, strict=True)]
    count = max(1, int(fraction * len(tokens)))
    largest = sorted(range(len(tokens)), key=lambda i: -values[i])[:count]
    return [i in largest and values[i] > 0 for i in range(len(tokens))]


def covariance_clip(tokens, lps, fraction=2e-4, anchor="rollout") -> Result:
    return importance_weighted(tokens, lps, [not x for x in picked(tokens, fraction)], anchor=anchor)


def covariance_kl(tokens, lps, fraction=2e-4, beta=1.0, anchor="rollout") -> Result:
    losses, keeps = importance_weighted(tokens, lps, [True] * len(tokens), anchor=anchor)
    for i, chosen in enumerate(picked(tokens, fraction)):
        if chosen:
            losses[i] += beta * abs(lps[i] - anchor_of(tokens[i], anchor))
    return losses, keeps


def combined(tokens, lps, members: list[Callable[..., Result]], cap=math.inf) -> Result:
    kept = [member(tokens, lps)[1] for member in members]
    return importance_weighted(tokens, lps, [all(keeps) for keeps in zip(*kept, strict=True)], cap)


def gradient(method: Callable[..., Result], tokens: list[Token], step: float = 1e-6) -> list[float]:
    """Central finite differences of the summed losses in each token's log-prob."""
    lps = [token.lp for token in tokens]
    result = []
    for i in range(len(lps)):
        up, down = list(lps), list(lps)
        up[i] += step
        down[i] -= step
        above, below = method(tokens, up)[0], method(tokens, down)[0]
        # term by term: the sum would drown a small token's change in a large token's value
        result.append(math.fsum(x - y for x, y in zip(above, below, strict=True)) / (2 * step))
    return result
