"""``dppo fit --resume RUN``: the run's own configuration, and which settings given beside it may differ."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.run.run_directory import FORMAT, RunDirectory, step_of

MAY_CHANGE = (
    "trainer.*",
    "checkpoint.*",
    "model.optimizer.*",
    "model.lr_scheduler.*",
    "model.gradient_checkpointing",
    "model.logits_mib",
    "model.shared_prompts",
    "model.divergence_diagnostics",
    "data.engine.*",
    "data.evaluate_every_n_steps",
    "data.heldout_samples",
    "data.parity_tolerance",
    "data.rewarding.*",
    "deterministic",
    "profile",
)
"""Settings that a run may change when it goes on."""
OF_A_SESSION = ("run_dir", "ckpt_path", "config", "trainer.default_root_dir", "weights_only")
"""Settings that differ from session to session."""


def split_resume(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Take ``--resume RUN`` out of the words of ``dppo fit``.

    Returns:
        The run directory, None where the option is not given; and the other words.

    Raises:
        ConfigError: It is given without a value, twice, or together with ``--run_dir``.
    """
    runs, rest = [], []
    words = iter(arguments)
    for word in words:
        if word == "--resume":
            runs.append(next(words, ""))
        elif word.startswith("--resume="):
            runs.append(word.partition("=")[2])
        else:
            rest.append(word)
    if not runs:
        return None, rest
    if len(runs) > 1 or not runs[0] or runs[0].startswith("--"):
        raise ConfigError("--resume takes one run directory: dppo fit --resume runs/NAME")
    if any(word.partition("=")[0] == "--run_dir" for word in rest):
        raise ConfigError("--resume names the run directory: leave --run_dir out")
    return runs[0], rest


def words_of_resume(run: RunDirectory, rest: list[str]) -> list[str]:
    """Write the words of ``dppo fit`` for a run that goes on.

    Args:
        run: The run.
        rest: Words given beside ``--resume``; they win over the run's own settings.

    Raises:
        ConfigError: There is no run.
    """
    config = run.path / "config.yaml"
    if not config.is_file():
        raise ConfigError(f"{str(run.path)!r} holds no run to go on from: it has no config.yaml")
    return ["--config", str(config), *rest, "--run_dir", str(run.path)]


def check_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Compare a run's settings with those that it is to go on with.

    Returns:
        A line for each setting that changes.

    Raises:
        ConfigError: One may not change.
    """
    old, new = flat(before), flat(now)
    lines = []
    for name in sorted({*old, *new}):
        if old.get(name) == new.get(name) or _matches(name, OF_A_SESSION):
            continue
        if not _matches(name, MAY_CHANGE):
            raise ConfigError(
                f"{name} is {new.get(name)!r} and was {old.get(name)!r}: a run cannot change it when it goes on; leave "
                "it out, or start a new run from its weights (dppo export, then model.policy)"
            )
        lines.append(f"{name}: {old.get(name)} -> {new.get(name)}")
    return lines


def check_note(checkpoint: Path, settings: Mapping[str, Any], max_steps: int) -> None:
    """Refuse a checkpoint of another run, or of a newer version, before anything slow begins.

    Args:
        checkpoint: The checkpoint.
        settings: Settings that cannot change, of the run that goes on.
        max_steps: Optimizer steps of the run that goes on.

    Raises:
        ConfigError: They do not fit together.
    """
    note = RunDirectory(checkpoint.parent.parent).note(checkpoint)
    if note.get("format", FORMAT) > FORMAT:
        raise ConfigError(
            f"{checkpoint} has format {note['format']} and this version reads {FORMAT}: install a newer dppo-lightning"
        )
    for name, value in note.get("settings", {}).items():
        if name in settings and settings[name] != value:
            raise ConfigError(f"{checkpoint} is of a run with {name}={value!r}, and this one has {settings[name]!r}")
    if step_of(checkpoint) > max_steps:
        raise ConfigError(
            f"{checkpoint} has {step_of(checkpoint)} optimizer steps and trainer.max_steps={max_steps}: raise it"
        )


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings: {"a": {"b": 1}} becomes {"a.b": 1}."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def read_settings(path: Path) -> dict[str, Any]:
    """Read the settings in a ``config.yaml`` that a run has written.

    Raises:
        ConfigError: It is no such file.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no settings")
    return found


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) or fnmatchcase(f"{name}.", pattern) for pattern in patterns)
