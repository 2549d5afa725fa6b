"""Which precisions a policy can be trained in, and what of it becomes 16 bits: parameters alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from dppo_lightning.errors import ConfigError
from dppo_lightning.scaling.zero import ZeroStrategy


class KeepsBuffers(nn.Module):
    """A module whose floating-point buffers keep the dtype that they were made with, whatever casts the module.

    RoPE's inverse frequencies are such buffers. In bfloat16 they are off by up to 1/256 of themselves: at position
    1,000 by up to two radians. ``to(dtype)``, ``half`` and their kin all go through ``_apply``, so this holds for every
    strategy and precision. ZeRO-3 makes a model's tensors in 16 bits as it loads; its configuration tells it so too.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.is_floating_point()
        ]
        result = super()._apply(fn, recurse)
        for module, name, buffer in kept:
            moved = module._buffers[name]
            assert moved is not None
            if moved.dtype != buffer.dtype:
                module._buffers[name] = buffer.to(moved.device)
        return result


def check_precision(trainer: pl.Trainer) -> None:
    """Refuse to train in float16, and to train bfloat16 parameters that have no float32 masters.

    The head forms its gradient with the loss. In float16, whose least number is 6e-8, the small entries are 0 by then:
    a token's share of a step of 16k tokens is 6e-5, spread over the vocabulary. No loss scale brings them back. An
    update of 1e-6 of a weight is lost when it is added to a bfloat16, which has 8 bits. DeepSpeed keeps masters.

    Raises:
        ConfigError: The run trains, and its precision is "16-mixed" or "16-true", or "bf16-true" without ZeRO.
    """
    if trainer.state.fn != TrainerFn.FITTING:
        return
    precision = str(trainer.precision)
    if precision in ("16-mixed", "16-true"):
        raise ConfigError(f"trainer.precision {precision} loses the small gradients of the head: set bf16-mixed")
    if precision == "bf16-true" and not isinstance(trainer.strategy, ZeroStrategy):
        raise ConfigError(
            f"trainer.precision {precision} trains without float32 weights, and small updates are lost: "
            "set bf16-mixed, or add configs/scaling/zero2.yaml, which keeps float32 weights beside"
        )
