"""Weights out of a checkpoint on disk, whichever strategy wrote it: nothing is trained, no process group is needed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from dppo_lightning.errors import ConfigError, DataError
from dppo_lightning.optional import require

DEEPSPEED_TAG = "checkpoint"
"""Folder inside the checkpoint's own that Lightning has DeepSpeed write to."""


def find_checkpoint(run: Path, name: str) -> Path:
    """A run's checkpoint, by path, by file name, or "last".

    Raises:
        ConfigError: There is none.
    """
    folder = run / "checkpoints"
    for path in (folder / f"{name}.ckpt", folder / name, Path(name)):
        if path.exists() and name:
            return path
    found = sorted(path.name for path in folder.glob("*.ckpt"))
    there = f"there are {', '.join(found)}" if found else "it has none"
    raise ConfigError(f"no checkpoint {name!r} in {folder}: {there}; set --checkpoint to one of them or to a path")


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The state dict of the LightningModule, on the CPU.

    Args:
        checkpoint: A file of Lightning's; or a folder of DeepSpeed's, of any ZeRO stage, whose float32 masters are
            joined; or a folder of torch's distributed checkpoints, as FSDP2 writes.

    Raises:
        ConfigError: deepspeed wrote it and is not installed.
        DataError: It is none of these, or damaged.
    """
    try:
        if checkpoint.is_file():
            found = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=False)["state_dict"]
        elif (checkpoint / ".metadata").is_file():
            found = _read_distributed(checkpoint)
        elif list(checkpoint.glob("*/*_model_states.pt")):
            found = _read_deepspeed(checkpoint)
        else:
            raise DataError(f"{checkpoint} is no checkpoint of Lightning, DeepSpeed or FSDP2")
    except (OSError, KeyError, ValueError, RuntimeError, EOFError, UnpicklingError) as error:
        if isinstance(error, (DataError, ConfigError)):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{checkpoint} cannot be read: {reason}") from error
    return {name.removeprefix("_forward_module.").removeprefix("module."): value for name, value in found.items()}


def _read_deepspeed(checkpoint: Path) -> Mapping[str, Tensor]:
    """Float32 masters of what was trained; what was frozen has none, and stage 1 keeps it with the model alone."""
    latest = checkpoint / "latest"
    tag = DEEPSPEED_TAG if (checkpoint / DEEPSPEED_TAG).is_dir() else latest.read_text().strip()
    whole = checkpoint / tag / "mp_rank_00_model_states.pt"  # stage 3 writes no such file
    model = torch.load(whole, map_location="cpu", mmap=True, weights_only=False)["module"] if whole.is_file() else {}
    if model and not list((checkpoint / tag).glob("*_optim_states.pt")):  # stage 0
        return model
    conversion = require("deepspeed.utils.zero_to_fp32", extra="deepspeed")
    with redirect_stdout(StringIO()):  # it prints what it meets on its way
        return model | conversion.get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag)


def _read_distributed(checkpoint: Path) -> dict[str, Tensor]:
    """The model's tensors alone: the optimizer's, twice as large, stay on disk."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    stored = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    prefix = "state_dict."
    wanted = {
        name: torch.empty(tuple(entry.size), dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(wanted, checkpoint_id=checkpoint, no_dist=True)
    return {name.removeprefix(prefix): value for name, value in wanted.items()}
