"""ScriptedEngine: an engine without a model, for tests of everything that uses one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from dppo_lightning.base.errors import EngineError
from dppo_lightning.base.records import Completion, FinishReason
from dppo_lightning.generate.engine import (
    EngineSpec,
    ExpectedWeights,
    Failed,
    Health,
    Request,
    RolloutEngine,
    UpdateStats,
    refusal,
)

Script = Callable[[Request, int], tuple[Sequence[int], Sequence[float]]]
"""Function that gives the token ids and the log-probs of a request's completion under a weight version."""


def random_script(vocabulary: int) -> Script:
    """Make a script of uniform tokens: a pure function of (version, prompt, seed), log-probs -log(vocabulary)."""

    def script(request: Request, version: int) -> tuple[Sequence[int], Sequence[float]]:
        generator = np.random.default_rng([version, request.seed, *request.prompt_token_ids])
        tokens = generator.integers(vocabulary, size=request.sampling.max_new_tokens).tolist()
        return tokens, [-float(np.log(vocabulary))] * len(tokens)

    return script


@dataclass
class _Flight:
    """Request in flight: when it began and will be due, and what earlier weights already wrote of it."""

    request: Request
    began: float
    due: float
    written: list[tuple[int, float, int]] = field(default_factory=list)  # (token, log-prob, version)


