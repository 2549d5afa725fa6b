"""Libraries that only some settings need; imported when such a setting is used."""

from __future__ import annotations

import importlib
from typing import Any

from dppo_lightning.errors import ConfigError


def require(module: str, extra: str = "reasoning") -> Any:
    """Import an optional dependency, which the package's ``extra`` brings.

    Raises:
        ConfigError: It is not installed; says what to install.
    """
    package = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A dependency of the library may be what is missing; that is not ours to explain.
        if (error.name or "").split(".")[0] != package:
            raise
        raise ConfigError(f"{package} is not installed: pip install 'dppo-lightning[{extra}]'") from error
