"""WeightSync: the engine holds the policy's weights, and proves it after every update."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dppo_lightning.batch import Completion, Prompt, Sequence
from dppo_lightning.errors import SyncError
from dppo_lightning.rollout.engine import Request, Sampling
from dppo_lightning.rollout.inbox import Inbox

TOLERANCE = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}
"""Largest |log-prob difference| accepted on the probe, by the coarser dtype of trainer and engine, in nats.

Float32 engines were measured at 3e-5 on a 135M model. A bf16 engine differs from an fp32 trainer by 0.04 on average and
several times that on rare tokens. An engine with stale weights after one large update, or with a stale output
projection, is off by about 1.
"""


@dataclass(frozen=True)
class SyncReport:
    """What a sync did: seconds in all, bytes sent, version in force, and the probe's largest log-prob difference."""

    seconds: float
    bytes: int
    version: int
    parity_error: float


class WeightSync:
    """Sends weights and compares log-probs.

    The probe is an ordinary request: it goes through the engine's sampling path, prefix cache included, and what the
    engine reports for each sampled token is compared with the trainer's log-prob for it.

    Args:
        inbox: Of a started engine; other requests may be in flight.
        probe: The prompt of the probe.
        sampling: As in training, so that temperature is compared too; at most 16 tokens are generated.
        tolerance: Largest accepted difference, in nats.
        trainer_logp: Log-probs [T] of a sequence's generated tokens under the trainer's current weights.
    """

    def __init__(
        self,
        inbox: Inbox,
        probe: Prompt,
        sampling: Sampling,
        tolerance: float,
        trainer_logp: Callable[[Sequence], np.ndarray],
    ) -> None:
        self.inbox = inbox
        self.probe = probe
        self.sampling = Sampling(sampling.temperature, max_new_tokens=min(16, sampling.max_new_tokens))
        self.tolerance = tolerance
        self.trainer_logp = trainer_logp
        self.report: SyncReport | None = None  # of the last push

    def in_force(self, version: int) -> bool:
        """Whether the engine holds these weights: they were the last that it was given, and it says so itself."""
        return self.report is not None and self.report.version == version == self.inbox.engine.health().version

    def push(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> SyncReport:
        """Send the weights as ``version`` and probe; requests in flight stand still meanwhile and go on with them.

        Raises:
            SyncError: Names or shapes differ, the engine reports another version, or the log-probs differ.
        """
        started = time.perf_counter()
        engine, interrupted = self.inbox.engine, self.inbox.in_flight > 0
        if interrupted:
            engine.pause()
        try:
            stats = engine.update_weights(named_tensors, version)
        finally:
            if interrupted and engine.health().alive:  # a refused update must not leave it paused
                engine.resume()
        self.report = None  # until the probe has shown it
        parity_error = self._probe(version)
        self.report = SyncReport(time.perf_counter() - started, stats.bytes, version, parity_error)
        return self.report

    def _probe(self, version: int) -> float:
        completion = self._generate(version)
        if not (completion.versions == version).all():
            raise SyncError(f"the engine generated with weight version {completion.versions.max()}, not {version}")
        sequence = Sequence.from_completion(self.probe, completion, advantage=0.0)
        error = float(np.abs(self.trainer_logp(sequence) - completion.logp).max())
        if not error <= self.tolerance:
            raise SyncError(
                f"after the update to version {version} the log-probs of engine and trainer differ by {error:.3g} "
                f"(tolerance {self.tolerance:g}): the engine does not hold the policy's weights, or is coarser "
                "than data.rollout_dtype says; data.parity_tolerance sets the tolerance"
            )
        return error

    def _generate(self, version: int) -> Completion:
        request = Request(f"probe/{version}", self.probe.token_ids, self.sampling, seed=version)
        result = self.inbox.fetch([request])[request.id]
        if not isinstance(result, Completion):
            raise SyncError(f"the parity probe could not be generated: {result.reason}")
        return result