class ScriptedEngine(RolloutEngine):
    """Engine that answers from a script; tokens come evenly over a completion's delay, so updates meet it half-way.

    It has no top-K: a request for them fails.

    Args:
        script: Script of the answers, cut at the first stop id and at the length limits; None: uniform random tokens.
        vocabulary: Number of token ids.
        delay: Seconds that each completion takes, or a function of the request.
        real_time: Whether to wait in real seconds; otherwise ``poll`` moves a clock of its own and never sleeps.
        failures: Reasons for failures, request id -> the reason with which that request fails.
        dies_after: Number of completions that the engine delivers before it dies; None: it does not die.
        check_weights: Whether to refuse weights that are not those of ``spec.model``, as a real engine does.
    """

    def __init__(
        self,
        script: Script | None = None,
        vocabulary: int = 100,
        delay: float | Callable[[Request], float] = 0.0,
        real_time: bool = False,
        failures: Mapping[str, str] | None = None,
        dies_after: int | None = None,
        check_weights: bool = False,
    ) -> None:
        self.script = random_script(vocabulary) if script is None else script
        self.vocabulary = vocabulary
        self.delay = delay
        self.real_time = real_time
        self.failures = dict(failures or {})
        self.dies_after = dies_after
        self.check_weights = check_weights
        self.spec: EngineSpec | None = None
        self._now = 0.0
        self._reset()

    def _reset(self) -> None:
        self._flights: dict[str, _Flight] = {}
        self._arrived: list[Completion | Failed] = []
        self._paused_at: float | None = None
        self._delivered = 0
        self._version = 0

    @property
    def now(self) -> float:
        """Seconds on the engine's clock; it stands still while the engine is paused."""
        if self._paused_at is not None:
            return self._paused_at
        return time.monotonic() if self.real_time else self._now

    @property
    def in_flight(self) -> list[Request]:
        """Requests that are not answered yet, in the order in which they were submitted."""
        return [flight.request for flight in self._flights.values()]

    def start(self, spec: EngineSpec) -> None:
        self._reset()
        self.spec = spec
        self._expected = ExpectedWeights.of(spec.model) if self.check_weights else None

    def submit(self, requests: Sequence[Request]) -> None:
        spec = self._alive()
        for request in requests:
            reason = self.failures.get(request.id) or refusal(request, spec, self.vocabulary)
            if request.sampling.topk_logprobs:
                reason = reason or "a scripted engine has no top-K log-probs"
            if reason is not None:
                self._arrived.append(Failed(request.id, reason))
                continue
            delay = self.delay(request) if callable(self.delay) else self.delay
            self._flights[request.id] = _Flight(request, self.now, self.now + delay)

    def poll(self, timeout: float | None = None) -> list[Completion | Failed]:
        self._alive()
        if not self._arrived and self._flights and self._paused_at is None:
            wait = max(0.0, min(flight.due for flight in self._flights.values()) - self.now)
            self.advance(wait if timeout is None else min(wait, timeout))
            for flight in [flight for flight in self._flights.values() if flight.due <= self.now]:
                self._finish(flight)
        arrived, self._arrived = self._arrived, []
        return arrived

    def advance(self, seconds: float) -> None:
        """Let time pass: what is due by then is delivered by the next ``poll``.

        Args:
            seconds: Seconds by which the engine's clock goes on; in real time this call sleeps for as long.
        """
        if self.real_time:
            time.sleep(seconds)
        else:
            self._now += seconds

    def _finish(self, flight: _Flight) -> None:
        if self.dies_after is not None and self._delivered >= self.dies_after:
            self.spec = None
            raise EngineError("the scripted engine died, as it was told to")
        self._delivered += 1
        self._write(flight, 1.0)
        stopped = self._spec_stop(flight.written[-1][0])
        self._deliver(flight, "stop" if stopped else "length")

    def _write(self, flight: _Flight, share: float) -> None:
        """Write on as far as ``share`` of the completion, with the version in force."""
        assert self.spec is not None
        request = flight.request
        tokens, logps = self.script(request, self._version)
        left = self.spec.max_model_len - len(request.prompt_token_ids)
        left = min(left, request.sampling.max_new_tokens, len(tokens))
        written = flight.written
        while len(written) < int(share * left) and not (written and self._spec_stop(written[-1][0])):
            place = len(written)
            written.append((tokens[place], logps[place], self._version))

    def _spec_stop(self, token: int) -> bool:
        return self.spec is not None and token in self.spec.stop_token_ids

    def _deliver(self, flight: _Flight, reason: FinishReason) -> None:
        written = flight.written
        del self._flights[flight.request.id]
        self._arrived.append(
            Completion(
                request_id=flight.request.id,
                token_ids=np.array([token for token, _, _ in written], np.int64),
                logp=np.array([logp for _, logp, _ in written], np.float32),
                finish_reason=reason,
                versions=np.array([version for _, _, version in written], np.int64),
            )
        )

    def _share(self, flight: _Flight) -> float:
        return min(1.0, (self.now - flight.began) / max(flight.due - flight.began, 1e-9))

    def abort(self, ids: Iterable[str]) -> None:
        self._alive()
        for flight in [self._flights[name] for name in dict.fromkeys(ids) if name in self._flights]:
            self._write(flight, self._share(flight))
            self._deliver(flight, "abort")

    def pause(self) -> None:
        self._alive()
        self._paused_at = self.now

    def resume(self) -> None:
        self._alive()
        paused_at, self._paused_at = self._paused_at, None
        if paused_at is not None:
            for flight in self._flights.values():
                flight.began += self.now - paused_at
                flight.due += self.now - paused_at

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> UpdateStats:
        self._alive()
        started = time.perf_counter()
        sizes = [(name, tensor.shape, tensor.numel() * tensor.element_size()) for name, tensor in named_tensors]
        if self._expected is not None:
            self._expected.check({name: shape for name, shape, _ in sizes})
        for flight in self._flights.values():
            self._write(flight, self._share(flight))
        self._version = version
        return UpdateStats(len(sizes), sum(size for *_, size in sizes), time.perf_counter() - started, version)

    def health(self) -> Health:
        return Health(self.spec is not None, self._version, len(self._flights), "scripted")

    def close(self) -> None:
        self.spec = None
        self._reset()

    def _alive(self) -> EngineSpec:
        if self.spec is None:
            raise EngineError("the engine is not running: call start first")
        return self.spec
