"""Check of ``trainer.strategy``: refuses strategies that train wrongly, and names what to use instead."""

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

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.scaling.sharding import FSDP2Strategy
from dppo_lightning.scaling.zero import ZeroStrategy

ACCEPTED = (SingleDeviceStrategy, DDPStrategy, ZeroStrategy, FSDP2Strategy)
WRONG = {
    DeepSpeedStrategy: "divides a step's gradient by the number of its micro-batches twice",
    FSDPStrategy: "keeps parameters in a form that weight updates cannot read",
    ModelParallelStrategy: "trains its ranks apart from each other",
    XLAStrategy: "was never run",
    SingleDeviceXLAStrategy: "was never run",
}
"""Lightning's other strategies, some of which derive from an accepted one -> what is wrong with them."""


def check_strategy(strategy: Strategy | str | None) -> None:
    """Refuse a strategy under which the updates would not be those of one process.

    Args:
        strategy: Value of ``trainer.strategy``: an object, a name of Lightning's, or None.

    Raises:
        ConfigError: The strategy is neither SingleDeviceStrategy, DDPStrategy, ZeroStrategy, FSDP2Strategy nor derived
            from one.
    """
    if strategy is None or strategy == "auto":
        return
    check_kind(*_described(strategy))


def check_kind(name: str, kind: type[Strategy] | None, settings: Mapping[str, Any]) -> None:
    """Refuse a strategy that is known by its class, before one is built; else as ``check_strategy``.

    Args:
        name: Name of the strategy, for the message.
        kind: Class of the strategy; None where Lightning knows no strategy of that name.
        settings: Settings of the strategy, of which ``stage`` and ``start_method`` matter, where it has them.

    Raises:
        ConfigError: Updates under the strategy would not be those of one process.
    """
    if kind is not None and issubclass(kind, (ZeroStrategy, FSDP2Strategy)):
        return
    fault = next((fault for wrong, fault in WRONG.items() if kind is not None and issubclass(kind, wrong)), None)
    if kind is None or fault is not None or not issubclass(kind, ACCEPTED):
        fault = fault or ("is none that Lightning knows" if kind is None else "was never compared with one process")
        raise ConfigError(f"trainer.strategy: {name} {fault}; use {_instead(name, kind, settings)}")
    start = settings.get("start_method", "popen")
    if start != "popen":
        raise ConfigError(
            f"trainer.strategy: {name} starts its ranks by {start}, and what they train does not come back; "
            "use configs/scaling/ddp.yaml"
        )


def _described(strategy: Strategy | str) -> tuple[str, type[Strategy] | None, dict[str, Any]]:
    """Return the strategy's name for a message, its class, and the settings that matter here."""
    if isinstance(strategy, str):
        if strategy not in StrategyRegistry:
            return repr(strategy), None, {}
        known = StrategyRegistry[strategy]
        return strategy, known["strategy"], known["init_params"]
    # DDPStrategy keeps start_method in a private field: without it a DDP that forks or spawns its ranks is let through,
    # and what they train is lost.
    found = {"stage": getattr(strategy, "config", None), "start_method": getattr(strategy, "_start_method", "popen")}
    if isinstance(found["stage"], dict):
        found["stage"] = found["stage"].get("zero_optimization", {}).get("stage")
    return type(strategy).__name__, type(strategy), found


def _instead(name: str, kind: type[Strategy] | None, settings: Mapping[str, Any]) -> str:
    """Name the piece of configs/scaling/ to use instead."""
    wanted = name.lower() if kind is None else " ".join(base.__name__.lower() for base in kind.__mro__)
    if "deepspeed" in wanted or "zero" in wanted:
        stage = settings.get("stage")
        return f"configs/scaling/zero{stage if stage in (1, 2, 3) else 2}.yaml"
    if "fsdp" in wanted or "modelparallel" in wanted:
        return "configs/scaling/fsdp2.yaml"
    return "configs/scaling/ddp.yaml, zero1.yaml, zero2.yaml, zero3.yaml or fsdp2.yaml"
