"""Values of a recipe that are no values: empty ones, files that are no text, and trees without an end."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import Namespace

from dppo_lightning.base.errors import ConfigError


def refuse_empty(name: str, kind: Any, value: Any) -> None:
    """Refuse an empty value, and one inside of a value, where None is none of its type's.

    Args:
        name: Key of the value.
        kind: Type that the constructor's argument has.
        value: Parsed value; a Namespace with ``class_path`` and ``init_args`` for a class.

    Raises:
        ConfigError: A value is empty and must not be.
    """
    if value is None:
        if not takes_none(kind):
            raise ConfigError(f"{name} is empty (null): give it a value, or leave the line out")
    elif isinstance(value, Namespace):
        inside = value.get("init_args", Namespace()) if "class_path" in value else value
        for argument, wanted in _arguments(kind, value.get("class_path")).items():
            if inside is not None and argument in inside:
                refuse_empty(f"{name}.{argument}", wanted, inside[argument])
    elif isinstance(value, list):
        for place, item in enumerate(value):
            if isinstance(item, Namespace):
                refuse_empty(f"{name}[{place}]", kind, item)


def takes_none(kind: Any) -> bool:
    """Tell whether None is a value of a type."""
    either = get_origin(kind) in (Union, UnionType) and any(map(takes_none, get_args(kind)))
    return either or kind in (Any, None, type(None))


def _arguments(kind: Any, class_path: str | None) -> Mapping[str, Any]:
    """Types of the constructor's arguments: of a class that jsonargparse has imported, or of a type's dataclasses."""
    if class_path is None:
        found: list[Any] = [part for part in _parts(kind) if dataclasses.is_dataclass(part)]
    else:
        module, _, name = class_path.rpartition(".")
        found = [getattr(sys.modules.get(module), name, object)]
    arguments: dict[str, Any] = {}
    for owner in found:
        try:
            arguments |= get_type_hints(owner.__init__)
        except (NameError, TypeError):  # of another library: its types are known to itself alone
            continue
    return arguments


def _parts(kind: Any) -> Iterator[Any]:
    yield kind
    for part in get_args(kind):
        yield from _parts(part)


def check_readable(path: Path) -> None:
    """Refuse a recipe that is no text, or whose values have no end.

    Raises:
        ConfigError: The file is not UTF-8, is nested too deeply, or has an anchor that holds itself.
    """
    try:
        endless = holds_itself(yaml.safe_load(path.read_text(encoding="utf-8")))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply to be read") from error
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return  # jsonargparse says it, with the place
    if endless:
        raise ConfigError(f"{path}: an anchor (&) holds an alias (*) of itself: remove one of them")


def holds_itself(value: Any) -> bool:
    """Tell whether a list or dict of a tree is a part of itself."""
    above: set[int] = set()
    done: set[int] = set()

    def circular(item: Any) -> bool:
        if not isinstance(item, dict | list) or id(item) in done:
            return False
        if id(item) in above:
            return True
        above.add(id(item))
        found = any(map(circular, item.values() if isinstance(item, dict) else item))
        above.remove(id(item))
        done.add(id(item))
        return found

    return circular(value)
