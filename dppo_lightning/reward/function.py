"""PythonReward: any function as a reward, named by its import path."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

from dppo_lightning.base.errors import ConfigError, RewardError, one_line
from dppo_lightning.base.records import Prompt
from dppo_lightning.reward.base import RewardFunction, Sample


class PythonReward(RewardFunction):
    """Reward that calls ``function(samples, **arguments)``, which returns a float or a Score for each Sample, in order.

    The function is given one sample at a time, and may be ``async def``.

    Where the function has an attribute ``check`` (as an object with ``__call__`` may), that is called before the run as
    ``check(prompts, **arguments)``; see ``RewardFunction.check``.

    Args:
        function: Import path of the function, "package.module.function" or "package.module:function".
        arguments: Further keyword arguments of the function.
        whole_groups: Give the function all completions of a prompt in one call.
        runs_completions: Score each completion in a process of its own: for a function that executes what a model
            writes, or parses it with a parser that may.

    Raises:
        ConfigError: The path cannot be imported, is not callable, or does not take the arguments.
        RewardError: When scoring: the function did not return one finite number for each sample.

    Example:
        In ``my_rewards.py`` in the folder that ``dppo`` runs in, named as ``function: my_rewards.brevity``::

            def brevity(samples, limit=100):
                return [float(len(sample.completion) <= limit) for sample in samples]
    """

    def __init__(
        self,
        function: str,
        arguments: dict[str, Any] | None = None,
        whole_groups: bool = False,
        runs_completions: bool = False,
    ) -> None:
        self.path = function
        self.arguments = dict(arguments or {})
        self.whole_groups = whole_groups
        self.runs_completions = runs_completions
        self.function = import_function(function)
        _check_arguments(self.function, function, self.arguments)

    @property
    def label(self) -> str:
        return f"reward function {self.path}"

    @property
    def asynchronous(self) -> bool:
        called = type(self.function).__call__  # of an object that is called like a function
        return inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(called)

    def runs(self, prompt: Prompt) -> bool:
        return self.runs_completions

    def score(self, samples: Sequence[Sample]) -> Any:
        return self.function(samples, **self.arguments)

    def check(self, prompts: Sequence[Prompt]) -> Mapping[int, str]:
        check = getattr(self.function, "check", None)
        if check is None:
            return {}
        try:
            problems: Mapping[int, str] = check(prompts, **self.arguments)
            return problems
        except Exception as error:
            raise RewardError(
                f"check of the reward function {self.path} raised {one_line(error, typed=True)}"
            ) from error


def import_function(path: str) -> Callable[..., Any]:
    """Import the callable at "package.module.function" or "package.module:function".

    Raises:
        ConfigError: The function cannot be imported, is not there or is not callable; names the path and the reason.
    """
    module_name, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    if not module_name or not name or module_name.startswith("."):
        raise ConfigError(f"function {path!r} is no import path: write 'module.function' or 'package.module:function'")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"function {path!r} cannot be imported, {one_line(error, typed=True)}: run from the folder that holds it, "
            "or put that folder on PYTHONPATH"
        ) from error
    except Exception as error:  # a module of the user's may raise anything while it is imported
        raise ConfigError(
            f"function {path!r} cannot be imported, {module_name} raised {one_line(error, typed=True)}"
        ) from error
    try:
        function = reduce(getattr, name.split("."), module)
    except AttributeError:
        raise ConfigError(f"function {path!r} does not exist: {module.__name__} has no {name!r}") from None
    if not callable(function):
        raise ConfigError(f"function {path!r} is a {type(function).__name__}, not a function")
    return function


def _check_arguments(function: Callable[..., Any], path: str, arguments: dict[str, Any]) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C do not say which arguments they take
        return
    try:
        signature.bind([], **arguments)
    except TypeError as error:
        raise ConfigError(f"function {path!r} cannot be called with the samples and {arguments}: {error}") from None
