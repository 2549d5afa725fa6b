"""PolicyHead: the only place where logits exist, one chunk of tokens at a time.

Hidden states of the positions that predict a generated token go in; a scalar loss and per-token statistics come out.
The gradient is formed in the forward pass, chunk by chunk: logits -> statistics -> region -> dloss/dlogits ->
dloss/dhidden and dloss/dweight, so each chunk of logits is computed once and forgotten: 6 N H V floating-point
operations in all, and no [N, V] tensor. Nothing couples two chunks, because the aggregation is a fixed weight for
every token. A region of scope "sequence" costs one more pass, 8 N H V: log-probs of all tokens first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dppo_lightning.base.batch import TrainingBatch
from dppo_lightning.base.errors import ConfigError
from dppo_lightning.train.logits import (
    Gradients,
    Tables,
    entropy_of,
    gather,
    logit_gradient_,
    normalise_,
    product_dtype_of,
)
from dppo_lightning.train.objective import Objective, TokenLoss
from dppo_lightning.train.projection import Projection
from dppo_lightning.trust_region.base import (
    TokenStats,
    TokenStatsError,
    TrustRegion,
    check_given,
    concatenated,
    joint_needs,
)
from dppo_lightning.trust_region.divergence import DivergenceMask


class HeadOutput(NamedTuple):
    """Per-token statistics, all detached, and the step's share of the loss.

    A tuple, because ZeRO-3 looks for tensors in tuples only: it gathers the weight for the backward pass by a hook on
    the loss, and without it an output projection of its own has no shape that its gradient fits.

    Attributes:
        loss: [] weighted sum of the token losses; carries the gradient to hidden states and weight.
        logp: [N] float32 log pi of the sampled tokens.
        token_loss: [N] before aggregation: the surrogate, KL to the reference and the entropy bonus.
        surrogate_loss: [N] the region's own part of it.
        keep: [N] False where the region stopped the update.
        divergence: [N] or None.
        entropy: [N] in nats, or None where nothing asked for it.
        kl: [N] to the reference, or None.
        diagnostics: name -> [N], divergences asked for beside the region's own.
    """

    loss: Float[Tensor, ""]
    logp: Float[Tensor, " N"]
    token_loss: Float[Tensor, " N"]
    surrogate_loss: Float[Tensor, " N"]
    keep: Bool[Tensor, " N"]
    divergence: Float[Tensor, " N"] | None
    entropy: Float[Tensor, " N"] | None
    kl: Float[Tensor, " N"] | None
    diagnostics: Mapping[str, Float[Tensor, " N"]]


class PolicyHead(Projection):
    """Log-probs, region and gradient over a language model's output projection, see ``Projection``."""

    def forward(
        self,
        hidden: Float[Tensor, "N H"],
        batch: TrainingBatch,
        objective: Objective | None = None,
        diagnostics: Mapping[str, DivergenceMask] | None = None,
        entropy: bool = True,
    ) -> HeadOutput | Float[Tensor, " N"]:
        """Compute loss and statistics under ``objective``; with none only the log-probs, [N] without gradient.

        No token at all gives a zero loss that is still connected to the graph, and asks nothing of the region. Entropy
        costs two passes over each chunk: without ``entropy`` it is computed only for a region or a bonus that needs it.

        Raises:
            ConfigError: A loss is asked for and products are in float16.
            TokenStatsError: A statistic that the region or a diagnostic needs is missing or not finite.
        """
        if objective is None:
            with torch.no_grad():
                return self.logp(hidden, batch.targets)
        if self.product_dtype == torch.float16:  # by whatever way: see ``policy.check_precision``
            raise ConfigError(
                "a policy in float16 loses the small gradients of the head: set trainer.precision bf16-mixed"
            )
        work = _Work(self, batch, objective, diagnostics or {}, entropy)
        loss = _GradientInForward.apply(hidden, self.weight, self.bias, work)
        return work.output(loss)


