"""What the trainer and a reward worker say to each other: JSON in both directions, and pickles to the worker only.

A message is a line of JSON, then as many bytes as it says. The scores of a delivery are one line of JSON for each unit.
"""

from __future__ import annotations

import json
import math
import os
from typing import Any, BinaryIO

from dppo_lightning.base.errors import RewardError
from dppo_lightning.base.records import Failure
from dppo_lightning.reward.base import Score
from dppo_lightning.reward.calling import Outcome
from dppo_lightning.reward.rewarding import FAILURES


def read_delivery(commands: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """Read the next delivery; None at the end of the input."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = commands.read(1)
        if not byte:
            return None
        line += byte
    header = json.loads(line)
    left, parts = header.pop("bytes"), []
    while left:
        part = commands.read(min(left, 1 << 20))
        if not part:
            return None
        parts.append(part)
        left -= len(part)
    return header, b"".join(parts)


def send(answers: int, header: dict[str, Any], body: bytes = b"") -> None:
    """Write a message as ``read_delivery`` reads it."""
    message = json.dumps({**header, "bytes": len(body)}).encode() + b"\n" + body
    while message:
        message = message[os.write(answers, message) :]


def encoded(outcome: Outcome) -> bytes:
    """Line of one unit."""
    if isinstance(outcome, Failure):
        return json.dumps({"failed": outcome}).encode()
    return json.dumps({"scores": [[float(score.value), dict(score.parts)] for score in outcome]}).encode()


def refused(error: RewardError) -> bytes:
    """Line of a unit for which the reward itself is wrong, which stops the run."""
    return json.dumps({"error": str(error)}).encode()


def read_outcome(line: bytes, count: int, ran: bool) -> Outcome:
    """Read what a scorer wrote of a unit, which may be anything.

    Args:
        line: What it wrote.
        count: Number of the unit's completions.
        ran: Whether it may have executed them: an error of the reward itself may then be theirs, and is a failure.

    Raises:
        RewardError: The reward itself is wrong.
    """
    try:
        found = json.loads(line)
        if "error" in found:
            if ran:
                return Failure("raised", str(found["error"])[:1000])
            raise RewardError(str(found["error"])[:1000])
        if "failed" in found:
            kind, detail = found["failed"]
            return Failure(kind if kind in FAILURES else "died", str(detail)[:1000])
        scores = [Score(float(value), {str(k): float(v) for k, v in parts.items()}) for value, parts in found["scores"]]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return Failure("died", "wrote something else than scores")
    numbers = [number for score in scores for number in (score.value, *score.parts.values())]
    if len(scores) != count or not all(map(math.isfinite, numbers)):
        return Failure("died", "wrote something else than scores")
    return scores
