"""FailureBound: stops a run whose reward fails too often."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

from dppo_lightning.base.errors import RewardError
from dppo_lightning.base.records import Failure, Group
from dppo_lightning.reward.rewarding import FAILURES

WINDOW = 256
"""Number of completions that are looked at together while a rollout goes on."""


class FailureBound:
    """Bound on the share of completions that cannot be scored.

    Args:
        reward: Name of the reward, for messages.
        share: Share that may fail.
    """

    def __init__(self, reward: str, share: float) -> None:
        self.reward = reward
        self.share = share
        self._last: deque[Failure | None] = deque(maxlen=WINDOW)

    def add(self, failures: Iterable[Failure | None]) -> None:
        """Take completions into account, in any order.

        Raises:
            RewardError: Too many of the last completions failed.
        """
        self._last.extend(failures)
        if len(self._last) == WINDOW:
            self._check(list(self._last))

    def check(self, groups: Iterable[Group]) -> dict[str, float]:
        """Look at the completions of a rollout or an evaluation.

        Returns:
            Number of those that failed in each way, as metrics.

        Raises:
            RewardError: Too many of them failed.
        """
        failures = [failure for group in groups for failure in group.failures]
        self._check(failures)
        kinds = Counter(failure.kind for failure in failures if failure is not None)
        return {f"reward/failed_{kind}": float(kinds[kind]) for kind in FAILURES}

    def _check(self, failures: list[Failure | None]) -> None:
        found = [failure for failure in failures if failure is not None]
        if not found or len(found) <= self.share * len(failures):
            return
        kinds = Counter(failure.kind for failure in found)
        listed = ", ".join(f"{kinds[kind]} {FAILURES[kind]}" for kind in FAILURES if kind in kinds)
        raise RewardError(
            f"{self.reward} could not score {len(found)} of {len(failures)} completions, more than "
            f"data.rewarding.max_failed_share={self.share:g} ({listed}); the last: {found[-1]}: mend the reward, or "
            "raise the limit"
        )
