"""RolloutEngine: generation behind one interface.

An engine is built cheaply from its settings (so that a config can be parsed and printed), and starts when ``start`` is
called. It must behave as a pure function of (weights, prompt, seed): the same request under the same weights gives the
same tokens, whatever else is in flight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from dppo_lightning.base.errors import ConfigError, SyncError
from dppo_lightning.base.pretrained import load_config
from dppo_lightning.base.records import Completion


@dataclass(frozen=True)
class Sampling:
    """Settings of how tokens are drawn.

    Args:
        temperature: Number that divides the logits; > 0, or 0 for greedy decoding (evaluation only).
        top_p: Nucleus mass kept, in (0, 1]; below 1 only in evaluation.
        top_k: Number of most likely tokens kept; 0 keeps all; above 0 only in evaluation.
        max_new_tokens: Longest completion, in tokens; >= 1.
        topk_logprobs: Number of most likely tokens to report at each position; 0 reports the sampled token only.

    Raises:
        ConfigError: A value is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    topk_logprobs: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError(f"temperature must be >= 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ConfigError(f"top_k must be >= 0 (0 keeps every token), got {self.top_k}")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be >= 1, got {self.max_new_tokens}")
        if self.topk_logprobs < 0:
            raise ConfigError(f"topk_logprobs must be >= 0, got {self.topk_logprobs}")

    def check_training(self) -> None:
        """Refuse truncated sampling, under which the recorded log-probs would not be those of the policy.

        Raises:
            ConfigError: ``top_p`` < 1, ``top_k`` > 0 or ``temperature`` = 0.
        """
        if self.top_p < 1:
            raise ConfigError(
                f"training with top_p={self.top_p} renormalises the sampling distribution and biases every ratio "
                "by the kept mass: set top_p to 1 (evaluation may truncate)"
            )
        if self.top_k > 0:
            raise ConfigError(
                f"training with top_k={self.top_k} renormalises the sampling distribution and biases every ratio "
                "by the kept mass: set top_k to 0 (evaluation may truncate)"
            )
        if self.temperature == 0:
            raise ConfigError("training with temperature=0 explores nothing: set temperature above 0, usually to 1")


@dataclass(frozen=True)
class Request:
    """Request for one completion.

    Attributes:
        id: Name, unique among the requests in flight.
        prompt_token_ids: Ids of the prompt, at least one.
        sampling: Settings of how tokens are drawn.
        seed: Seed of this request alone, in [0, 2**63).
        group: Name of the group; requests of one share their prompt, and an engine may share the prefix.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    seed: int
    group: str = ""


@dataclass(frozen=True)
class Failed:
    """A request that the engine could not serve; the engine itself lives on."""

    request_id: str
    reason: str


@dataclass(frozen=True)
class EngineSpec:
    """Facts of the run that an engine needs.

    Attributes:
        model: Hugging Face id or folder whose architecture and initial weights the engine loads.
        dtype: Dtype of the engine's weights: "float32", "bfloat16" or "float16".
        max_model_len: Longest prompt plus completion, in tokens.
        max_logprobs: Largest ``topk_logprobs`` that will be asked for.
        stop_token_ids: Ids that end a completion; the id is part of the completion.
        seed: Seed of the engine's own generator; every request carries its own seed besides.
    """

    model: str
    dtype: str = "float32"
    max_model_len: int = 2048
    max_logprobs: int = 0
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class UpdateStats:
    """Cost of one weight update: tensors and bytes sent, seconds taken; and the version now in force."""

    tensors: int
    bytes: int
    seconds: float
    version: int


@dataclass(frozen=True)
class Health:
    """State of an engine: whether it can serve, its weight version, number of requests in flight, and a description."""

    alive: bool
    version: int
    in_flight: int
    description: str


class RolloutEngine(ABC):
    """Base of everything that generates completions. Not thread-safe: one caller, the rollout stream.

    Attributes:
        adapter_rank: Rank of the LoRA adapters that ``update_weights`` takes, see vllm/adapters.py; None: it takes
            every weight.
    """

    adapter_rank: int | None = None

    @abstractmethod
    def start(self, spec: EngineSpec) -> None:
        """Load the model and be ready to serve, at weight version 0.

        Raises:
            EngineError: The engine cannot start; the message says what to change.
        """

    @abstractmethod
    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests; returns at once. A request that cannot be served comes back from ``poll`` as ``Failed``."""

    @abstractmethod
    def poll(self, timeout: float | None = None) -> list[Completion | Failed]:
        """Return what has finished since the last call, waiting up to ``timeout`` seconds for the first of it.

        ``None`` waits until something finishes; returns an empty list at once when nothing is in flight.

        Raises:
            EngineError: The engine died.
        """

    @abstractmethod
    def abort(self, ids: Iterable[str]) -> None:
        """Stop requests; ``poll`` reports each as a Completion with finish reason "abort", possibly empty."""

    @abstractmethod
    def pause(self) -> None:
        """Stop generating; requests in flight keep what they have."""

    @abstractmethod
    def resume(self) -> None:
        """Go on generating after ``pause``."""

    @abstractmethod
    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> UpdateStats:
        """Replace every weight, forget all cached prefixes, and stamp the tokens sampled from now on with ``version``.

        Names are those of the Hugging Face state dict; of tied parameters one name is enough.

        Raises:
            SyncError: A name is missing or unknown, or a shape differs; the engine then keeps its old weights.
        """

    @abstractmethod
    def health(self) -> Health:
        """Return the state of the engine; never raises for a dead one."""

    @abstractmethod
    def close(self) -> None:
        """Stop, and leave no process, file or shared memory behind. Safe to call twice."""


