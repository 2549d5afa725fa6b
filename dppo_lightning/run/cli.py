"""The command line: ``dppo fit | validate | test | generate | prepare | export | slurm | doctor``.

LightningCLI runs ``fit``, ``validate``, ``test`` and ``generate``, which are methods of the trainer; the others are in
``COMMANDS``.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from traceback import format_exception
from types import TracebackType
from typing import Any, NamedTuple

import lightning.pytorch as pl
import transformers
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from dppo_lightning.base.errors import ConfigError, DPPOError, Requeued
from dppo_lightning.base.secrets import hide, hide_words, remember
from dppo_lightning.generate import RolloutEngine, TransformersEngine, VLLMEmbedded, VLLMRemote
from dppo_lightning.generate.schedule import check_repeatable
from dppo_lightning.run.callbacks.curves import Curves
from dppo_lightning.run.callbacks.health import Health
from dppo_lightning.run.callbacks.heldout import HeldOutEvaluation
from dppo_lightning.run.callbacks.mask_audit import MaskAudit
from dppo_lightning.run.callbacks.profile import Profile
from dppo_lightning.run.callbacks.record import (
    CompletionLog,
    MetricsFile,
    RunRecord,
    TimelineLog,
    check_unused,
    discard_unless_begun,
)
from dppo_lightning.run.callbacks.screen import RunProgressBar, StartTable, Summary
from dppo_lightning.run.callbacks.utilisation import Utilisation
from dppo_lightning.run.commands import (
    GeneratingTrainer,
    export_parser,
    prepare_parser,
    run_export,
    run_prepare,
    run_slurm,
    slurm_parser,
)
from dppo_lightning.run.doctor.command import doctor_parser, run_doctor
from dppo_lightning.run.parsing import OneLineParser
from dppo_lightning.run.slurm.job import SlurmRun, checkpoint_to_continue, default_run_dir
from dppo_lightning.scaling.strategies import check_strategy
from dppo_lightning.train.datamodule import RolloutDataModule
from dppo_lightning.train.module import DPPOModule

log = logging.getLogger(__name__)

ENGINES: tuple[type[RolloutEngine], ...] = (VLLMEmbedded, VLLMRemote, TransformersEngine)
"""Engines that a recipe may name without their module: jsonargparse knows only classes that are imported."""

STARTED = os.environ.setdefault("DPPO_STARTED", f"{datetime.now():%Y-%m-%d_%H-%M-%S}")
"""Time of the start; in the environment, so that the ranks that Lightning starts have the same run directory."""
DEFAULT_RUN_DIR = default_run_dir(os.environ) or f"runs/{STARTED}"

TRAINER_DEFAULTS: dict[str, Any] = {
    "devices": 1,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,  # there is a whole held-out evaluation before the first step, and it is logged
    "enable_model_summary": False,  # the start table has the sizes
}
"""Trainer settings that differ from Lightning's own defaults."""


class DPPOCommandLine(LightningCLI):
    """LightningCLI with a run directory, the callbacks that every run has, and ``generate``.

    It overrides private methods of LightningCLI: a comment in each says what is missing without it. ``_get`` is private
    too; without it a setting would have to be looked for under the command's name and outside of it.
    """

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
        """Name Lightning's commands that there are, and arguments of each that are no options."""
        lightning = LightningCLI.subcommands()
        return {name: lightning[name] for name in ("fit", "validate", "test")} | {"generate": {"model", "datamodule"}}

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        # without this ``dppo --help`` does not show the commands that are none of Lightning's
        super()._add_subcommands(parser, **kwargs)
        assert parser._subcommands_action is not None
        for name, command in COMMANDS.items():
            parser._subcommands_action.add_subcommand(name, command.parser(), help=command.help)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options that Lightning does not have."""
        parser.add_argument("--run_dir", type=str, default=DEFAULT_RUN_DIR, help="Folder of the run's record.")
        parser.add_argument(
            "--profile", type=int, default=0, help="Optimizer steps to trace, after two others; 0: none."
        )
        parser.add_argument(
            "--deterministic", type=bool, default=False, help="Have two runs on one machine agree to the bit."
        )
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.filename": "{step}", "checkpoint.save_last": "link"})
        parser.link_arguments("run_dir", "trainer.default_root_dir")
        parser.link_arguments("seed_everything", "data.seed")

    def before_instantiate_classes(self) -> None:
        """Check the job and the run directory before anything slow begins."""
        remember(self.config)
        if self._get(self.config, "deterministic"):
            self._get(self.config, "trainer")["deterministic"] = True
        if self.subcommand != "generate":
            self.slurm.check(self._get(self.config, "trainer"))
        if self.subcommand == "fit" and self._resumed_from() is None:
            check_unused(Path(self._get(self.config, "run_dir")))

    def instantiate_classes(self) -> None:
        """Build everything, and refuse what a run that is to be repeated cannot have."""
        super().instantiate_classes()
        if self._get(self.config, "trainer")["deterministic"]:
            check_repeatable(self.datamodule.streaming, self.datamodule.selection)

    def _resumed_from(self) -> str | None:
        """Path of the checkpoint that ``fit`` goes on from: ``ckpt_path``, or the newest of a job that was requeued."""
        chosen = self._get(self.config, "ckpt_path")
        if chosen is not None:
            return chosen
        saved = checkpoint_to_continue(os.environ, Path(self._get(self.config, "run_dir")))
        return None if saved is None else str(saved)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        # without this a job that SLURM has started again would begin its run from the start
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "fit" and arguments.get("ckpt_path") is None and (found := self._resumed_from()) is not None:
            log.info(f"SLURM has started this job again: the run goes on from {found}")
            arguments["ckpt_path"] = found
        return arguments

    def _run_subcommand(self, subcommand: str) -> None:
        # without this a run that fails before its first completion would leave files in its directory, and the next try
        # would be refused: "already holds a run"

        # Python looks for garbage among all objects when a quarter of them are new: of the half a million that imports
        # leave, that is once in some 100,000 steps. Frozen ones do not count; ``collect`` counts the others.
        gc.freeze()
        gc.collect()
        try:
            super()._run_subcommand(subcommand)
        except DPPOError:
            if subcommand == "fit" and self._resumed_from() is None:
                discard_unless_begun(Path(self._get(self.config, "run_dir")))
            raise

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the trainer with what every run has: CSV and TensorBoard loggers, and the standard callbacks."""
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
        chosen = config.get("callbacks") or []  # one with settings of the user's stands for the standard one
        standard = [callback for callback in standard if not any(type(own) is type(callback) for own in chosen)]
        traced = self._get(self.config_init, "profile") if self.subcommand == "fit" else 0
        callbacks = [*chosen, *standard, *([Profile(traced)] if traced else [])]
        if self.subcommand == "fit":
            callbacks += self.slurm.callbacks(callbacks)
        plugins = self.slurm.plugins(config.get("plugins"))
        try:
            return super().instantiate_trainer(logger=loggers, callbacks=callbacks, plugins=plugins, **kwargs)
        except (ValueError, MisconfigurationException) as error:  # Lightning refuses a device or a plugin, for example
            raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error


