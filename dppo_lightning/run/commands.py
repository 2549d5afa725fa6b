"""Commands that Lightning does not have: generate, prepare, export and slurm.

``generate`` is a method of the trainer, as Lightning's own commands are. Each of the others has a parser of its options
and a function that runs it; ``dppo doctor`` has a folder of its own, run/doctor.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Literal

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.prompts import JsonlPrompts
from dppo_lightning.run.export import export
from dppo_lightning.run.parsing import OneLineParser, underscored
from dppo_lightning.run.prepare import prepare
from dppo_lightning.run.slurm.script import Job, submit
from dppo_lightning.train.datamodule import RolloutDataModule
from dppo_lightning.train.module import DPPOModule


class GeneratingTrainer(pl.Trainer):
    """Lightning's trainer with one more command, ``generate``."""

    def generate(
        self,
        model: DPPOModule,
        datamodule: RolloutDataModule,
        output: str,
        prompts: str | None = None,
        samples: int = 1,
        ckpt_path: str | None = None,
    ) -> None:
        """Write completions of prompts, with their scores, as JSON lines.

        Args:
            model: Module whose policy generates.
            datamodule: Data with the engine, the sampling and the reward.
            output: File to write; it appears only when it is complete.
            prompts: JSONL file with ``prompt`` or ``messages``; None: the recipe's held-out prompts.
            samples: Number of completions of each prompt, >= 1.
            ckpt_path: Checkpoint whose weights to use; None: the model folder as it is.

        Raises:
            ConfigError: The output exists already, or ``samples`` is below 1.
            DataError: The prompt file cannot be used.
        """
        target = Path(output)
        if target.exists():
            raise ConfigError(f"{output!r} exists already: choose another --output")
        if samples < 1:
            raise ConfigError(f"samples must be >= 1, got {samples}")
        datamodule.heldout_samples = samples
        if prompts is not None:
            datamodule.prompts = JsonlPrompts(train=prompts)
            datamodule.predict_split = "train"
        batches = self.predict(model, datamodule=datamodule, ckpt_path=ckpt_path) or []
        if not self.is_global_zero:
            return
        records = [record for batch in batches for record in batch]
        if not records:
            raise ConfigError(
                "there are no held-out prompts to complete: set --prompts, or hold some out in data.prompts"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(target.name + ".unfinished")
        unfinished.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        os.replace(unfinished, target)
        print(f"{len(records)} completions in {output}", flush=True)


def prepare_parser() -> LightningArgumentParser:
    """Parser of ``dppo prepare``."""
    parser = OneLineParser(prog="dppo prepare", description="Write a starting model as a Hugging Face folder.")
    parser.add_argument("name", type=Literal["tiny", "smollm2"], help="Model to write.")
    parser.add_argument("--out", type=str, required=True, help="Folder to write; it must not exist yet.")
    return parser


def run_prepare(arguments: list[str]) -> None:
    """Run ``dppo prepare``."""
    chosen = prepare_parser().parse_args(arguments)
    prepare(chosen.name, chosen.out)


def export_parser() -> LightningArgumentParser:
    """Parser of ``dppo export``."""
    parser = OneLineParser(prog="dppo export", description="Write a run's trained model as a Hugging Face folder.")
    parser.add_argument("--run", type=str, required=True, help="Run directory; it says what was trained.")
    parser.add_argument("--checkpoint", type=str, default="last", help="One of the run's checkpoints, or a path.")
    parser.add_argument("--out", type=str, required=True, help="Folder to write; it must not exist yet.")
    parser.add_argument("--adapter", action="store_true", help="Write LoRA adapters alone, in peft's format.")
    parser.add_argument("--dtype", type=Literal["float32", "bfloat16"], default="float32", help="Dtype of the weights.")
    return parser


def run_export(arguments: list[str]) -> None:
    """Run ``dppo export``."""
    chosen = export_parser().parse_args(arguments)
    export(chosen.run, chosen.out, chosen.checkpoint, chosen.adapter, chosen.dtype)


def slurm_parser() -> LightningArgumentParser:
    """Parser of ``dppo slurm``; what follows ``--`` goes to ``dppo fit``."""
    parser = OneLineParser(prog="dppo slurm", description="Write a run's batch script and submit it.")
    parser.add_argument("--config", action="append", default=[], help="Recipe; several combine, the last one wins.")
    parser.add_class_arguments(Job, skip={"config", "options", "python"})
    parser.add_argument("--dry_run", action="store_true", help="Print the script, submit nothing.")
    return parser


def run_slurm(arguments: list[str]) -> None:
    """Run ``dppo slurm``."""
    own, options = arguments, []
    if "--" in arguments:
        place = arguments.index("--")
        own, options = arguments[:place], arguments[place + 1 :]
    chosen = slurm_parser().parse_args(underscored(own)).as_dict()
    dry_run = chosen.pop("dry_run")
    submit(Job(**chosen, options=options, python=sys.executable), dry_run)
