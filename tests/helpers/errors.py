"""What an error says: one that a call must raise, and one with which a command must end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dppo_lightning.base.errors import ConfigError


def config_error(call: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    """The one line of the ConfigError that a call raises."""
    with pytest.raises(ConfigError) as caught:
        call(*arguments, **named)
    message = str(caught.value)
    assert "\n" not in message
    return message


def printed_error(capsys: pytest.CaptureFixture[str], command: Callable[..., Any], *arguments: Any) -> str:
    """The one line that a command prints which must end with code 2, and without a traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        command(*arguments)
    printed = capsys.readouterr()
    assert exit_.value.code == 2
    lines = [line for line in printed.err.splitlines() if line.strip()]
    assert len(lines) == 1, printed.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in printed.out
    return lines[0]
