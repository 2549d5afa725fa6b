"""What every model has to pass when it is loaded: the trainer computes the log-probs that the model itself computes.

The model itself, with transformers' plain ("eager") attention and in evaluation mode, is asked for the logits of two
sequences, each alone. The trainer is asked for the same log-probs in the ways that it will compute them: as rows and
packed, alone and beside each other, in training mode. Under two hundred tokens in all.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from dppo_lightning.base.batch import TrainingBatch, pack
from dppo_lightning.base.errors import ConfigError, one_line
from dppo_lightning.base.packing import Layout
from dppo_lightning.base.pretrained import backbone_name
from dppo_lightning.base.records import Completion, Prompt, Sequence
from dppo_lightning.sync.named_weights import in_shards, whole_as_it_runs
from dppo_lightning.train import attention
from dppo_lightning.train.head import PolicyHead
from dppo_lightning.train.logits import LogitTransform

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.5}
"""Largest difference of a log-prob, by the dtype of the weights, in nats. Two float32 kernels differ by some 1e-5."""

DRAWS = 4
"""Times that other tokens are drawn before a difference counts. A mixture of experts whose router ties to the last bit
may choose another expert in another kernel; what is wrong with a model shows on any tokens."""

PROMPT, SHORT, LONG = 12, 6, 20
"""Tokens that both sequences begin with, and that each adds. The beginning is long enough to be shared when packed."""


SCARCE = 4
"""Attention that keeps a few chosen tokens keeps so many in the check, or it would not have to choose."""

_BETWEEN = (
    "has logits that are not its hidden states times its output projection, scaled or capped: something lies between "
    "them"
)


class Checked(Protocol):
    """What is asked of a policy whose log-probs are checked."""

    model: PreTrainedModel
    head: PolicyHead

    def logp(self, batch: TrainingBatch) -> Float[Tensor, " N"]:
        """Log-probs of the generated tokens."""


@dataclass(frozen=True)
class Told:
    """What the model itself says of two sequences that begin alike.

    Attributes:
        model: Who says it.
        sequences: The shorter one, then the longer one.
        logits: For each [L, V], of every position.
        products: For each [L, V], of its last hidden states and its output projection.
    """

    model: PreTrainedModel
    sequences: list[Sequence]
    logits: list[Float[Tensor, "L V"]]
    products: list[Float[Tensor, "L V"]]

    @property
    def rounding(self) -> float:
        """Largest difference of a log-prob where the sequences begin alike, in nats: rounding, in a causal model."""
        prompt = int(self.sequences[0].generated[0])
        short, long = (logits[:prompt].float().log_softmax(-1) for logits in self.logits)
        return _agreed(self.model, (short - long).abs().max())

    @property
    def tolerance(self) -> float:
        """Largest difference that is accepted, in nats: more in a model that rounds much by itself."""
        return max(TOLERANCE[self.logits[0].dtype], 4 * self.rounding)

    def logp(self, temperature: float) -> list[Float[Tensor, " T"]]:
        """Log-probs of each sequence's generated tokens."""
        found = []
        for sequence, logits in zip(self.sequences, self.logits, strict=True):
            table = (logits[torch.from_numpy(sequence.generated - 1)].float() / temperature).log_softmax(-1)
            ids = torch.from_numpy(sequence.token_ids[sequence.generated]).to(table.device)
            found.append(table.gather(1, ids[:, None])[:, 0])
        return found

    def transform(self, temperature: float) -> LogitTransform:
        """From the products to the logits.

        Raises:
            ConfigError: They are not scaled, capped or both.
        """
        config = self.model.config.get_text_config()
        found = LogitTransform.of_model(config, torch.cat(self.products), torch.cat(self.logits), temperature)
        if found is None:
            raise ConfigError(f"{_it(self.model)} {_BETWEEN}")
        return found


def _it(model: PreTrainedModel) -> str:
    """How a message names the model."""
    return f"model.policy: {type(model).__name__} cannot be trained: it"


