"""What is secret, known by its name, and the taking of it out of what is written, printed or raised.

A setting or an environment variable is secret by its name: ``api_key``, ``HF_TOKEN``, ``password``. The values of the
environment's secrets are known, and are taken out of any text; other secrets are found by the name before them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from jsonargparse import Namespace

T = TypeVar("T")

HIDDEN = "***"
"""What stands in the place of a secret."""
SHORTEST = 8
"""Values of the environment with fewer characters are taken for no secrets: they would be found in any text."""

NAME = r"(?:\w*_)?(?:api_?key|access_?key|secret_?key|private_?key|auth_?key|\w+_token|secret|passwo?r?d|credentials?)"
SETTING = re.compile(rf"{NAME}|token|authorization", re.IGNORECASE)
VARIABLE = re.compile(r"(?:.*_)?(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)", re.IGNORECASE)
IN_TEXT = re.compile(
    rf"(?P<name>\b(?:{NAME}|authorization)[\"']?\s*[=:]\s*)"
    r"(?P<value>\"[^\"]*\"|'[^']*'|(?:Bearer\s+)?[^\s,;)}}\]\"']+)",
    re.IGNORECASE,
)
IN_URL = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s@\"']+@", re.IGNORECASE)


_GIVEN: set[str] = set()
"""Values of secret settings; of the whole process, as the environment is, for an error may be raised anywhere."""


def remember(settings: Any) -> None:
    """Take note of the values of secret settings, nested anywhere in ``settings``: ``hide`` knows them from then on."""
    if isinstance(settings, (list, tuple)):
        for value in settings:
            remember(value)
    for name, value in _named(settings).items():
        if isinstance(name, str) and is_secret(name) and isinstance(value, str) and len(value) >= SHORTEST:
            _GIVEN.add(value)
        else:
            remember(value)


def is_secret(name: str) -> bool:
    """Whether a setting of this name holds a secret; of a dotted name the last part counts."""
    return SETTING.fullmatch(name.rpartition(".")[2]) is not None


def hide(text: str) -> str:
    """The text with ``***`` in the place of secrets: those of environment and settings, named ones, a URL's user."""
    for value in _known():
        text = text.replace(value, HIDDEN)
    text = IN_TEXT.sub(lambda found: found["name"] + (found["value"] if _is_none(found["value"]) else HIDDEN), text)
    return IN_URL.sub(rf"\1{HIDDEN}@", text)


def hide_words(words: Sequence[str]) -> list[str]:
    """Words of a command line; the value of an option that is secret may be the next word."""
    shown, secret_follows = [], False
    for word in words:
        option, equals, _ = word.partition("=")
        secret = option.startswith("-") and is_secret(option.lstrip("-"))
        if secret_follows and not word.startswith("-"):
            shown.append(HIDDEN)
        else:
            shown.append(f"{option}={HIDDEN}" if secret and equals else hide(word))
        secret_follows = secret and not equals
    return shown


def hide_settings(settings: T, blank: str | None = HIDDEN) -> T:
    """A copy of nested settings without secrets.

    Args:
        settings: Mappings, lists, jsonargparse's namespaces, and values; other objects are kept as they are.
        blank: What takes the place of the value of a secret setting.
    """
    found: Any = settings
    if isinstance(settings, str):
        return hide(settings)  # type: ignore[return-value]
    if isinstance(settings, (list, tuple)):
        return type(settings)(hide_settings(value, blank) for value in settings)
    if not isinstance(settings, Mapping | Namespace):
        return settings
    hidden = {name: _hidden(name, value, blank) for name, value in _named(settings).items()}
    return type(found)(**hidden) if isinstance(settings, Namespace) else hidden  # type: ignore[return-value]


def _named(settings: Any) -> Mapping[Any, Any]:
    if isinstance(settings, Namespace):
        return vars(settings)
    return settings if isinstance(settings, Mapping) else {}


def _hidden(name: Any, value: Any, blank: str | None) -> Any:
    secret = isinstance(name, str) and is_secret(name) and isinstance(value, str)
    return blank if secret else hide_settings(value, blank)


def _known() -> list[str]:
    """Values of the environment's and the settings' secrets, long ones first: one may be a part of another."""
    values = _GIVEN | {
        value for name, value in os.environ.items() if VARIABLE.fullmatch(name) and len(value) >= SHORTEST
    }
    return sorted(values, key=len, reverse=True)


def _is_none(value: str) -> bool:
    return value.strip("\"'").lower() in ("", "none", "null")