class _Work:
    """One call of the head: walks the chunks, collects statistics and gradients."""

    def __init__(
        self,
        head: PolicyHead,
        batch: TrainingBatch,
        objective: Objective,
        diagnostics: Mapping[str, DivergenceMask],
        entropy: bool,
    ) -> None:
        self.head = head
        self.batch = batch
        self.objective = objective
        self.diagnostics = diagnostics
        self.needs = joint_needs(objective.region, *diagnostics.values())
        self.age = batch.age if "age" in self.needs else None
        self.wants_entropy = entropy or "entropy" in self.needs or objective.entropy_coefficient > 0
        self.collected: dict[str, list[Tensor]] = {}
        self.tables: Tables | None = None
        self.rollout_tables: Tables | None = None

    def run(
        self,
        hidden: Float[Tensor, "N H"],
        weight: Float[Tensor, "V H"],
        bias: Float[Tensor, " V"] | None,
        trained: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Compute the loss, and its gradient by hidden states and, where ``trained``, by weight and bias."""
        chunks = self._chunks(len(hidden))
        longest = max((rows.stop - rows.start for rows in chunks), default=0)
        self.tables = Tables(longest, weight)
        if "full" in self.needs:
            self.rollout_tables = Tables(longest, weight, probabilities=False)
        grads = Gradients(hidden, weight, bias, trained)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        by_sequence = self.objective.region.scope == "sequence" and len(hidden) > 0
        planned = self._plan_sequences(hidden, weight, bias) if by_sequence else None
        for rows in chunks:
            normalised, probabilities, log_total = self._distribution(hidden[rows], weight, bias)
            stats = self._chunk_stats(rows, normalised, probabilities)
            if planned is None:
                chunk_loss, grad_logp, grad_entropy = self._differentiate(stats, rows)
                loss += chunk_loss
            else:
                grad_logp, grad_entropy = planned.grad_logp[rows], _rows(planned.grad_entropy, rows)
            self._diagnose(stats)
            grad = logit_gradient_(
                normalised, probabilities, self.batch.targets[rows], grad_logp, grad_entropy, self.scratch
            )
            if self.head.transform.softcap is not None:
                normalised.add_(log_total)
            grad = self.head.transform.backward_(grad, normalised)
            moved = grad_logp != 0 if grad_entropy is None else (grad_logp != 0) | (grad_entropy != 0)
            grads.add(rows, grad, hidden[rows], moved, self.tables)
        if planned is not None:
            loss = planned.loss
        return loss, grads.hidden, grads.weight, grads.bias

    @property
    def scratch(self) -> Float[Tensor, "r V"]:
        """Rows of the tables for intermediate results."""
        assert self.tables is not None
        return self.tables.scratch

    def _chunks(self, tokens: int) -> list[slice]:
        """Cut tokens into chunks, half as long where whole distributions are compared: that takes three tables more."""
        chunks = list(self.head.chunks(tokens))
        most = max(self.head.most_tokens // 2, 1)
        if "full" not in self.needs or all(rows.stop - rows.start <= most for rows in chunks):
            return chunks
        middles = [math.ceil((rows.start + rows.stop) / 2) for rows in chunks]
        halves = [(slice(c.start, m), slice(m, c.stop)) for c, m in zip(chunks, middles, strict=True)]
        return [half for pair in halves for half in pair if half.start < half.stop]

    def _distribution(
        self, hidden: Float[Tensor, "n H"], weight: Float[Tensor, "V H"], bias: Float[Tensor, " V"] | None
    ) -> tuple[Float[Tensor, "n V"], Float[Tensor, "n V"], Float[Tensor, "n 1"]]:
        """Write log pi and pi at every id into the tables; return both, and the log of what normalised them."""
        assert self.tables is not None
        logits = self.head.logits(hidden, weight, bias, self.tables)
        probabilities = self.tables.probabilities[: len(hidden)]
        return logits, probabilities, normalise_(logits, probabilities, self.tables.scratch)

    def _chunk_stats(
        self, rows: slice, normalised: Float[Tensor, "n V"], probabilities: Float[Tensor, "n V"], whole: bool = True
    ) -> _ChunkStats:
        """Collect the statistics of a chunk; both whole distributions too, where something compares them."""
        batch = self.batch
        topk_logp = rollout_topk = None
        if "topk" in self.needs and batch.topk_ids is not None:
            topk_logp, rollout_topk = normalised.gather(1, batch.topk_ids[rows]), _rows(batch.rollout_topk_logp, rows)
        tokens = TokenStats(
            logp=gather(normalised, batch.targets[rows]),
            rollout_logp=batch.rollout_logp[rows],
            advantage=batch.advantage[rows],
            recomputed_logp=_rows(batch.recomputed_logp, rows),
            topk_logp=topk_logp,
            rollout_topk_logp=rollout_topk,
            entropy=entropy_of(normalised, probabilities, self.scratch) if self.wants_entropy else None,
            age=_rows(self.age, rows),
            sequence=batch.sequence[rows],
            position=batch.position[rows],
            chosen=_rows(batch.chosen, rows),
        )
        if not whole or "full" not in self.needs:
            return _ChunkStats(tokens, None)
        return _ChunkStats(tokens, replace(tokens, topk_logp=normalised, rollout_topk_logp=self._rollout_table(rows)))

    def _rollout_table(self, rows: slice) -> Float[Tensor, "n V"]:
        """Rebuild log mu at every id from what was kept before the rollout's first step."""
        head, hidden = self.head, self.batch.rollout_hidden
        if hidden is None or head.rollout_weight is None:
            raise TokenStatsError(
                'a whole-vocabulary divergence ("full") needs rollout_hidden in the batch and, before the rollout\'s '
                "first step, PolicyHead.remember_rollout()"
            )
        tables = self.rollout_tables
        assert tables is not None
        table = head.logits(hidden[rows], head.rollout_weight, head.rollout_bias, tables)
        normalise_(table, None, tables.scratch)
        return table

    def _differentiate(self, stats: _ChunkStats, rows: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compute the weighted loss of tokens, and its derivatives by log-prob and entropy; collect statistics."""
        tokens = stats.for_region(self.objective.region)
        with torch.enable_grad():
            logp = tokens.logp.detach().requires_grad_()
            entropy = None if tokens.entropy is None else tokens.entropy.detach().requires_grad_()
            leaf = replace(tokens, logp=logp, entropy=entropy)
            result = self.objective(leaf, _rows(self.batch.reference_logp, rows))
            total = (self.batch.weight[rows] * result.loss).sum()
            grad_logp, grad_entropy = torch.autograd.grad(
                total, (logp, entropy if entropy is not None else logp), allow_unused=True
            )
        self._collect(tokens, result)
        grad_logp = torch.zeros_like(logp) if grad_logp is None else grad_logp
        return total.detach(), grad_logp, grad_entropy if entropy is not None else None

    def _diagnose(self, stats: _ChunkStats) -> None:
        """Measure the divergences that are asked for beside the region's own."""
        for name, region in self.diagnostics.items():
            tokens = stats.for_region(region)
            check_given(region, tokens)
            self.collected.setdefault(f"diagnostics/{name}", []).append(region.divergence(tokens))

    def _collect(self, tokens: TokenStats, result: TokenLoss) -> None:
        """Keep what the output has of these tokens."""
        found = {
            "logp": tokens.logp,
            "token_loss": result.loss,
            "surrogate_loss": result.surrogate.loss,
            "keep": result.surrogate.keep,
            "divergence": result.surrogate.divergence,
            "entropy": tokens.entropy,
            "kl": result.kl,
        }
        for name, value in found.items():
            if value is not None:
                self.collected.setdefault(name, []).append(value.detach())

    def _plan_sequences(
        self, hidden: Float[Tensor, "N H"], weight: Float[Tensor, "V H"], bias: Float[Tensor, " V"] | None
    ) -> _Planned:
        """Run the first pass of a sequence-scope region, which is given every token at once."""
        pieces: list[TokenStats] = []  # [N] and [N, K + 1] only: a whole-vocabulary region is never of this scope
        for rows in self._chunks(len(hidden)):
            normalised, probabilities, _ = self._distribution(hidden[rows], weight, bias)
            pieces.append(self._chunk_stats(rows, normalised, probabilities, whole=False).tokens)
        loss, grad_logp, grad_entropy = self._differentiate(_ChunkStats(concatenated(pieces), None), slice(None))
        return _Planned(loss, grad_logp, grad_entropy)

    def output(self, loss: Tensor) -> HeadOutput:
        """Join what the chunks collected."""
        joined = {name: torch.cat(values) for name, values in self.collected.items()}
        none = loss.new_zeros(0)
        return HeadOutput(
            loss=loss,
            logp=joined.get("logp", none),
            token_loss=joined.get("token_loss", none),
            surrogate_loss=joined.get("surrogate_loss", none),
            keep=joined.get("keep", none.bool()),
            divergence=joined.get("divergence"),
            entropy=joined.get("entropy", none) if self.wants_entropy else None,
            kl=joined.get("kl"),
            diagnostics={name: joined.get(f"diagnostics/{name}", none) for name in self.diagnostics},
        )


@dataclass(frozen=True)
class _ChunkStats:
    """Statistics of a chunk's tokens, and the same with both whole distributions as their top-K tables."""

    tokens: TokenStats
    whole: TokenStats | None

    def for_region(self, region: TrustRegion) -> TokenStats:
        """Return the statistics that ``region`` reads."""
        return self.whole if self.whole is not None and "full" in region.needs else self.tokens


@dataclass(frozen=True)
class _Planned:
    """Loss and derivatives of all tokens, from the first pass of a sequence-scope region."""

    loss: Tensor
    grad_logp: Float[Tensor, " N"]
    grad_entropy: Float[Tensor, " N"] | None


class _GradientInForward(torch.autograd.Function):
    """A scalar whose gradients are ready when it is; they are given away by the one backward pass that there can be."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, work: _Work) -> Tensor:
        dtype = product_dtype_of(weight)
        with torch.autocast(hidden.device.type, enabled=False):
            product_weight = weight.to(dtype)
            trained = ctx.needs_input_grad[1], ctx.needs_input_grad[2]
            loss, grad_hidden, grad_weight, grad_bias = work.run(hidden, product_weight, bias, trained)
        ctx.gradients = (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if bias is None or grad_bias is None else grad_bias.to(bias.dtype),
        )
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        if ctx.gradients is None:
            raise RuntimeError("the head's loss can be differentiated once: call the head again for a second backward")
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if grad is None else grad.mul_(scale) for grad in gradients), None


def _rows(value: Tensor | None, rows: slice) -> Tensor | None:
    return None if value is None else value[rows]
