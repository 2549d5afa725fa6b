"""The commands beside LightningCLI's own: ``prepare``, ``export`` and ``slurm``, and the parser of ``doctor``."""

from __future__ import annotations

import re
import sys
from typing import Literal

from lightning.pytorch.cli import LightningArgumentParser

from dppo_lightning.export import export
from dppo_lightning.parsing import OneLineParser
from dppo_lightning.prepare import prepare
from dppo_lightning.scaling.slurm import Job, submit


def prepare_parser() -> LightningArgumentParser:
    """Parser of ``dppo prepare``."""
    parser = OneLineParser(prog="dppo prepare", description="Write a starting model as a Hugging Face folder.")
    parser.add_argument("name", type=Literal["tiny", "smollm2"], help="Which model.")
    parser.add_argument("--out", type=str, required=True, help="Folder to write; it must not exist yet.")
    return parser


def export_parser() -> LightningArgumentParser:
    """Parser of ``dppo export``."""
    parser = OneLineParser(prog="dppo export", description="Write a run's trained model as a Hugging Face folder.")
    parser.add_argument("--run", type=str, required=True, help="Run directory; it says what was trained.")
    parser.add_argument("--checkpoint", type=str, default="last", help="Which of the run's checkpoints, or a path.")
    parser.add_argument("--out", type=str, required=True, help="Folder to write; it must not exist yet.")
    parser.add_argument("--adapter", action="store_true", help="Write LoRA adapters alone, in peft's format.")
    parser.add_argument("--dtype", type=Literal["float32", "bfloat16"], default="float32", help="Of the weights.")
    return parser


def slurm_parser() -> LightningArgumentParser:
    """Parser of ``dppo slurm``; what follows ``--`` goes to ``dppo fit``."""
    parser = OneLineParser(prog="dppo slurm", description="Write a run's batch script and submit it.")
    parser.add_argument("--config", action="append", default=[], help="Recipe; several combine, the last one wins.")
    parser.add_class_arguments(Job, skip={"config", "options", "python"})
    parser.add_argument("--dry_run", action="store_true", help="Print the script, submit nothing.")
    return parser


def doctor_parser() -> LightningArgumentParser:
    """Parser of ``dppo doctor``."""
    parser = OneLineParser(prog="dppo doctor", description="Check this machine, and size a recipe.")
    parser.add_argument("--config", action="append", default=[], help="Recipe; several combine, the last one wins.")
    parser.add_argument("--gpus", type=int, help="GPUs to size the recipe for.")
    parser.add_argument("--gpu_memory_gib", type=float, help="Memory of each.")
    return parser


def run_prepare(arguments: list[str]) -> None:
    """Run ``dppo prepare``."""
    chosen = prepare_parser().parse_args(arguments)
    prepare(chosen.name, chosen.out)


def run_export(arguments: list[str]) -> None:
    """Run ``dppo export``."""
    chosen = export_parser().parse_args(arguments)
    export(chosen.run, chosen.out, chosen.checkpoint, chosen.adapter, chosen.dtype)


def run_slurm(arguments: list[str]) -> None:
    """Run ``dppo slurm``."""
    own, options = arguments, []
    if "--" in arguments:
        place = arguments.index("--")
        own, options = arguments[:place], arguments[place + 1 :]
    chosen = slurm_parser().parse_args(underscored(own)).as_dict()
    dry_run = chosen.pop("dry_run")
    submit(Job(**chosen, options=options, python=sys.executable), dry_run)


def underscored(words: list[str]) -> list[str]:
    """Options as this command line spells them: --dry_run for --dry-run."""
    return [re.sub(r"^--[\w-]+", lambda option: "--" + option[0][2:].replace("-", "_"), word) for word in words]
