"""The engine is given the policy's weights (WeightPush), and proves that it holds them (WeightSync, ParityProbe)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor

from dppo_lightning.base.errors import SyncError
from dppo_lightning.base.records import Completion, Prompt
from dppo_lightning.base.records import Sequence as TrainingSequence
from dppo_lightning.generate.engine import Request, Sampling
from dppo_lightning.generate.inbox import Inbox
from dppo_lightning.generate.stream import RolloutStream
from dppo_lightning.scaling.ranks import Controller

log = logging.getLogger(__name__)

SAMPLES = 4
"""Number of completions of a probe: one alone may hold nothing but certain tokens, on which any two models agree."""

TOKENS = 16
"""Length of the longest completion of a probe, in tokens."""

GROWTH = 3.0
"""Factor on the difference that a pair showed at first, in the limit on its later ones, as the policy moves."""


@dataclass(frozen=True)
class Limits:
    """Limits of a probe's mean |log-prob difference|, in nats.

    Attributes:
        first: Largest accepted mean where there is nothing to compare with: for the engine as loaded, or in a continued
            run.
        floor: Number added to ``GROWTH`` times the pair's first mean.
    """

    first: float
    floor: float


LIMITS = {
    "float32": Limits(first=1e-3, floor=1e-4),
    "float16": Limits(first=0.02, floor=4e-3),
    "bfloat16": Limits(first=0.15, floor=0.03),
}
"""Limits by the coarser dtype of trainer and engine.

Float32 engines were measured at 3e-5 on a token at most, on a 135M model; a bf16 engine differs from an fp32 trainer by
0.04 on average and several times that on rare tokens, and float16 has eight times its digits.
"""


def coarser_dtype(engine_dtype: str, trainer_precision: object) -> str:
    """The coarser dtype of engine and trainer, a key of ``LIMITS``.

    Args:
        engine_dtype: Dtype of the engine's weights.
        trainer_precision: Lightning's name of the trainer's precision, e.g. "bf16-mixed".
    """
    trainer_dtype = "bfloat16" if "bf16" in str(trainer_precision) else "float32"
    return max(engine_dtype, trainer_dtype, key=lambda name: LIMITS[name].first)


@dataclass(frozen=True)
class Difference:
    """Mean and largest |log-prob of the engine - log-prob of the trainer| over a probe's tokens, in nats."""

    mean: float
    largest: float

    def __str__(self) -> str:
        return f"{self.mean:.3g} nats a token on average, {self.largest:.3g} at most"


