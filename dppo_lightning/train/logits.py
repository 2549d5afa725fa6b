"""Arithmetic on one chunk of logits: normalising, gradients, and sums that outlive the chunk. Used by head.py alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class LogitTransform:
    """Map from the LM head's product z to the logits that are sampled from: softcap(z * scale) / temperature.

    Args:
        scale: Multiplies z (Cohere's ``logit_scale``, one over Granite's ``logits_scaling``), > 0.
        softcap: cap * tanh(z / cap) (Gemma's ``final_logit_softcapping``); None for none.
        temperature: Temperature of sampling, > 0.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @classmethod
    def of_model(
        cls, config: Any, product: Float[Tensor, "n V"], logits: Float[Tensor, "n V"], temperature: float
    ) -> LogitTransform | None:
        """Find the transform that makes the model's own ``logits`` of the ``product``; None where there is none.

        Scales and caps stand in configs under a dozen names, and the same name multiplies in one model and divides in
        another: so a config says which numbers there are, and the model's logits say what is done with them.

        Args:
            config: Hugging Face config.
            product: Product of the model's last hidden states and its output projection.
            logits: What the model made of it, in the same pass.
            temperature: Temperature of sampling.
        """
        step = max(1, product.numel() // _COMPARED)
        z, y = (table.flatten()[::step].double() for table in (product, logits))
        if not z.any():
            return None
        rounding = 16 * torch.finfo(logits.dtype).eps
        numbers = _numbers(config)
        named = [n for key, n in numbers.items() if "cap" in key and not key.startswith("attn")]
        for softcap in (*named, None, *numbers.values()):
            scale = _scale(z, y, softcap, numbers.values(), rounding)
            if scale is None:
                continue
            found = cls(scale, softcap)
            if (found.apply_(z.clone()) - y).abs().max() <= rounding * y.abs().max():
                return replace(found, temperature=temperature)
        return None

    def apply_(self, z: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
        """Transform in place."""
        if self.scale != 1.0:
            z.mul_(self.scale)
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z.div_(self.temperature) if self.temperature != 1.0 else z

    def backward_(self, grad: Float[Tensor, "n V"], logits: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
        """Turn dloss/dlogits into dloss/dz, in place; ``logits`` is what ``apply_`` returned."""
        if self.softcap is not None:
            tanh = logits * (self.temperature / self.softcap)
            grad.mul_(1 - tanh.square_())
        factor = self.scale / self.temperature
        return grad.mul_(factor) if factor != 1.0 else grad


_COMPARED = 1 << 14


def _numbers(config: Any) -> dict[str, float]:
    """Find every positive number that stands in a config, by name."""
    named = config.to_dict().items()
    return {key: float(n) for key, n in named if type(n) in (int, float) and 0 < n < float("inf")}


def _scale(
    z: Float[Tensor, " n"], y: Float[Tensor, " n"], softcap: float | None, numbers: Iterable[float], exact: float
) -> float | None:
    """Find the factor by which z becomes y under this softcap: the config's own number where one is that near."""
    if softcap is not None:
        steep = y.abs() < 0.9 * softcap  # beyond, y says little about z
        z, y = z[steep], softcap * torch.atanh(y[steep] / softcap)
    if not z.any():
        return None
    measured = float((z @ y) / (z @ z))
    if measured <= 0:
        return None
    candidates = (1.0, *(n for number in numbers for n in (number, 1 / number)))
    nearest = min(candidates, key=lambda n: abs(n - measured))
    return nearest if abs(nearest / measured - 1) < exact else measured


class Tables:
    """Memory of one chunk, written anew by every chunk: fresh pages each time cost the CPU more than the arithmetic."""

    def __init__(self, tokens: int, weight: Float[Tensor, "V H"], probabilities: bool = True) -> None:
        shape, device, dtype = (tokens, weight.shape[0]), weight.device, product_dtype_of(weight)
        self.logits = torch.empty(shape, dtype=torch.float32, device=device)
        self.probabilities = torch.empty_like(self.logits if probabilities else self.logits[:0])
        rows = max(1, min(tokens, (1 << 20) // shape[1]))  # fits a cache
        self.scratch = torch.empty((rows, shape[1]), dtype=torch.float32, device=device)
        self.product = self.logits if dtype == torch.float32 else torch.empty(shape, dtype=dtype, device=device)


class Gradients:
    """Gradients of hidden states, weight and bias; those of the parameters are summed in fp32.

    A parameter that is not ``trained`` (weight, bias) has none: a third of the head's arithmetic is then spared.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, trained: tuple[bool, bool] = (True, True)
    ) -> None:
        self.product_weight = weight.detach().to(product_dtype_of(weight))
        self.hidden = torch.zeros_like(hidden)
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if trained[0] else None
        self.bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and trained[1] else None

    def add(
        self,
        rows: slice,
        grad: Float[Tensor, "n V"],
        hidden: Float[Tensor, "n H"],
        moved: Bool[Tensor, " n"],
        tables: Tables,
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
        if self.weight is None:
            return
        if dtype == torch.float32:
            self.weight.addmm_(product.t(), hidden.float())
        else:
            _add_rounded(self.weight, product, hidden.to(dtype))


def _add_rounded(total: Float[Tensor, "V H"], product: Float[Tensor, "n V"], hidden: Float[Tensor, "n H"]) -> None:
    """Add product.T @ hidden to a sum in fp32, a piece of the vocabulary at a time: a second [V, H] is never made."""
    for part, piece in zip(total.split(_PIECE), product.split(_PIECE, dim=1), strict=True):
        part += piece.t() @ hidden


_PIECE = 4096


def normalise_(
    logits: Float[Tensor, "n V"], probabilities: Float[Tensor, "n V"] | None, scratch: Float[Tensor, "r V"]
) -> Float[Tensor, "n 1"]:
    """Log-softmax in place, and softmax into ``probabilities``; returns the log of the sum of exponentials.

    Plain passes over memory that is there: on the CPU torch's logsumexp takes ten times as long, most of it for pages
    of a temporary.
    """
    largest = logits.amax(dim=-1, keepdim=True)
    logits.sub_(largest)
    if probabilities is None:
        total = row_sums(scratch, len(logits), lambda rows, out: torch.exp(logits[rows], out=out))[:, None]
    else:
        total = torch.exp(logits, out=probabilities).sum(dim=-1, keepdim=True)
        probabilities.div_(total)
    log_total = total.log()
    logits.sub_(log_total)
    return log_total + largest


def entropy_of(
    normalised: Float[Tensor, "n V"], probabilities: Float[Tensor, "n V"], scratch: Float[Tensor, "r V"]
) -> Float[Tensor, " n"]:
    def products(rows: slice, out: Tensor) -> Tensor:
        return torch.mul(probabilities[rows], normalised[rows], out=out)

    return row_sums(scratch, len(normalised), products).neg_()


def row_sums(scratch: Float[Tensor, "r V"], n: int, write: Callable[[slice, Tensor], Tensor]) -> Float[Tensor, " n"]:
    """Sum over the vocabulary what ``write`` puts for n rows into ``scratch``, r rows at a time."""
    sums = torch.empty(n, dtype=scratch.dtype, device=scratch.device)
    for start in range(0, n, len(scratch)):
        rows = slice(start, min(start + len(scratch), n))
        torch.sum(write(rows, scratch[: rows.stop - start]), dim=-1, out=sums[rows])
    return sums


def logit_gradient_(
    normalised: Float[Tensor, "n V"],
    probabilities: Float[Tensor, "n V"],
    targets: Int[Tensor, " n"],
    grad_logp: Float[Tensor, " n"],
    grad_entropy: Float[Tensor, " n"] | None,
    scratch: Float[Tensor, "r V"],
) -> Float[Tensor, "n V"]:
    """Write dloss/dlogits = g (1[target] - p) - e p (log p + H) over ``probabilities``."""
    if grad_entropy is None:
        probabilities.mul_(-grad_logp[:, None])
    else:
        entropy = entropy_of(normalised, probabilities, scratch)[:, None]
        probabilities.mul_(-grad_logp[:, None] - grad_entropy[:, None] * (normalised + entropy))
    return probabilities.scatter_add_(1, targets[:, None], grad_logp[:, None])


def product_dtype_of(weight: Tensor) -> torch.dtype:
    """Dtype of the head's matrix products: autocast's where it is on, else the weight's."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def sums_in_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether products are left unrounded: where ``unrounded_product`` can make them."""
    return dtype == torch.bfloat16 and device.type == "cpu"


def unrounded_product(
    hidden: Float[Tensor, "n H"], weight: Float[Tensor, "V H"], out: Float[Tensor, "n V"] | None = None
) -> Float[Tensor, "n V"]:
    """Compute hidden @ weight.T of bf16 numbers, multiplied as bf16, summed and returned in float32; on the CPU.

    ``torch.mm`` of bf16 tensors rounds its result to bf16, and its ``out_dtype`` is for GPUs. But a float32 product
    that may be computed in bf16 rounds its arguments, which bf16 numbers survive, and nothing else. A piece of the
    vocabulary at a time, so that there is no float32 copy of the weight.
    """
    states = hidden.to(torch.bfloat16).float()
    if out is None:
        out = torch.empty((len(states), len(weight)), dtype=torch.float32, device=states.device)
    products: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # added when torch loads
    allowed, products.fp32_precision = products.fp32_precision, "bf16"
    try:
        with torch.autocast("cpu", enabled=False):
            for start in range(0, len(weight), _PIECE):
                piece = slice(start, start + _PIECE)
                torch.mm(states, weight[piece].to(torch.bfloat16).float().t(), out=out[:, piece])
    finally:
        products.fp32_precision = allowed
    return out


def gather(table: Float[Tensor, "n V"], ids: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    return table.gather(1, ids[:, None]).squeeze(1)