@contextmanager
def as_loaded(model: PreTrainedModel, longest: int | None = None) -> Generator[None, None, None]:
    """Passes inside are in the dtype of the weights, without gradient, and every weight is there when it is used.

    Collective where the weights are in shards.

    Args:
        model: The one that is checked inside.
        longest: Length of the longest sequence of the run; None: the model's context.
    """
    device, default = next(model.parameters()).device.type, torch.get_default_dtype()
    products = torch.get_float32_matmul_precision()
    torch.set_default_dtype(torch.float32)  # a precision plugin of "bf16-true" has set another while models are made
    torch.set_float32_matmul_precision("highest")  # a user may have allowed less, which would hide what is wrong
    try:
        with torch.no_grad(), torch.autocast(device, enabled=False), whole_as_it_runs(model), _choosing(model, longest):
            yield
    finally:
        torch.set_default_dtype(default)
        torch.set_float32_matmul_precision(products)


@contextmanager
def _choosing(model: PreTrainedModel, longest: int | None) -> Generator[None, None, None]:
    """Attention that keeps fewer tokens than the longest sequence has (DeepSeek V3.2) chooses in short ones too."""
    length = longest or getattr(model.config.get_text_config(), "max_position_embeddings", None) or float("inf")
    choosers: list[Any] = [module for module in model.modules() if isinstance(getattr(module, "index_topk", None), int)]
    kept = [chooser.index_topk for chooser in choosers]
    for chooser, k in zip(choosers, kept, strict=True):
        chooser.index_topk = min(k, SCARCE) if k < length else k
    try:
        yield
    finally:
        for chooser, k in zip(choosers, kept, strict=True):
            chooser.index_topk = k


def ask(model: PreTrainedModel, seed: int = 0) -> Told:
    """Run the model itself on two sequences; within ``as_loaded``.

    Raises:
        ConfigError: It cannot be run on ids alone, or what it says of a token depends on what comes after it.
    """
    sequences = _draw(model, seed)
    backbone, projection = model.get_submodule(backbone_name(model)), model.get_output_embeddings()
    logits, products = [], []
    with _eager(model), _evaluating(model), _outputs(backbone) as states:
        for sequence in sequences:
            ids = torch.from_numpy(sequence.token_ids)[None].to(projection.weight.device)
            try:
                answer = model(input_ids=ids, use_cache=False).logits
                if not states:  # Bart's and OPT's decoders are called by another door
                    backbone(input_ids=ids, use_cache=False)
                hidden = states.pop().last_hidden_state.to(projection.weight.dtype)
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
                raise ConfigError(f"{_it(model)} cannot be run on token ids alone: {one_line(error)}") from error
            if hidden.shape[-1] != projection.weight.shape[1]:
                raise ConfigError(f"{_it(model)} {_BETWEEN}")
            product = functional.linear(hidden, projection.weight, getattr(projection, "bias", None))
            if product.shape != answer.shape:
                raise ConfigError(
                    f"{_it(model)} gives logits of {tuple(answer.shape)} for an output projection of "
                    f"{tuple(product.shape)}"
                )
            logits.append(answer[0])
            products.append(product[0])
    told = Told(model, sequences, logits, products)
    if not told.rounding <= 10 * TOLERANCE[told.logits[0].dtype]:
        raise ConfigError(f"{_it(model)} is not causal: a token's log-probs depend on which or how many come after it")
    return told


def check(policy: Checked, told: Told, shared_prompts: bool) -> tuple[Layout, str]:
    """Find the way of computing in which the policy's log-probs are the model's; within ``as_loaded``.

    Args:
        policy: Its attention is set to what is found.
        told: Of the same model.
        shared_prompts: Whether sequences may be packed.

    Returns:
        The layout, and why it is not "packed" if it is not.

    Raises:
        ConfigError: No way of computing gives the model's own log-probs.
    """
    model = policy.model
    loaded = model.config._attn_implementation
    error = None
    for implementation in dict.fromkeys((loaded, "eager")):
        if implementation != loaded:
            _set_attention(model, implementation)
        error = _difference(policy, told, "rows")
        if error is None:
            break
    if error is not None:
        raise ConfigError(f"{_it(model)} {error}")
    if not shared_prompts:
        return "rows", "shared_prompts is off"
    if not attention.supports_segments(model):
        return "rows", "its attention cannot be replaced"
    rows = model.config._attn_implementation
    model.set_attn_implementation(attention.NAME)
    error = _difference(policy, told, "packed")
    if error is None:
        return "packed", ""
    model.set_attn_implementation(rows)
    log.info(f"{type(model).__name__} is trained in rows: packed, it {error}")
    return "rows", f"packed, it {error}"


