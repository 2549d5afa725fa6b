"""Checkpoints as files: CheckpointFiles writes and reads them for the trainer; ``read_weights`` needs no trainer.

Whatever strategy wrote a checkpoint, its weights can be read without a process group and without a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor

from dppo_lightning.base.errors import ConfigError, DataError, one_line, require
from dppo_lightning.scaling.resume import TAG


class CheckpointFiles(CheckpointIO):
    """Write and read checkpoints that are one file: straight to their folder, and without running code on the way in.

    Lightning's own holds a second copy in memory, and writes through the system's folder of temporary files.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        with open(path, "wb") as file:  # given the path, torch's own writer hides why a disk refuses
            torch.save(checkpoint, file)
        try:  # only what is read is read: a state that could not be loaded is found now, not when the run is to go on
            torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except UnpicklingError as error:
            raise ConfigError(
                f"a checkpoint of this run could not be loaded again ({one_line(error)}): a state_dict of yours must "
                "hold plain values and tensors only"
            ) from error

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint onto the CPU.

        Raises:
            DataError: It is damaged, or holds more than plain values and tensors.
        """
        try:
            return torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as error:
            raise DataError(f"checkpoint {path} cannot be read: {one_line(error)}") from error

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Read the state dict of the LightningModule, onto the CPU.

    Args:
        checkpoint: A file that Lightning has written; or a folder that DeepSpeed has written, of any ZeRO stage, whose
            float32 weights are joined; or a folder of torch's distributed checkpoints, as FSDP2 writes.

    Raises:
        ConfigError: deepspeed has written the checkpoint and is not installed.
        DataError: The checkpoint is none of these, or it is damaged.
    """
    try:
        if checkpoint.is_file():
            found = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)["state_dict"]
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
    """Join the float32 weights of what was trained, and add what was frozen.

    Frozen weights have no float32 copy with the optimizer; stage 1 keeps them in the model's file only.
    """
    latest = checkpoint / "latest"
    tag = TAG if (checkpoint / TAG).is_dir() else latest.read_text().strip()
    whole = checkpoint / tag / "mp_rank_00_model_states.pt"  # stage 3 writes no such file
    model = torch.load(whole, map_location="cpu", mmap=True, weights_only=True)["module"] if whole.is_file() else {}
    if model and not list((checkpoint / tag).glob("*_optim_states.pt")):  # stage 0
        return model
    conversion = require("deepspeed.utils.zero_to_fp32", extra="deepspeed")
    with redirect_stdout(StringIO()):  # it prints every file that it reads
        return model | conversion.get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag)


def _read_distributed(checkpoint: Path) -> dict[str, Tensor]:
    """Read the model's tensors; those of the optimizer, twice as large, stay on disk."""
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