class ParityProbe:
    """Comparison of an engine with the trainer, which says which side is wrong when they differ.

    A probe is ordinary requests: they go through the engine's sampling path, prefix cache included, and what the engine
    reports for each sampled token is compared with the trainer's log-prob for it. The difference of the pair before the
    engine's first update is its own rounding; later differences are compared with that. So a tolerance for the coarsest
    dtype does not hide a wrong model. One violation is no proof: a second probe, with other seeds and another prompt,
    has to find it too.

    Args:
        inbox: Inbox of a started engine; other requests may be in flight.
        prompts: Prompts of the first and of the second probe; a single one serves both.
        sampling: Sampling of training, so that temperature is compared too.
        dtype: Coarser dtype of trainer and engine, a key of ``LIMITS``.
        tolerance: Largest accepted difference of a single token, in nats, in place of all limits; None for the limits.
        trainer_logp: Function that computes the log-probs [T] of each sequence's generated tokens under the trainer's
            current weights.
    """

    def __init__(
        self,
        inbox: Inbox,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        dtype: str,
        tolerance: float | None,
        trainer_logp: Callable[[list[TrainingSequence]], list[np.ndarray]],
    ) -> None:
        self.inbox = inbox
        self.prompts = [prompts[0], prompts[min(1, len(prompts) - 1)]]
        self.sampling = Sampling(sampling.temperature, max_new_tokens=min(TOKENS, sampling.max_new_tokens))
        self.limits = LIMITS[dtype]
        self.tolerance = tolerance
        self.trainer_logp = trainer_logp
        self.loaded: Difference | None = None
        self.first: Difference | None = None

    def look_at_loaded(self) -> None:
        """Compare before the engine's first update, while the trainer holds the weights that the engine loaded.

        Too large a difference is no error yet: a server may hold another run's weights until it is updated.
        """
        self.loaded = self._compare(0, second=False)
        if self._within(self.loaded):
            self.first = self.loaded

    def check(self, version: int) -> Difference:
        """Compare after an update to ``version``, and return the difference found, of two probes the larger one.

        Raises:
            SyncError: The engine reports another version, cannot answer, or two probes differ by too much.
        """
        found = self._compare(version, second=False)
        if not self._within(found):
            again = self._compare(version, second=True)
            if not self._within(again):
                raise SyncError(self._verdict(version, again))
            log.warning(
                f"parity probe after the update to version {version}: engine and trainer differ by {found}; a second "
                f"probe found {again}, which is accepted"
            )
            found = max(found, again, key=lambda one: one.largest)
        elif self.first is None:
            if self.loaded is not None:
                log.warning(
                    f"the engine as loaded differs from the trainer by {self.loaded}, and since its first update by "
                    f"{found}: it had loaded other weights"
                )
            self.first = found
        return found

    def _within(self, found: Difference) -> bool:
        if self.tolerance is not None:
            return found.largest <= self.tolerance
        return found.mean <= self._limit

    @property
    def _limit(self) -> float:
        return self.limits.first if self.first is None else GROWTH * self.first.mean + self.limits.floor

    def _verdict(self, version: int, found: Difference) -> str:
        """Say in one line which side is wrong, as far as can be known."""
        accepted = (
            f"accepted: {self._limit:.3g} on average, unless data.parity_tolerance is set"
            if self.tolerance is None
            else f"data.parity_tolerance accepts {self.tolerance:g} at most"
        )
        if self.first is not None and self.loaded is not None:
            return (
                f"after the update to version {version} the log-probs of engine and trainer differ by {found} "
                f"({accepted}); as loaded by {self.loaded.mean:.3g}: the engine does not hold the policy's weights, or "
                "holds them in another form than those that it loads itself"
            )
        if self.loaded is not None:
            return (
                f"the log-probs of engine and trainer differ by {self.loaded} with the engine as loaded, before any "
                f"update, and by {found} after one ({accepted}): the engine computes another model from the same "
                "weights, or is coarser than data.rollout_dtype says"
            )
        return (
            f"after the update to version {version} the log-probs of engine and trainer differ by {found} ({accepted});"
            " the two were not compared before an update, as the policy does not begin with the weights of its folder: "
            "the engine does not hold the policy's weights, or computes another model from them"
        )

    def _compare(self, version: int, second: bool) -> Difference:
        prompt = self.prompts[second]
        seeds = range((2 * version + second) * SAMPLES, (2 * version + second + 1) * SAMPLES)
        requests = [
            Request(f"probe/{version}/{int(second)}/{sample}", prompt.token_ids, self.sampling, seed)
            for sample, seed in enumerate(seeds)
        ]
        results = self.inbox.fetch(requests)
        sequences = []
        for request in requests:
            completion = results[request.id]
            if not isinstance(completion, Completion):
                raise SyncError(f"the parity probe could not be generated: {completion.reason}")
            if not (completion.versions == version).all():
                raise SyncError(f"the engine generated with weight version {completion.versions.max()}, not {version}")
            sequences.append(TrainingSequence.from_completion(prompt, completion, advantage=0.0))
        engine = np.concatenate([sequence.rollout_logp for sequence in sequences])
        differences = np.abs(np.concatenate(self.trainer_logp(sequences)) - engine)
        return Difference(float(differences.mean()), float(differences.max()))


@dataclass(frozen=True)
class SyncReport:
    """Report of a sync: seconds in all, bytes sent, version in force, and the difference that the probe found."""

    seconds: float
    bytes: int
    version: int
    parity: Difference


