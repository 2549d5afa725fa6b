"""PolicyHead: the only place where logits exist, one chunk of tokens at a time.

Hidden states of the positions that predict a generated token go in; a scalar loss and per-token statistics come out.
The gradient is formed in the forward pass, chunk by chunk: logits -> statistics -> region -> dloss/dlogits ->
dloss/dhidden and dloss/dweight, so each chunk of logits is computed once and forgotten: 6 N H V floating-point
operations in all, and no [N, V] tensor. Nothing couples two chunks, because the aggregation is a fixed weight for
every token. A region of scope "sequence" costs one more pass, 8 N H V: log-probs of all tokens first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dppo_lightning.batch import TrainingBatch
from dppo_lightning.objective import Objective, TokenLoss
from dppo_lightning.trust_region.base import TokenStats, TokenStatsError, TrustRegion, check_tokens
from dppo_lightning.trust_region.divergence import DivergenceMask


@dataclass(frozen=True)
class LogitTransform:
    """From the LM head's product z to the logits that are sampled from: softcap(z * scale) / temperature.

    Args:
        scale: Multiplies z (Cohere's ``logit_scale``, one over Granite's ``logits_scaling``).
        softcap: cap * tanh(z / cap) (Gemma's ``final_logit_softcapping``); None for none.
        temperature: Of sampling, > 0.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @classmethod
    def of_model(cls, config: Any, temperature: float) -> LogitTransform:
        """Read a Hugging Face config."""
        scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)
        return cls(float(scale), getattr(config, "final_logit_softcapping", None), temperature)

    def apply_(self, z: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
        """Transform in place."""
        if self.scale != 1.0:
            z.mul_(self.scale)
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z.div_(self.temperature) if self.temperature != 1.0 else z

    def backward_(self, grad: Float[Tensor, "n V"], logits: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
        """dloss/dz from dloss/dlogits, in place; ``logits`` is what ``apply_`` returned."""
        if self.softcap is not None:
            tanh = logits * (self.temperature / self.softcap)
            grad.mul_(1 - tanh.square_())
        factor = self.scale / self.temperature
        return grad.mul_(factor) if factor != 1.0 else grad


@dataclass(frozen=True)
class HeadOutput:
    """Per-token statistics, all detached, and the step's share of the loss.

    Attributes:
        loss: [] weighted sum of the token losses; carries the gradient to hidden states and weight.
        logp: [N] float32 log pi of the sampled tokens.
        token_loss: [N] before aggregation: the surrogate, KL to the reference and the entropy bonus.
        surrogate_loss: [N] the region's own part of it.
        keep: [N] False where the region stopped the update.
        divergence: [N] or None.
        entropy: [N] in nats.
        kl: [N] to the reference, or None.
        diagnostics: name -> [N], divergences asked for beside the region's own.
    """

    loss: Float[Tensor, ""]
    logp: Float[Tensor, " N"]
    token_loss: Float[Tensor, " N"]
    surrogate_loss: Float[Tensor, " N"]
    keep: Bool[Tensor, " N"]
    divergence: Float[Tensor, " N"] | None
    entropy: Float[Tensor, " N"]
    kl: Float[Tensor, " N"] | None
    diagnostics: Mapping[str, Float[Tensor, " N"]]


class PolicyHead(nn.Module):
    """Log-probs, region and gradient over a language model's output projection.

    The head holds the projection's own parameters (the same objects, so tied embeddings stay tied) and every use goes
    through ``forward``: hooks that gather sharded parameters fire for it.

    Args:
        projection: The model's output projection, ``weight`` [V, H] and optional ``bias`` [V].
        transform: From its product to the logits that are sampled from.
        logits_mib: Memory of one chunk of fp32 logits, in MiB; a chunk holds at least one token. Two such tables are
            alive at a time; with bf16 products half a table more.
    """

    def __init__(self, projection: nn.Module, transform: LogitTransform, logits_mib: int = 64) -> None:
        super().__init__()
        self.weight: nn.Parameter = projection.weight  # type: ignore[assignment]
        self.bias: nn.Parameter | None = getattr(projection, "bias", None)
        self.transform = transform
        self.logits_mib = logits_mib
        self.rollout_weight: Tensor | None = None
        self.rollout_bias: Tensor | None = None

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype of the head's matrix products here and now: autocast's where it is on, else the weight's."""
        return _product_dtype(self.weight)

    def remember_rollout(self) -> None:
        """Keep a copy of the projection as it is now, for regions that compare whole distributions ("full").

        In the dtype of the products, [V, H]: another one would round mu otherwise than pi, and a policy that has not
        moved would have a divergence.
        """
        self.rollout_weight = self.weight.detach().to(self.product_dtype, copy=True)
        self.rollout_bias = None if self.bias is None else self.bias.detach().clone()

    def forward(
        self,
        hidden: Float[Tensor, "N H"],
        batch: TrainingBatch,
        objective: Objective | None = None,
        diagnostics: Mapping[str, DivergenceMask] | None = None,
    ) -> HeadOutput | Float[Tensor, " N"]:
        """Loss and statistics under ``objective``; with no objective only the log-probs, [N] without gradient.

        No token at all gives a zero loss that is still connected to the graph, and asks nothing of the region.

        Raises:
            TokenStatsError: A statistic that the region or a diagnostic needs is missing or not finite.
        """
        if objective is None:
            with torch.no_grad():
                return self._logp(hidden, batch)
        work = _Work(self, batch, objective, diagnostics or {})
        loss = _GradientInForward.apply(hidden, self.weight, self.bias, work)
        return work.output(loss)

    def _logp(self, hidden: Float[Tensor, "N H"], batch: TrainingBatch) -> Float[Tensor, " N"]:
        logp = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        weight = self.weight.to(self.product_dtype)
        for rows in self.chunks(len(hidden)):
            logits = self.logits(hidden[rows], weight, self.bias)
            logits.sub_(logits.amax(dim=-1, keepdim=True))
            sampled = _gather(logits, batch.targets[rows])
            logp[rows] = sampled - logits.exp_().sum(dim=-1).log()
        return logp

    @property
    def most_tokens(self) -> int:
        """Tokens in a chunk, at most."""
        return max(1, (self.logits_mib << 20) // (4 * self.weight.shape[0]))

    def chunks(self, tokens: int) -> Iterator[slice]:
        """Slices of equal size, at most what the memory budget allows; none where there are no tokens.

        Equal, because every chunk costs a pass over the gradient of the whole weight, however few tokens it has.
        """
        most = self.most_tokens
        size = math.ceil(tokens / max(math.ceil(tokens / most), 1))
        return (slice(start, min(start + size, tokens)) for start in range(0, tokens, max(size, 1)))

    def logits(
        self,
        hidden: Float[Tensor, "n H"],
        weight: Float[Tensor, "V H"],
        bias: Float[Tensor, " V"] | None,
        tables: _Tables | None = None,
    ) -> Float[Tensor, "n V"]:
        """Float32 logits of some tokens, in ``tables`` if given; product is in the weight's dtype or autocast's."""
        dtype, n = _product_dtype(weight), len(hidden)
        room = None if tables is None else tables.product[:n]
        product = torch.mm(hidden.to(dtype), weight.to(dtype).t(), out=room)
        if bias is not None:
            product += bias.to(dtype)
        if tables is not None and dtype != torch.float32:
            product = tables.logits[:n].copy_(product)
        return self.transform.apply_(product.float())


class _Tables:
    """Memory of one chunk, written anew by every chunk: fresh pages each time cost the CPU more than the arithmetic."""

    def __init__(self, tokens: int, weight: Float[Tensor, "V H"], probabilities: bool = True) -> None:
        shape, device, dtype = (tokens, weight.shape[0]), weight.device, _product_dtype(weight)
        self.logits = torch.empty(shape, dtype=torch.float32, device=device)
        self.probabilities = torch.empty_like(self.logits if probabilities else self.logits[:0])
        self.room = torch.empty(max(1, min(tokens, (1 << 20) // shape[1])), shape[1], device=device)  # fits a cache
        self.product = self.logits if dtype == torch.float32 else torch.empty(shape, dtype=dtype, device=device)


class _Work:
    """One call of the head: walks the chunks, collects statistics and gradients."""

    def __init__(
        self,
        head: PolicyHead,
        batch: TrainingBatch,
        objective: Objective,
        diagnostics: Mapping[str, DivergenceMask],
    ) -> None:
        self.head = head
        self.batch = batch
        self.objective = objective
        self.diagnostics = diagnostics
        self.needs = objective.region.needs.union(*(region.needs for region in diagnostics.values()))
        self.collected: dict[str, list[Tensor]] = {}
        self.tables: _Tables | None = None
        self.rollout_tables: _Tables | None = None

    def run(
        self, hidden: Float[Tensor, "N H"], weight: Float[Tensor, "V H"], bias: Float[Tensor, " V"] | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The loss, and its gradient with respect to hidden states, weight and bias."""
        chunks = self._chunks(len(hidden))
        longest = max((rows.stop - rows.start for rows in chunks), default=0)
        self.tables = _Tables(longest, weight)
        if "full" in self.needs:
            self.rollout_tables = _Tables(longest, weight, probabilities=False)
        grads = _Gradients(hidden, weight, bias)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        by_sequence = self.objective.region.scope == "sequence" and len(hidden) > 0
        planned = self._plan_sequences(hidden, weight, bias) if by_sequence else None
        for rows in chunks:
            normalised, probabilities, log_total = self._distribution(hidden[rows], weight, bias)
            seen = self._see(rows, normalised, probabilities)
            if planned is None:
                chunk_loss, grad_logp, grad_entropy = self._differentiate(seen, rows)
                loss += chunk_loss
            else:
                grad_logp, grad_entropy = planned.grad_logp[rows], _rows(planned.grad_entropy, rows)
            self._diagnose(seen)
            grad = _logit_gradient_(
                normalised, probabilities, self.batch.targets[rows], grad_logp, grad_entropy, self.room
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
    def room(self) -> Float[Tensor, "r V"]:
        assert self.tables is not None
        return self.tables.room

    def _chunks(self, tokens: int) -> list[slice]:
        """Half as long where whole distributions are compared: that takes some three tables more."""
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
        """log pi and pi at every id, in the tables, and the log of what normalised them."""
        assert self.tables is not None
        logits = self.head.logits(hidden, weight, bias, self.tables)
        probabilities = self.tables.probabilities[: len(hidden)]
        return logits, probabilities, _normalise_(logits, probabilities, self.tables.room)

    def _see(
        self, rows: slice, normalised: Float[Tensor, "n V"], probabilities: Float[Tensor, "n V"], whole: bool = True
    ) -> _Seen:
        """Statistics of a chunk; both whole distributions too, where something compares them."""
        batch = self.batch
        topk_logp = rollout_topk = None
        if "topk" in self.needs and batch.topk_ids is not None:
            topk_logp, rollout_topk = normalised.gather(1, batch.topk_ids[rows]), _rows(batch.rollout_topk_logp, rows)
        tokens = TokenStats(
            logp=_gather(normalised, batch.targets[rows]),
            rollout_logp=batch.rollout_logp[rows],
            advantage=batch.advantage[rows],
            recomputed_logp=_rows(batch.recomputed_logp, rows),
            topk_logp=topk_logp,
            rollout_topk_logp=rollout_topk,
            entropy=_entropy(normalised, probabilities, self.room),
            sequence=batch.sequence[rows],
            position=batch.position[rows],
        )
        if not whole or "full" not in self.needs:
            return _Seen(tokens, None)
        return _Seen(tokens, replace(tokens, topk_logp=normalised, rollout_topk_logp=self._rollout_table(rows)))

    def _rollout_table(self, rows: slice) -> Float[Tensor, "n V"]:
        """log mu at every id, rebuilt from the hidden states and the projection of rollout time."""
        head, hidden = self.head, self.batch.rollout_hidden
        if hidden is None or head.rollout_weight is None:
            raise TokenStatsError(
                'a whole-vocabulary divergence ("full") needs rollout_hidden in the batch and, before the rollout\'s '
                "first step, PolicyHead.remember_rollout()"
            )
        tables = self.rollout_tables
        assert tables is not None
        table = head.logits(hidden[rows], head.rollout_weight, head.rollout_bias, tables)
        _normalise_(table, None, tables.room)
        return table

    def _differentiate(self, seen: _Seen, rows: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """Weighted loss of these tokens and its derivatives by log-prob and entropy; statistics are collected."""
        tokens = seen.by(self.objective.region)
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

    def _diagnose(self, seen: _Seen) -> None:
        for name, region in self.diagnostics.items():
            tokens = seen.by(region)
            check_tokens(region, tokens)
            self.collected.setdefault(f"diagnostics/{name}", []).append(region.divergence(tokens))

    def _collect(self, tokens: TokenStats, result: TokenLoss) -> None:
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
        """First pass of a sequence-scope region: statistics of every token, the region on all of them at once."""
        pieces: list[TokenStats] = []  # [N] and [N, K + 1] only: a whole-vocabulary region is never of this scope
        for rows in self._chunks(len(hidden)):
            normalised, probabilities, _ = self._distribution(hidden[rows], weight, bias)
            pieces.append(self._see(rows, normalised, probabilities, whole=False).tokens)
        loss, grad_logp, grad_entropy = self._differentiate(_Seen(_concatenated(pieces), None), slice(None))
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
            entropy=joined.get("entropy", none),
            kl=joined.get("kl"),
            diagnostics={name: joined.get(f"diagnostics/{name}", none) for name in self.diagnostics},
        )


@dataclass(frozen=True)
class _Seen:
    """Statistics of a chunk's tokens, and the same with both whole distributions as their top-K tables."""

    tokens: TokenStats
    whole: TokenStats | None

    def by(self, region: TrustRegion) -> TokenStats:
        """What ``region`` is given."""
        return self.whole if self.whole is not None and "full" in region.needs else self.tokens


@dataclass(frozen=True)
class _Planned:
    loss: Tensor
    grad_logp: Float[Tensor, " N"]
    grad_entropy: Float[Tensor, " N"] | None


class _Gradients:
    """Gradients of hidden states, weight and bias; those of the parameters are summed in fp32."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.product_weight = weight.detach().to(_product_dtype(weight))
        self.hidden = torch.zeros_like(hidden)
        self.weight = torch.zeros_like(weight, dtype=torch.float32)
        self.bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)

    def add(
        self,
        rows: slice,
        grad: Float[Tensor, "n V"],
        hidden: Float[Tensor, "n H"],
        moved: Bool[Tensor, " n"],
        tables: _Tables,
    ) -> None:
        """Add a chunk; tokens that are not ``moved`` (no advantage, or masked) have no gradient, and cost none."""
        if self.bias is not None:
            self.bias += grad.sum(dim=0)
        index = moved.nonzero().squeeze(1)
        few = len(index) < 0.9 * len(hidden)
        if few:
            grad = torch.index_select(grad, 0, index, out=tables.logits[: len(index)])
            hidden = hidden[index]
        dtype = self.product_weight.dtype
        product = grad if dtype == torch.float32 else tables.product[: len(grad)].copy_(grad)
        into = self.hidden[rows]
        if few:
            into[index] = (product @ self.product_weight).to(into.dtype)
        elif into.dtype == dtype:
            torch.mm(product, self.product_weight, out=into)
        else:
            into.copy_(product @ self.product_weight)
        if dtype == torch.float32:
            self.weight.addmm_(product.t(), hidden.float())
        else:
            self._add_rounded(product, hidden.to(dtype))

    def _add_rounded(self, product: Float[Tensor, "n V"], hidden: Float[Tensor, "n H"]) -> None:
        """Sum in fp32 what is multiplied in less, a piece of the vocabulary at a time, so that no second [V, H] is."""
        pieces = zip(self.weight.split(_PIECE), product.split(_PIECE, dim=1), strict=True)
        for weight, piece in pieces:
            weight += piece.t() @ hidden


_PIECE = 4096


class _GradientInForward(torch.autograd.Function):
    """A scalar whose gradients are ready when it is; they are given away by the one backward pass that there can be."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, work: _Work) -> Tensor:
        dtype = _product_dtype(weight)
        with torch.autocast(hidden.device.type, enabled=False):
            product_weight = weight.to(dtype)
            loss, grad_hidden, grad_weight, grad_bias = work.run(hidden, product_weight, bias)
        ctx.gradients = (
            grad_hidden,
            grad_weight.to(weight.dtype),
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


def _normalise_(
    logits: Float[Tensor, "n V"], probabilities: Float[Tensor, "n V"] | None, room: Float[Tensor, "r V"]
) -> Float[Tensor, "n 1"]:
    """Log-softmax in place, and softmax into ``probabilities``; returns the log of the sum of exponentials.

    Plain passes over memory that is there: on the CPU torch's logsumexp takes ten times as long, most of it for pages
    of a temporary.
    """
    largest = logits.amax(dim=-1, keepdim=True)
    logits.sub_(largest)
    if probabilities is None:
        total = _row_sums(room, len(logits), lambda rows, out: torch.exp(logits[rows], out=out))[:, None]
    else:
        total = torch.exp(logits, out=probabilities).sum(dim=-1, keepdim=True)
        probabilities.div_(total)
    log_total = total.log()
    logits.sub_(log_total)
    return log_total + largest


def _entropy(
    normalised: Float[Tensor, "n V"], probabilities: Float[Tensor, "n V"], room: Float[Tensor, "r V"]
) -> Float[Tensor, " n"]:
    def products(rows: slice, out: Tensor) -> Tensor:
        return torch.mul(probabilities[rows], normalised[rows], out=out)

    return _row_sums(room, len(normalised), products).neg_()


def _row_sums(room: Float[Tensor, "r V"], n: int, write: Callable[[slice, Tensor], Tensor]) -> Float[Tensor, " n"]:
    """Sums over the vocabulary of what ``write`` puts for n rows into a room of r."""
    sums = torch.empty(n, dtype=room.dtype, device=room.device)
    for start in range(0, n, len(room)):
        rows = slice(start, min(start + len(room), n))
        torch.sum(write(rows, room[: rows.stop - start]), dim=-1, out=sums[rows])
    return sums


def _logit_gradient_(
    normalised: Float[Tensor, "n V"],
    probabilities: Float[Tensor, "n V"],
    targets: Int[Tensor, " n"],
    grad_logp: Float[Tensor, " n"],
    grad_entropy: Float[Tensor, " n"] | None,
    room: Float[Tensor, "r V"],
) -> Float[Tensor, "n V"]:
    """dloss/dlogits = g (1[target] - p) - e p (log p + H), written over ``probabilities``."""
    if grad_entropy is None:
        probabilities.mul_(-grad_logp[:, None])
    else:
        entropy = _entropy(normalised, probabilities, room)[:, None]
        probabilities.mul_(-grad_logp[:, None] - grad_entropy[:, None] * (normalised + entropy))
    return probabilities.scatter_add_(1, targets[:, None], grad_logp[:, None])


def _product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of the head's matrix products: autocast's where it is on, else the weight's."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _gather(table: Float[Tensor, "n V"], ids: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    return table.gather(1, ids[:, None]).squeeze(1)


def _rows(value: Tensor | None, rows: slice) -> Tensor | None:
    return None if value is None else value[rows]


def _concatenated(pieces: list[TokenStats]) -> TokenStats:
    columns = {item.name: [getattr(piece, item.name) for piece in pieces] for item in fields(TokenStats)}
    joined: dict[str, Any] = {
        name: None if values[0] is None else torch.cat(values) for name, values in columns.items()
    }
    return TokenStats(**joined)
