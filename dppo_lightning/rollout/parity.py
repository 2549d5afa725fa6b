"""ParityProbe: engine and trainer give the same tokens the same log-probs, as loaded and after every update."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dppo_lightning.errors import SyncError
from dppo_lightning.records import Completion, Prompt
from dppo_lightning.records import Sequence as TrainingSequence
from dppo_lightning.rollout.engine import Request, Sampling
from dppo_lightning.rollout.inbox import Inbox

log = logging.getLogger(__name__)

SAMPLES = 4
"""Completions of a probe: one alone may hold nothing but certain tokens, on which any two models agree."""

TOKENS = 16
"""Longest completion of a probe."""

GROWTH = 3.0
"""How many times the difference that a pair showed at first its later ones may be, as the policy moves."""


@dataclass(frozen=True)
class Limits:
    """Of a probe's mean |log-prob difference|, in nats.

    Attributes:
        first: Largest accepted where there is nothing to compare with: of the engine as loaded, or of a continued run.
        floor: Added to ``GROWTH`` times what the pair showed at first.
    """

    first: float
    floor: float


LIMITS = {
    "float32": Limits(first=1e-3, floor=1e-4),
    "float16": Limits(first=0.02, floor=4e-3),
    "bfloat16": Limits(first=0.15, floor=0.03),
}
"""By the coarser dtype of trainer and engine.

Float32 engines were measured at 3e-5 on a token at most, on a 135M model; a bf16 engine differs from an fp32 trainer by
0.04 on average and several times that on rare tokens, and float16 has eight times its digits.
"""


@dataclass(frozen=True)
class Difference:
    """|Log-prob of the engine - log-prob of the trainer| over a probe's tokens, in nats: the mean and the largest."""

    mean: float
    largest: float

    def __str__(self) -> str:
        return f"{self.mean:.3g} nats a token on average, {self.largest:.3g} at most"


class ParityProbe:
    """Compares an engine with the trainer, and says which side is wrong when they differ.

    A probe is ordinary requests: they go through the engine's sampling path, prefix cache included, and what the engine
    reports for each sampled token is compared with the trainer's log-prob for it. What the pair differs by before the
    engine's first update is its own rounding; later differences are held against that. So a tolerance for the coarsest
    dtype does not hide a wrong model. One violation is no proof: a second probe, with other seeds and another prompt,
    has to find it too.

    Args:
        inbox: Of a started engine; other requests may be in flight.
        prompts: The first probe's and the second's; of one prompt both are made.
        sampling: As in training, so that temperature is compared too.
        dtype: The coarser one of trainer and engine, a key of ``LIMITS``.
        tolerance: In place of all limits, the largest accepted difference of a single token, in nats; None for the
            limits.
        trainer_logp: Log-probs [T] of each sequence's generated tokens under the trainer's current weights.
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
        """Before the engine's first update, while the trainer holds the weights that the engine loaded.

        Too large a difference is no error yet: a server may hold another run's weights until it is updated.
        """
        self.loaded = self._compare(0, second=False)
        if self._within(self.loaded):
            self.first = self.loaded

    def check(self, version: int) -> Difference:
        """After an update to ``version``: the difference found, of two probes the larger one.

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
        """One line: which side is wrong, as far as can be known."""
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
