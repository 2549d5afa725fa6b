"""The command line: ``dppo fit | validate | test | generate | prepare | export | slurm | doctor``."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import transformers
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from dppo_lightning.callbacks.completions import CompletionLog
from dppo_lightning.callbacks.curves import Curves
from dppo_lightning.callbacks.heldout import HeldOutEvaluation
from dppo_lightning.callbacks.mask_audit import MaskAudit
from dppo_lightning.callbacks.profile import Profile
from dppo_lightning.callbacks.progress import RunProgressBar
from dppo_lightning.callbacks.run_record import RunRecord, check_unused, discard_unless_begun
from dppo_lightning.callbacks.start_table import StartTable
from dppo_lightning.callbacks.summary import Summary
from dppo_lightning.callbacks.timeline_log import TimelineLog
from dppo_lightning.callbacks.utilisation import Utilisation
from dppo_lightning.commands import (
    doctor_parser,
    export_parser,
    prepare_parser,
    run_export,
    run_prepare,
    run_slurm,
    slurm_parser,
    underscored,
)
from dppo_lightning.doctor import doctor
from dppo_lightning.errors import ConfigError, DPPOError, Requeued
from dppo_lightning.generation import GeneratingTrainer
from dppo_lightning.metrics_file import MetricsFile
from dppo_lightning.module import DPPOModule
from dppo_lightning.parsing import OneLineParser
from dppo_lightning.rollout.datamodule import RolloutDataModule
from dppo_lightning.rollout.transformers_engine import TransformersEngine  # noqa: F401  # known by its short name
from dppo_lightning.rollout.vllm_remote import VLLMRemote  # noqa: F401  # known by its short name
from dppo_lightning.scaling.requeue import checkpoint_to_continue
from dppo_lightning.scaling.slurm_run import SlurmRun, default_run_dir
from dppo_lightning.scaling.strategies import check_strategy

# in the environment, so that the ranks that Lightning starts have the same run directory
STARTED = os.environ.setdefault("DPPO_STARTED", f"{datetime.now():%Y-%m-%d_%H-%M-%S}")
DEFAULT_RUN_DIR = default_run_dir(os.environ) or f"runs/{STARTED}"

log = logging.getLogger(__name__)

TRAINER_DEFAULTS: dict[str, Any] = {
    "devices": 1,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,  # the held-out evaluation before the first step is a full one, and logged
    "enable_model_summary": False,  # the start table says it
}


class DPPOCommandLine(LightningCLI):
    """LightningCLI with a run directory, the callbacks that every run has, and ``generate``."""

    def __init__(self, args: list[str]) -> None:
        self.slurm = SlurmRun(os.environ)
        super().__init__(
            DPPOModule,
            RolloutDataModule,
            trainer_class=GeneratingTrainer,
            save_config_callback=RunRecord,
            save_config_kwargs={"overwrite": True},  # a directory that holds a run was refused before, unless resumed
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_kwargs={"prog": "dppo"},
            parser_class=OneLineParser,
            auto_configure_optimizers=False,
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        lightning = LightningCLI.subcommands()
        return {name: lightning[name] for name in ("fit", "validate", "test")} | {"generate": {"model", "datamodule"}}

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        assert parser._subcommands_action is not None
        for name, command in COMMANDS.items():
            parser._subcommands_action.add_subcommand(name, command.parser(), help=command.help)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str, default=DEFAULT_RUN_DIR, help="Where the run is recorded.")
        parser.add_argument("--profile", type=int, default=0, help="Optimizer steps to trace, after two; 0: none.")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.filename": "{step}", "checkpoint.save_last": "link"})
        parser.link_arguments("run_dir", "trainer.default_root_dir")
        parser.link_arguments("seed_everything", "data.seed")

    def before_instantiate_classes(self) -> None:
        if self.subcommand != "generate":
            self.slurm.check(self._get(self.config, "trainer"))
        if self.subcommand == "fit" and self._continues() is None:
            check_unused(Path(self._get(self.config, "run_dir")))

    def _continues(self) -> str | None:
        """Checkpoint that ``fit`` goes on from: the one that is asked for, or that a requeued job has saved."""
        asked = self._get(self.config, "ckpt_path")
        if asked is not None:
            return asked
        saved = checkpoint_to_continue(os.environ, Path(self._get(self.config, "run_dir")))
        return None if saved is None else str(saved)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "fit" and arguments.get("ckpt_path") is None and (found := self._continues()) is not None:
            log.info(f"SLURM has started this job again: the run goes on from {found}")
            arguments["ckpt_path"] = found
        return arguments

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except DPPOError:
            if subcommand == "fit" and self._continues() is None:
                discard_unless_begun(Path(self._get(self.config, "run_dir")))
            raise

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Add what every run has: CSV and TensorBoard beside the configured loggers, and the standard callbacks."""
        config = self._get(self.config_init, "trainer")
        check_strategy(config.get("strategy"))
        if self.subcommand == "generate":
            return super().instantiate_trainer(logger=False, **kwargs)
        run_dir = config["default_root_dir"]
        configured = config.get("logger")
        more = configured if isinstance(configured, list) else [configured] if isinstance(configured, Logger) else []
        loggers = [
            MetricsFile(run_dir, name="", version="", flush_logs_every_n_steps=1),
            TensorBoardLogger(run_dir, name="tensorboard", version=""),
            *more,
        ]
        standard = standard_callbacks()
        if config.get("enable_progress_bar") is False:
            standard = [callback for callback in standard if not isinstance(callback, RunProgressBar)]
        traced = self._get(self.config_init, "profile") if self.subcommand == "fit" else 0
        callbacks = [*(config.get("callbacks") or []), *standard, *([Profile(traced)] if traced else [])]
        if self.subcommand == "fit":
            callbacks += self.slurm.callbacks(callbacks)
        plugins = self.slurm.plugins(config.get("plugins"))
        try:
            return super().instantiate_trainer(logger=loggers, callbacks=callbacks, plugins=plugins, **kwargs)
        except (ValueError, MisconfigurationException) as error:  # a device, a plugin: what Lightning does not accept
            raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error