class WeightSync:
    """Sender of weights, which compares log-probs after each update.

    Args:
        probe: Probe of a started engine; other requests may be in flight.
        as_loaded: Whether the trainer still holds the weights that the engine has loaded, and the engine answers before
            its first update: the probe's first difference is taken then.
    """

    def __init__(self, probe: ParityProbe, as_loaded: bool) -> None:
        self.probe = probe
        self.as_loaded = as_loaded
        self.report: SyncReport | None = None  # report of the last push

    def in_force(self, version: int) -> bool:
        """Tell whether the engine holds these weights: it was given them last, and reports their version itself."""
        held = self.probe.inbox.engine.health().version
        return self.report is not None and self.report.version == version == held

    def push(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> SyncReport:
        """Send the weights as ``version`` and probe; requests in flight pause, and go on with the new weights.

        Raises:
            SyncError: Names or shapes differ, the engine reports another version, or the log-probs differ.
        """
        started = time.perf_counter()
        if self.as_loaded and self.probe.loaded is None:
            self.probe.look_at_loaded()
        engine, interrupted = self.probe.inbox.engine, self.probe.inbox.in_flight > 0
        if interrupted:
            engine.pause()
        try:
            stats = engine.update_weights(named_tensors, version)
        finally:
            if interrupted and engine.health().alive:  # a refused update must not leave it paused
                engine.resume()
        self.report = None  # until the probe has shown it
        parity = self.probe.check(version)
        self.report = SyncReport(time.perf_counter() - started, stats.bytes, version, parity)
        return self.report


class WeightPush:
    """Brings the engine up to the policy's weights, with the help of every rank that holds a part of them.

    Every rank makes one at the same point of the run.

    Args:
        controller: Controller of the run; has the other ranks gather while rank 0 reads.
        weights: Gives the named tensors that an update takes, collective where the policy is in shards.
        stream: Gives rank 0's stream, whose engine is updated.
        make_sync: Makes the WeightSync of that stream; called once, before the first update.

    Attributes:
        sync: WeightSync of the stream; on rank 0, from the first update on.
    """

    def __init__(
        self,
        controller: Controller,
        weights: Callable[[], Iterator[tuple[str, Tensor]]],
        stream: Callable[[], RolloutStream],
        make_sync: Callable[[], WeightSync],
    ) -> None:
        self.controller = controller
        self.weights = weights
        self.stream = stream
        self.make_sync = make_sync
        self.sync: WeightSync | None = None
        self._gather = controller.task(self._run_through_weights)

    def ensure_in_force(self, version: int) -> dict[str, float]:
        """Give the engine the weights of ``version``, unless it has them, and check that it uses them; on every rank.

        Whether it has them is not remembered here: an engine that was restarted holds those of its model folder.

        Returns:
            Metrics of the last sync.

        Raises:
            SyncError: The engine does not hold the policy's weights afterwards.
        """
        return self.controller.direct(partial(self._bring_up_to_date, version))

    def _bring_up_to_date(self, version: int) -> list[dict[str, float]]:
        """On rank 0: a sync, where the engine has other weights; metrics of the last one, for each rank."""
        stream = self.stream()
        if self.sync is None:
            self.sync = self.make_sync()
        if not self.sync.in_force(version):
            weights = self.controller.while_others_run(self._gather, self.weights())
            with stream.timeline.measure("sync", version), stream.updating(version):
                self.sync.push(weights, version)
        report = self.sync.report
        assert report is not None
        metrics = {
            "time/sync": report.seconds,
            "sync/bytes": float(report.bytes),
            "sync/parity_error": report.parity.largest,
            "sync/parity_mean": report.parity.mean,
        }
        return [metrics] * self.controller.ranks.world_size

    def _run_through_weights(self, share: None) -> None:
        """On the other ranks, while rank 0 reads the weights: take part in gathering them."""
        for _ in self.weights():
            pass
