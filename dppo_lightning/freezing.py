"""Parameters that are not trained, chosen by name."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from dppo_lightning.errors import ConfigError


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Take parameters out of training, in place.

    Args:
        model: Its parameters' names are matched; a tied parameter has every one of its names, and is frozen by any.
        patterns: As of file names: ``model.embed_tokens.*``.

    Raises:
        ConfigError: A pattern matches nothing, or nothing is left to train.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        found = [name for name in named if fnmatchcase(name, pattern)]
        if not found:
            near = get_close_matches(pattern, named, n=3, cutoff=0.3) or list(named)[:3]
            raise ConfigError(f"model.frozen: {pattern!r} matches no parameter; names are like {', '.join(near)}")
        for name in found:
            named[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in named.values()):
        raise ConfigError("model.frozen leaves nothing to train: name fewer parameters")
