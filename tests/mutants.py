"""Faults that one might make in the numeric core, each with the tests that must notice it: what ``mutate.py`` runs.

An entry is worth its time where a fault would change what is trained on and nothing would crash.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """``old``, which stands in the file exactly once, becomes ``new``; one of the ``tests`` must then fail."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]


HEAD = ("tests/train/test_head_in_bf16.py", "tests/train/test_head.py")
SCORING = ("tests/trust_region/test_rollout_time.py",)
OBJECTIVE = ("tests/train/test_objective.py", "tests/train/test_head.py")
AGGREGATION = ("tests/train/test_aggregation.py",)
ADVANTAGE = ("tests/test_advantage.py",)
METRICS = ("tests/train/test_metrics.py",)
BATCH = ("tests/base/test_batch.py", "tests/train/test_shared_prompt.py")
ATTENTION = ("tests/train/test_shared_prompt.py",)
MODEL_CHECK = ("tests/train/test_model_check.py",)
REGION = ("tests/trust_region/test_reference.py", "tests/trust_region/test_properties.py")
MODULE = ("tests/train/test_module.py",)


def mutants(file: str, tests: tuple[str, ...], *changes: tuple[str, str]) -> list[Mutant]:
    return [Mutant(f"dppo_lightning/{file}", old, new, tests) for old, new in changes]


