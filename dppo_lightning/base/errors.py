"""Exceptions that a user can cause, each said in one line, and libraries that only some settings need.

The command line prints a DPPOError as one line and exits with code 2. Two exceptions live where they are raised:
``TokenStatsError`` (a DPPOError) in trust_region/base.py, and ``ChildDied`` (an EngineError) in
generate/vllm/child_process.py.
"""

from __future__ import annotations

import importlib
from typing import Any

from dppo_lightning.base.secrets import hide


class DPPOError(Exception):
    """Base class: one line that says what is wrong and what to change, without secrets."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*(hide(argument) if isinstance(argument, str) else argument for argument in arguments))


class ConfigError(DPPOError, ValueError):
    """A setting is out of range, or two settings do not fit together."""


class DataError(DPPOError, ValueError):
    """A file or a row that the user supplied cannot be used; names the file and the line."""


class RewardError(DPPOError, RuntimeError):
    """A reward function returned something that is not one finite number per completion."""


class EngineError(DPPOError, RuntimeError):
    """The rollout engine could not be started, died, or refused a request."""


class SyncError(DPPOError, RuntimeError):
    """The engine's weights are not the policy's weights: wrong names, shapes, version or log-probs."""


class NonFiniteError(DPPOError, ArithmeticError):
    """A loss, a gradient or weights are not finite: the optimizer step was not taken."""


class RankError(DPPOError, RuntimeError):
    """Something went wrong on one of several ranks; the same line on all of them names the rank and the cause."""


class Stopped(BaseException):
    """The run has ended early, in good order; no Exception, so that nothing takes it for a fault and goes on.

    Attributes:
        exit_code: Exit code of the process.
        on_every_rank: Whether every rank raises it, so that none has to be told.
    """

    def __init__(self, message: str, exit_code: int, on_every_rank: bool = False) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.on_every_rank = on_every_rank


def one_line(error: BaseException, typed: bool = False, whole: bool = False) -> str:
    """Message of another library's error in one line: its first line, and its cause where the line does not say it.

    Args:
        error: The error.
        typed: Name the error's type first. Else it is named only where the message says little without it: a message
            that is empty, and any type but OSError, ValueError, RuntimeError, AssertionError and those derived.
        whole: Keep every line of the message; for libraries whose first line is a title.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A line that ends with a colon announces the next; a KeyError's message is a bare key.
    said = " ".join(lines if whole else lines[: 2 if lines and lines[0].endswith(":") else 1])
    if typed or not said or not isinstance(error, OSError | ValueError | RuntimeError | AssertionError):
        said = f"{type(error).__name__}: {said}" if said else type(error).__name__
    # Parsers' errors are often replaced by a vaguer one without naming them as its cause.
    cause = error.__cause__ or (error.__context__ if isinstance(error.__context__, ValueError) else None)
    if cause is None or (deeper := one_line(cause)) in said:
        return said
    return f"{said.rstrip('.')} ({deeper})"


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