def _difference(policy: Checked, told: Told, layout: Layout) -> str | None:
    """What is wrong with the policy's log-probs in this layout, or None."""
    for draw in range(DRAWS):
        if draw:
            told = ask(policy.model, draw)
        found = _compare(policy, told, layout)
        if found is None:
            return None
    return found


def _compare(policy: Checked, told: Told, layout: Layout) -> str | None:
    """The shorter sequence is computed twice, alone and beside the longer one; what differs is computed once more."""
    short, both, tolerance = told.sequences[:1], told.sequences, told.tolerance
    expected = told.logp(policy.head.transform.temperature)

    def gap(a: Tensor, b: Tensor) -> float:
        return _agreed(policy.model, (a - b).abs().max())

    try:
        alone, beside = _logp(policy, short, layout), _logp(policy, both, layout)
        wrong_alone, wrong = gap(alone, expected[0]), gap(beside, torch.cat(expected))
        if max(wrong_alone, wrong) <= tolerance:
            return None
        noise = max(gap(alone, _logp(policy, short, layout)), gap(beside, _logp(policy, both, layout)))
    except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        return f"cannot be run: {one_line(error)}"
    if noise > tolerance:
        return f"gives log-probs that differ by {noise:.2g} nats from one pass to the next: it draws random numbers"
    if wrong_alone > tolerance:
        return f"gives log-probs that differ by {wrong_alone:.2g} nats from those of its own logits"
    return f"gives log-probs that depend, by {wrong:.2g} nats, on the sequences beside"


def _logp(policy: Checked, sequences: list[Sequence], layout: Layout) -> Float[Tensor, " N"]:
    batch = pack(sequences, np.zeros(len(sequences)), layout).to(policy.head.weight.device)
    return policy.logp(batch)


def _agreed(model: nn.Module, value: Tensor) -> float:
    """The largest of all ranks where every rank must decide alike, because the next pass needs them all."""
    value = torch.nan_to_num(value.float(), nan=torch.inf)
    if in_shards(model):
        torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
    return float(value)


def _draw(model: PreTrainedModel, seed: int) -> list[Sequence]:
    """Two sequences of ids that mean nothing special to the model, no longer than its context."""
    config, rng = model.config.get_text_config(), np.random.default_rng(seed)
    context = getattr(config, "max_position_embeddings", None) or PROMPT + LONG
    long = max(2, min(LONG, context - PROMPT))
    short, prompt = min(SHORT, long - 1), max(1, min(PROMPT, context - long))
    ordinary = np.setdiff1d(np.arange(config.vocab_size), list(_special(model.config.to_dict())))
    ids = rng.choice(ordinary, prompt + short + long)
    return [_sequence(ids[:prompt], rest) for rest in np.split(ids[prompt:], [short])]


def _sequence(prompt: np.ndarray, tokens: np.ndarray) -> Sequence:
    zeros = np.zeros(len(tokens), np.int64)
    completion = Completion("check", tokens, zeros.astype(np.float32), "stop", zeros)
    return Sequence.from_completion(Prompt("check", tuple(prompt.tolist()), ""), completion, 0.0)


def _special(config: Any) -> Iterator[int]:
    """Ids that a config names: ends, padding, places of images."""
    if not isinstance(config, dict):
        return
    for key, value in config.items():
        if isinstance(key, str) and "token" in key and key.rpartition("_")[2] in ("id", "ids", "index"):
            yield from (entry for entry in (value if isinstance(value, list) else [value]) if isinstance(entry, int))
        else:
            yield from _special(value)


@contextmanager
def _eager(model: PreTrainedModel) -> Generator[None, None, None]:
    before = model.config._attn_implementation
    _set_attention(model, "eager")
    try:
        yield
    finally:
        _set_attention(model, before)


def _set_attention(model: PreTrainedModel, implementation: str) -> None:
    if model._can_set_attn_implementation():  # a model without transformers' interface has one way to compute
        model.set_attn_implementation(implementation)


@contextmanager
def _evaluating(model: nn.Module) -> Generator[None, None, None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _outputs(module: nn.Module) -> Generator[list[Any], None, None]:
    """What the module returns, call by call."""
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()
