"""Resumption with another number of ranks, or of micro-batches per optimizer step, than the run that was saved."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from dppo_lightning.base.errors import DataError


def recount_batches(checkpoint: dict[str, Any], accumulate_grad_batches: int) -> None:
    """Change the batch counts of a Lightning checkpoint, in place, to those of the run that goes on.

    Lightning ends an optimizer step wherever the count of batches is a multiple of ``accumulate_grad_batches``. The
    count comes from the checkpoint, so after 3 steps of one micro-batch the first step of two would end after one.

    Args:
        checkpoint: Checkpoint as given to ``on_load_checkpoint``, saved at the end of an optimizer step.
        accumulate_grad_batches: Number of micro-batches per optimizer step of the run that goes on.
    """
    loops = checkpoint.get("loops", {}).get("fit_loop")
    if loops is None:
        return
    counts = loops["epoch_loop.batch_progress"]["current"]
    shift = checkpoint["global_step"] * accumulate_grad_batches - counts["ready"]
    for name in counts:  # they differ by one where the checkpoint was written inside a hook
        counts[name] += shift


def optimizer_settings(trainer: pl.Trainer) -> list[dict[str, float]]:
    """Learning rate, before any schedule, and weight decay of each group of parameters, as they are now."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return [
        {"lr": float(group.get("initial_lr", group["lr"])), "weight_decay": float(group.get("weight_decay", 0.0))}
        for group in groups
    ]


def apply_optimizer_settings(trainer: pl.Trainer, settings: list[dict[str, float]]) -> None:
    """Give the optimizers the settings of this session's configuration, in place of those of a checkpoint.

    A schedule goes on where it was: the present learning rate is scaled as its base is.

    Args:
        trainer: Trainer whose optimizers are restored.
        settings: Result of ``optimizer_settings`` before they were.
    """
    loaded = optimizer_settings(trainer)
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
    for place, (group, old, new) in enumerate(zip(groups, loaded, settings, strict=True)):
        if old["weight_decay"] != new["weight_decay"]:
            group["weight_decay"] = new["weight_decay"]
        if old["lr"] == new["lr"]:
            continue
        scale = new["lr"] / old["lr"] if old["lr"] else 1.0
        group["lr"] = group["lr"] * scale
        group["initial_lr"] = new["lr"]
        for schedule in schedules:
            schedule.base_lrs[place] = new["lr"]
            schedule._last_lr[place] = group["lr"]


TAG = "checkpoint"
"""Name that Lightning gives the one set of files in a checkpoint folder of DeepSpeed's."""


def reshape(checkpoint: str | Path, out: str | Path) -> Path:
    """Write a ZeRO checkpoint as one that any number of ranks can load ("universal", one file per parameter).

    Needs as much disk space again as the checkpoint has. Only the parameters, the optimizer state and what Lightning
    saved are in it: exactly what the original holds.

    Args:
        checkpoint: Folder that a run with ZeroStrategy has saved.
        out: Folder to write; it must not exist yet.

    Returns:
        ``out``, the folder to give to ``--ckpt_path``.

    Raises:
        DataError: ``checkpoint`` is no such folder, ``out`` exists, or DeepSpeed could not convert it.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if not ranks_of(checkpoint):
        raise DataError(f"{str(checkpoint)!r} is no checkpoint of a ZeRO run: it holds no optimizer shards")
    if out.exists():
        raise DataError(f"{str(out)!r} exists already: name a folder to write")
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(checkpoint / TAG), "--output_folder", str(out / TAG)]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if run.returncode:
        last = run.stdout.strip().splitlines()[-1:] or [f"exit code {run.returncode}"]
        raise DataError(f"deepspeed could not convert {str(checkpoint)!r}: {last[0]}")
    for name in ("latest", "latest_universal"):
        (out / name).write_text(TAG)
    return out


def is_universal(checkpoint: str | Path) -> bool:
    """Tell whether ``reshape`` has written the checkpoint."""
    return (Path(checkpoint) / "latest_universal").is_file()


def ranks_of(checkpoint: str | Path) -> int:
    """Number of ranks that have written a checkpoint of DeepSpeed's; 0 where it is no such checkpoint, or universal."""
    return len(list((Path(checkpoint) / TAG).glob("*zero_pp_rank_*_optim_states.pt")))
