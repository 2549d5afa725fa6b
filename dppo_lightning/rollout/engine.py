"""RolloutEngine: generation behind one interface.

An engine is built cheaply from its settings (so that a config can be parsed and printed), and starts when ``start`` is
called. It must behave as a pure function of (weights, prompt, seed): the same request under the same weights gives the
same tokens, whatever else is in flight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from dppo_lightning.errors import ConfigError
from dppo_lightning.records import Completion


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Args:
        temperature: Divides the logits; > 0, or 0 for greedy decoding (evaluation only).
        top_p: Nucleus mass kept, in (0, 1]; below 1 only in evaluation.
        top_k: Number of most likely tokens kept; 0 keeps all; above 0 only in evaluation.
        max_new_tokens: Longest completion, in tokens; >= 1.
        topk_logprobs: How many of the most likely tokens to report per position; 0 reports the sampled token only.

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
    """One completion to generate.

    Attributes:
        id: Unique among the requests in flight.
        prompt_token_ids: At least one id.
        sampling: How tokens are drawn.
        seed: Of this request alone; [0, 2**63).
        group: Requests of one group share their prompt; an engine may use it to share the prefix.
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
    """What an engine needs to know of the run.

    Attributes:
        model: Hugging Face id or folder whose architecture and initial weights the engine loads.
        dtype: "float32", "bfloat16" or "float16": the dtype of the engine's weights.
        max_model_len: Longest prompt plus completion, in tokens.
        max_logprobs: Largest ``topk_logprobs`` that will be asked for.
        stop_token_ids: Ids that end a completion; the id is part of the completion.
        seed: Of the engine's own generator; every request carries its own seed besides.
    """

    model: str
    dtype: str = "float32"
    max_model_len: int = 2048
    max_logprobs: int = 0
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class UpdateStats:
    """What one weight update cost: tensors and bytes sent, seconds taken, and the version now in force."""

    tensors: int
    bytes: int
    seconds: float
    version: int


@dataclass(frozen=True)
class Health:
    """State of an engine: can it serve, which weight version it holds, requests in flight, and what it is."""

    alive: bool
    version: int
    in_flight: int
    description: str


class RolloutEngine(ABC):
    """Generates completions. Not thread-safe: one caller, the rollout stream.

    Attributes:
        adapter_rank: With a rank ``update_weights`` takes LoRA adapters alone, see rollout/adapters.py; with None every
            weight.
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
        """State of the engine; never raises for a dead one."""

    @abstractmethod
    def close(self) -> None:
        """Stop, and leave no process, file or shared memory behind. Safe to call twice."""
