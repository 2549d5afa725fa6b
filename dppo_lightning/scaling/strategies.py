"""Which of Lightning's strategies train as they should, and what to use in the place of the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    Strategy,
    StrategyRegistry,
    XLAStrategy,
)

from dppo_lightning.errors import ConfigError
from dppo_lightning.scaling.fsdp2 import FSDP2Strategy
from dppo_lightning.scaling.zero import ZeroStrategy

ACCEPTED = (SingleDeviceStrategy, DDPStrategy, ZeroStrategy, FSDP2Strategy)
WRONG = {
    DeepSpeedStrategy: "divides a step's gradient by the number of its micro-batches twice",
    FSDPStrategy: "keeps parameters in a form that weight updates cannot read",
    ModelParallelStrategy: "trains its ranks apart from each other",
    XLAStrategy: "was never run",
    SingleDeviceXLAStrategy: "was never run",
}
"""Others of Lightning's, some of which derive from an accepted one, and what is wrong with them."""


def check_strategy(strategy: Strategy | str | None) -> None:
    """Refuse a strategy under which the updates would not be those of one process.

    Args:
        strategy: A value of ``trainer.strategy``: an object, a name of Lightning's, or None.

    Raises:
        ConfigError: It is neither SingleDeviceStrategy, DDPStrategy, ZeroStrategy, FSDP2Strategy nor one of their kin.
    """
    if strategy is None or strategy == "auto":
        return
    check_kind(*_described(strategy))


def check_kind(name: str, kind: type[Strategy] | None, settings: Mapping[str, Any]) -> None:
    """The same of a class that is not built; ``settings``: its ``stage`` and ``start_method``, where it has them.

    Raises:
        ConfigError: As ``check_strategy``.
    """
    if kind is not None and issubclass(kind, (ZeroStrategy, FSDP2Strategy)):
        return
    reason = next((reason for wrong, reason in WRONG.items() if kind is not None and issubclass(kind, wrong)), None)
    if kind is None or reason is not None or not issubclass(kind, ACCEPTED):
        reason = reason or ("is none that Lightning knows" if kind is None else "was never compared with one process")
        raise ConfigError(f"trainer.strategy: {name} {reason}; use {_instead(name, kind, settings)}")
    start = settings.get("start_method", "popen")
    if start != "popen":
        raise ConfigError(
            f"trainer.strategy: {name} starts its ranks by {start}, and what they train does not come back; "
            "use configs/scaling/ddp.yaml"
        )


def _described(strategy: Strategy | str) -> tuple[str, type[Strategy] | None, dict[str, Any]]:
    """Its name for a message, its class, and the settings that matter here."""
    if isinstance(strategy, str):
        if strategy not in StrategyRegistry:
            return repr(strategy), None, {}
        known = StrategyRegistry[strategy]
        return strategy, known["strategy"], known["init_params"]
    found = {"stage": getattr(strategy, "config", None), "start_method": getattr(strategy, "_start_method", "popen")}
    if isinstance(found["stage"], dict):
        found["stage"] = found["stage"].get("zero_optimization", {}).get("stage")
    return type(strategy).__name__, type(strategy), found


def _instead(name: str, kind: type[Strategy] | None, settings: Mapping[str, Any]) -> str:
    """The piece of configs/scaling/ that does what was wanted."""
    wanted = name.lower() if kind is None else " ".join(base.__name__.lower() for base in kind.__mro__)
    if "deepspeed" in wanted or "zero" in wanted:
        stage = settings.get("stage")
        return f"configs/scaling/zero{stage if stage in (1, 2, 3) else 2}.yaml"
    if "fsdp" in wanted or "modelparallel" in wanted:
        return "configs/scaling/fsdp2.yaml"
    return "configs/scaling/ddp.yaml, zero1.yaml, zero2.yaml, zero3.yaml or fsdp2.yaml"