def refusal(request: Request, spec: EngineSpec, vocabulary: int) -> str | None:
    """Say why a request cannot be served, or None when it can.

    Args:
        request: Request to serve.
        spec: Facts that the engine was started with.
        vocabulary: Number of token ids that the model knows.
    """
    length = len(request.prompt_token_ids)
    if length == 0:
        return "the prompt is empty"
    if length >= spec.max_model_len:
        return f"the prompt has {length} tokens and leaves no room to generate below max_model_len {spec.max_model_len}"
    for token in (min(request.prompt_token_ids), max(request.prompt_token_ids)):
        if not 0 <= token < vocabulary:
            return f"token id {token} is outside the vocabulary of {vocabulary}"
    most = min(spec.max_logprobs, vocabulary)
    if request.sampling.topk_logprobs > most:
        return f"{request.sampling.topk_logprobs} log-probs a position were asked for, at most {most} are available"
    return None


class ExpectedWeights:
    """Names, shapes and ties of a Hugging Face model's parameters.

    Args:
        model: Model whose parameters they are.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        first_name = {id(parameter): name for name, parameter in reversed(list(model.named_parameters()))}
        every = model.named_parameters(remove_duplicate=False)
        self.canonical = {name: first_name[id(parameter)] for name, parameter in every}

    @classmethod
    def of(cls, name: str) -> ExpectedWeights:
        """Read them of a Hugging Face id or folder, without loading its weights."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(load_config(name), trust_remote_code=False)
        model.tie_weights()
        return cls(model)

    def once(self, named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield of tied parameters one, under the name that comes first in the model, and all others."""
        sent = set()
        for given, tensor in named_tensors:
            name = self.canonical.get(given, given)
            if name not in sent:
                sent.add(name)
                yield name, tensor

    def check(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Compare names and shapes; of tied parameters any one name will do.

        Raises:
            SyncError: A name is unknown or missing, or a shape differs.
        """
        unknown = [name for name in shapes if name not in self.canonical]
        given = {self.canonical[name]: tuple(shape) for name, shape in shapes.items() if name in self.canonical}
        missing = [name for name in self.shapes if name not in given]
        wrong = [f"{name} {given[name]} for {self.shapes[name]}" for name in given if given[name] != self.shapes[name]]
        problems = [
            f"{what}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            for what, names in (("missing", missing), ("unknown", unknown), ("wrong shape", wrong))
            if names
        ]
        if problems:
            raise SyncError(f"weight update refused, the engine keeps its weights ({'; '.join(problems)})")