MUTANTS = [
    *mutants(
        "train/head.py",
        HEAD,
        ("normalised.add_(log_total)", "pass"),
        ("(grad_logp != 0) | (grad_entropy != 0)", "grad_logp != 0"),
        ("else grad.mul_(scale) for", "else grad for"),
        ("rollout_topk_logp=self._rollout_table(rows))", "rollout_topk_logp=normalised)"),
    ),
    *mutants(
        "train/projection.py",
        HEAD,
        ("self.logits(hidden[rows], weight, self.bias)", "self.logits(hidden[rows], weight, None)"),
        ("logits += bias", "logits += bias.to(dtype)"),
        ("sampled - logits.exp_().sum(dim=-1).log()", "sampled - logits.exp_().sum(dim=-1)"),
    ),
    *mutants(
        "train/logits.py",
        HEAD,
        ("part += piece.t() @ hidden", "part -= piece.t() @ hidden"),
        ("into.copy_(product @ self.product_weight)", "into.copy_(-(product @ self.product_weight))"),
        ("torch.mm(product, self.product_weight, out=into)", "torch.mm(product, -self.product_weight, out=into)"),
        ("into[index] = (product @ self.product_weight)", "into[index] = -(product @ self.product_weight)"),
        (
            "self.weight.addmm_(product.t(), hidden.float())",
            "self.weight.addmm_(product.t(), hidden.float(), alpha=-1)",
        ),
        ("self.bias += grad.sum(dim=0)", "self.bias -= grad.sum(dim=0)"),
        ("range(0, len(weight), _PIECE)", "range(0, min(len(weight), _PIECE), _PIECE)"),
        ("range(0, n, len(scratch))", "range(0, min(n, len(scratch)), len(scratch))"),
        ("- grad_entropy[:, None] * (normalised + entropy)", "+ grad_entropy[:, None] * (normalised + entropy)"),
        ("(normalised + entropy))", "normalised)"),
        ("grad.mul_(1 - tanh.square_())", "grad.mul_(1 - tanh)"),
        ("factor = self.scale / self.temperature", "factor = self.scale * self.temperature"),
        ("return log_total + largest", "return log_total"),
    ),
    *mutants(
        "train/logits.py",
        MODEL_CHECK,
        ("return replace(found, temperature=temperature)", "return cls(temperature=temperature)"),
    ),
    *mutants(
        "train/scoring.py",
        SCORING,
        ("torch.no_grad(), self.strategy.precision_plugin.forward_context():", "torch.no_grad():"),
        ("[found[i] for i in range(len(sequences))]", "list(found.values())"),
        ("piece.clone() for piece", "piece for piece"),
    ),
    *mutants(
        "train/module.py",
        MODULE,
        ("output.loss * self.trainer.accumulate_grad_batches", "output.loss"),
    ),
    *mutants(
        "train/objective.py",
        OBJECTIVE,
        ("torch.expm1(-exact) + exact", "torch.expm1(exact) - exact"),
        ("0.5 * log_ratio.square()", "log_ratio.square()"),
        ("loss + self.kl.coefficient * kl", "loss - self.kl.coefficient * kl"),
        ('if self.kl.where == "loss":', "if True:"),
        ("loss - self.entropy_coefficient * tokens.entropy", "loss + self.entropy_coefficient * tokens.entropy"),
    ),
    *mutants(
        "train/objective.py",
        AGGREGATION,
        ("max(int(counted.sum()), 1)", "max(len(tokens), 1)"),
        ("1 / max(int(tokens.sum()), 1)", "1 / max(len(tokens), 1)"),
        ("1 / (sequences * np.maximum(tokens, 1))", "1 / np.maximum(tokens, 1)"),
        ("1 / (sequences * constant_length)", "1 / constant_length"),
    ),
    *mutants(
        "advantage.py",
        ADVANTAGE,
        ("np.zeros_like(group) if without_signal(group) else self.of_group(group)", "self.of_group(group)"),
        ("np.where(np.abs(difference) <= ROUNDING * np.abs(rewards).max(), 0.0, difference)", "difference"),
        ("rewards.std(ddof=1)", "rewards.std()"),
        ("* count / (count - 1)", "* (count - 1) / count"),
    ),
    *mutants(
        "train/metrics.py",
        METRICS,
        ('torch.maximum(self.value, other.value) if self.kind == "max" else', ""),
        ('values.sum() * (weight if kind == "mean" else 1.0)', "values.sum()"),
        ('kl_estimate(batch.rollout_logp, output.logp, "k3")', 'kl_estimate(output.logp, batch.rollout_logp, "k3")'),
        ("stopped[negative]", "stopped[batch.advantage <= 0]"),
        ("negative & (shift < -0.5)", "negative & (shift > 0.5)"),
    ),
    *mutants(
        "base/records.py",
        BATCH,
        ("np.where(inside, np.float32(-np.inf), completion.logp[:, None])", "completion.logp[:, None]"),
    ),
    *mutants(
        "base/batch.py",
        BATCH,
        ("np.arange(s.tokens) for s", "s.generated for s"),
    ),
    *mutants(
        "base/packing.py",
        BATCH,
        ("index * width + sequence.generated - 1", "index * width + sequence.generated"),
        ("whole.start + sequence.generated - 1", "whole.start + sequence.generated"),
        ("np.where(place < beginning, shared.start + place, ", "np.where(place < 0, shared.start + place, "),
        ("_length(sequence)], beginning, shared)", "_length(sequence)], 0, shared)"),
        ("np.tril(np.ones((1, 1, width, width), bool))", "np.ones((1, 1, width, width), bool)"),
        ("np.arange(past) < lengths[:, None, None, None]", "np.arange(past) < past + lengths[:, None, None, None]"),
    ),
    *mutants(
        "train/attention.py",
        ATTENTION,
        ("is_causal=True, scale=scaling", "is_causal=False, scale=scaling"),
        ("and window is None", "and True"),
        ('and getattr(config, "attn_logit_softcapping", None) is None', "and True"),
    ),
    *mutants(
        "train/attention.py",
        MODEL_CHECK,
        ("if unknown or dropout:", "if False:"),
    ),
    *mutants(
        "trust_region/divergence.py",
        REGION,
        ("~(self.outward(anchored) & (divergence > threshold))", "~(divergence > threshold)"),
        ("tokens.advantage > 0, torch.full_like", "tokens.advantage < 0, torch.full_like"),
        ("mu * (rollout_logp - logp)", "logp.exp() * (rollout_logp - logp)"),
        (
            "(log_complement(rollout_logp) - log_complement(logp))",
            "(log_complement(logp) - log_complement(rollout_logp))",
        ),
        ("replace(tokens, rollout_logp=anchor_logp(tokens, self.anchor))", "tokens"),
    ),
    *mutants(
        "trust_region/topk.py",
        REGION,
        (".abs().sum(dim=-1) / 2", ".abs().sum(dim=-1)"),
        ("dropped[:, -2] = used[:, -1]", "dropped[:, 0] = used[:, -1]"),
        ("terms = rollout_logp.exp() * (", "terms = logp.exp() * ("),
        ("(1 - logs.double().exp().sum(dim=-1, keepdim=True))", "logs.double().exp().sum(dim=-1, keepdim=True)"),
        ("(pi * (mu - pi)).sum(dim=-1)", "(pi * (pi - mu)).sum(dim=-1)"),
    ),
    *mutants(
        "trust_region/base.py",
        REGION,
        ("ratio.clamp(min_ratio, max_ratio)", "ratio.clamp(min_ratio, None)"),
        ("(tokens.advantage < 0) & (ratio < low)", "(tokens.advantage < 0) & (ratio > high)"),
        ("-tokens.advantage * weight.detach()", "-tokens.advantage * weight.detach() ** 2"),
    ),
    *mutants(
        "trust_region/clip.py",
        REGION,
        ("ratio.detach() > self.dual", "ratio.detach() < self.dual"),
        ('rare & (self.side != "high")', 'rare & (self.side != "low")'),
        ("(mismatch >= self.low) & (mismatch <= self.high)", "mismatch <= self.high"),
        ("max_ratio=1 + self.epsilon_high", "max_ratio=None"),
    ),
    *mutants(
        "trust_region/sequence.py",
        REGION,
        ("(tokens.advantage > 0) & (ratio > 1 + self.epsilon_high)", "ratio > 1 + self.epsilon_high"),
        ("sums.max(kl) if", "sums.mean(kl) if"),
        (
            "torch.expm1(tokens.logp.detach() - tokens.rollout_logp).abs() / 2",
            "(tokens.logp - tokens.rollout_logp).abs() / 2",
        ),
        ("spent = sums.prefix_sum(weighted)", "spent = sums.prefix_sum(weighted) + weighted"),
    ),
    *mutants(
        "trust_region/sequence.py",
        REGION,
        ("(table.cumsum(dim=1) - table)", "table.cumsum(dim=1)"),
        (".sum(dim=1) / self.length", ".mean(dim=1)"),
    ),
    *mutants(
        "trust_region/band.py",
        REGION,
        ("self.delta = delta", "self.delta = 2 * delta"),
    ),
    *mutants(
        "trust_region/smooth.py",
        REGION,
        ("penalty - tokens.advantage * ratio", "penalty + tokens.advantage * ratio"),
        ("gate = 4 / (tau *", "gate = 4 / (1 *"),
    ),
    *mutants(
        "trust_region/composition.py",
        REGION,
        ("weight = weight * member.weight", "weight = member.weight"),
        ("keep = keep & member.keep", "keep = member.keep"),
    ),
]