def standard_callbacks() -> list[pl.Callback]:
    """Make the callbacks that record and show every run."""
    return [
        StartTable(),
        HeldOutEvaluation(),
        CompletionLog(),
        MaskAudit(),
        Health(),
        TimelineLog(),
        Utilisation(),
        RunProgressBar(),
        Summary(),
        Curves(),
    ]


class RecipeReader(DPPOCommandLine):
    """Parser of the arguments of ``dppo fit``, which builds nothing.

    Its ``_run_subcommand`` overrides a private method of LightningCLI: without it the command would be run.
    """

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def read_recipe(paths: list[str]) -> dict[str, Any]:
    """Parse the recipes at ``paths`` as ``dppo fit`` does; where two of them differ, the last one wins."""
    options = [word for path in paths for word in ("--config", path)]
    return RecipeReader(["fit", *options]).config.fit.as_dict()


class Command(NamedTuple):
    """Command that LightningCLI does not have.

    Attributes:
        parser: Function that makes the parser of its options.
        run: Function that runs it, given the words after its name.
        help: Line in the list of commands.
    """

    parser: Callable[[], LightningArgumentParser]
    run: Callable[[list[str]], None]
    help: str


COMMANDS = {
    "prepare": Command(prepare_parser, run_prepare, "Write a starting model."),
    "export": Command(export_parser, run_export, "Write a trained model."),
    "slurm": Command(slurm_parser, run_slurm, "Submit a run to SLURM."),
    "doctor": Command(
        doctor_parser, partial(run_doctor, read_recipe=read_recipe), "Check this machine, size a recipe."
    ),
}


def main(args: list[str] | None = None) -> None:
    """Run ``dppo``; a mistake of the user ends in one line and exit code 2, without a traceback.

    Args:
        args: Words of the command line after ``dppo``; None: those of this process.
    """
    arguments = sys.argv[1:] if args is None else args
    sys.excepthook = print_error
    silence_other_libraries()
    if os.getcwd() not in sys.path:  # for the user's own classes, which a recipe names by their import path
        sys.path.insert(0, os.getcwd())
    try:
        with own_messages():
            if hide_words(arguments) != list(arguments):
                log.warning("a secret on the command line is seen by all on this machine: set it in the environment")
            if arguments and arguments[0] in COMMANDS:
                COMMANDS[arguments[0]].run(arguments[1:])
            else:
                DPPOCommandLine(arguments)
    except Requeued as stop:
        print(stop, flush=True)
    except Exception as error:
        mistake = find_mistake(error)
        if mistake is None:
            raise
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)


def silence_other_libraries() -> None:
    """Leave the screen to our own messages, the start table, the progress bar and the summary."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    transformers.utils.logging.disable_progress_bar()
    # accelerate imports DeepSpeed where it is installed, and DeepSpeed then prints this line in every run
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


@contextmanager
def own_messages() -> Iterator[None]:
    """Show the messages of this library on the screen."""
    own, handler = logging.getLogger("dppo_lightning"), logging.StreamHandler(sys.stdout)
    own.setLevel(logging.INFO)
    handler.addFilter(without_secrets)
    own.addHandler(handler)
    try:
        yield
    finally:
        own.removeHandler(handler)


def without_secrets(record: logging.LogRecord) -> bool:
    """Take secrets out of a message that is logged, in place."""
    record.msg, record.args = hide(record.getMessage()), None
    return True


def print_error(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print a traceback without secrets; for ``sys.excepthook``."""
    print(hide("".join(format_exception(kind, error, traceback))), end="", file=sys.stderr)


def find_mistake(error: BaseException | None) -> DPPOError | None:
    """Find the DPPOError in a chain of causes; jsonargparse wraps the errors of constructors in errors of its own."""
    while error is not None and not isinstance(error, DPPOError):
        error = error.__cause__
    return error
