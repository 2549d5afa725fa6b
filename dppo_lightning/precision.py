"""Which precisions a policy can be trained in."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn

from dppo_lightning.errors import ConfigError


def check_precision(trainer: pl.Trainer) -> None:
    """Refuse to train in float16, and to train bfloat16 parameters that have no float32 masters.

    The head forms its gradient with the loss. In float16, whose least number is 6e-8, the small entries are 0 by then:
    a token's share of a step of 16k tokens is 6e-5, spread over the vocabulary. No loss scale brings them back. An
    update of 1e-6 of a weight is lost when it is added to a bfloat16, which has 8 bits. DeepSpeed keeps masters.

    Raises:
        ConfigError: The run trains, and its precision is "16-mixed" or "16-true", or "bf16-true" without DeepSpeed.
    """
    if trainer.state.fn != TrainerFn.FITTING:
        return
    precision = str(trainer.precision)
    if precision in ("16-mixed", "16-true"):
        raise ConfigError(f"trainer.precision {precision} loses the small gradients of the head: set bf16-mixed")
    if precision == "bf16-true" and not isinstance(trainer.strategy, DeepSpeedStrategy):
        raise ConfigError(
            f"trainer.precision {precision} trains without float32 weights, and small updates are lost: set bf16-mixed"
        )
