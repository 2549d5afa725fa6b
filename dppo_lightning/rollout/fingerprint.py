"""What every rank of a run must have alike."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dppo_lightning.rollout.engine import Sampling
from dppo_lightning.rollout.streaming import Selection, Streaming

if TYPE_CHECKING:
    from dppo_lightning.module import DPPOModule
    from dppo_lightning.rollout.datamodule import RolloutDataModule


def fingerprint(module: DPPOModule, data: RolloutDataModule) -> dict[str, Any]:
    """The code, and the settings that are plain values."""
    code = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(path.read_bytes())
    plain = (str, int, float, bool, type(None), tuple, Streaming, Selection, Sampling)
    trainer = data.trainer
    assert trainer is not None
    return {
        "code": code.hexdigest(),
        "trainer.max_steps": trainer.max_steps,
        "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches,
        "trainer.precision": trainer.precision,
        "model.policy": module.policy_name,
        "model.trust_region": module.region.describe(),
        "model.aggregation": module.aggregation,
        **{
            f"data.{name}": value
            for name, value in vars(data).items()
            if isinstance(value, plain) and not name.startswith("_")
        },
    }
