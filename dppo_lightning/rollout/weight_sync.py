"""WeightSync: the engine holds the policy's weights, and proves it after every update."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from dppo_lightning.rollout.parity import Difference, ParityProbe


@dataclass(frozen=True)
class SyncReport:
    """What a sync did: seconds in all, bytes sent, version in force, and what the probe found."""

    seconds: float
    bytes: int
    version: int
    parity: Difference


class WeightSync:
    """Sends weights and compares log-probs.

    Args:
        probe: Of a started engine; other requests may be in flight.
        as_loaded: The trainer still holds the weights that the engine has loaded, and the engine answers before its
            first update: the probe's first difference is taken then.
    """

    def __init__(self, probe: ParityProbe, as_loaded: bool) -> None:
        self.probe = probe
        self.as_loaded = as_loaded
        self.report: SyncReport | None = None  # of the last push

    def in_force(self, version: int) -> bool:
        """Whether the engine holds these weights: they were the last that it was given, and it says so itself."""
        held = self.probe.inbox.engine.health().version
        return self.report is not None and self.report.version == version == held

    def push(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> SyncReport:
        """Send the weights as ``version`` and probe; requests in flight stand still meanwhile and go on with them.

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
