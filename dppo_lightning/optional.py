"""Libraries that only some prompt sources need; imported when such a source is loaded."""

from __future__ import annotations

import importlib
from typing import Any

from dppo_lightning.errors import ConfigError


def require(module: str) -> Any:
    """Import an optional dependency.

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
        raise ConfigError(f"{package} is not installed: pip install 'dppo-lightning[reasoning]'") from error
