"""Which precisions a policy can be trained in."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn

from dppo_lightning.errors import ConfigError


def check_precision(trainer: pl.Trainer) -> None:
    """Refuse to train half-precision parameters that have no float32 masters.

    An update of 1e-6 of a weight is lost when it is added to a bfloat16, which has 8 bits. DeepSpeed keeps masters.

    Raises:
        ConfigError: The run trains, and its precision is "bf16-true" or "16-true" without DeepSpeed.
    """
    half = str(trainer.precision) in ("bf16-true", "16-true")
    if half and trainer.state.fn == TrainerFn.FITTING and not isinstance(trainer.strategy, DeepSpeedStrategy):
        raise ConfigError(
            f"trainer.precision {trainer.precision} trains without float32 weights, and small updates are lost: "
            "set bf16-mixed"
        )