def standard_callbacks() -> list[pl.Callback]:
    """What every run records and shows."""
    return [
        StartTable(),
        HeldOutEvaluation(),
        CompletionLog(),
        MaskAudit(),
        TimelineLog(),
        Utilisation(),
        RunProgressBar(),
        Summary(),
        Curves(),
    ]


class RecipeReader(DPPOCommandLine):
    """Parses the arguments of ``dppo fit`` and builds nothing."""

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def run_doctor(arguments: list[str]) -> None:
    """Run ``dppo doctor``; exits with code 1 when something fails."""
    chosen = doctor_parser().parse_args(underscored(arguments))
    recipe = None
    if chosen.config:
        given = [word for path in chosen.config for word in ("--config", path)]
        recipe = RecipeReader(["fit", *given]).config.fit.as_dict()
    if not doctor(recipe, chosen.gpus, chosen.gpu_memory_gib):
        sys.exit(1)


class Command(NamedTuple):
    """A command that is none of LightningCLI's: its parser, what it does with its arguments, and its line of help."""

    parser: Callable[[], LightningArgumentParser]
    run: Callable[[list[str]], None]
    help: str


COMMANDS = {
    "prepare": Command(prepare_parser, run_prepare, "Write a starting model."),
    "export": Command(export_parser, run_export, "Write a trained model."),
    "slurm": Command(slurm_parser, run_slurm, "Submit a run to SLURM."),
    "doctor": Command(doctor_parser, run_doctor, "Check this machine, size a recipe."),
}


def quieten() -> None:
    """Leave the screen to our own messages, the start table, the progress bar and the summary."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    transformers.utils.logging.disable_progress_bar()
    # accelerate imports DeepSpeed wherever it is installed, and it says what the start table says
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


@contextmanager
def messages() -> Iterator[None]:
    """Show what the package itself reports."""
    own, handler = logging.getLogger("dppo_lightning"), logging.StreamHandler(sys.stdout)
    own.setLevel(logging.INFO)
    own.addHandler(handler)
    try:
        yield
    finally:
        own.removeHandler(handler)


def main(args: list[str] | None = None) -> None:
    """Entry point of ``dppo``: a mistake of the user's ends in one line and exit code 2, without a traceback."""
    arguments = sys.argv[1:] if args is None else args
    quieten()
    if os.getcwd() not in sys.path:  # classes and functions of the user's own, named by import path
        sys.path.insert(0, os.getcwd())
    try:
        with messages():
            if arguments and arguments[0] in COMMANDS:
                COMMANDS[arguments[0]].run(arguments[1:])
            else:
                DPPOCommandLine(arguments)
    except Requeued as stop:
        print(stop, flush=True)
    except Exception as error:
        mistake = users_mistake(error)
        if mistake is None:
            raise
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)


def users_mistake(error: BaseException | None) -> DPPOError | None:
    """The DPPOError in a chain of causes: jsonargparse wraps what a constructor raises."""
    while error is not None and not isinstance(error, DPPOError):
        error = error.__cause__
    return error
