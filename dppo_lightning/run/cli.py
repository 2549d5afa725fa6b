"""The command line: ``dppo fit | validate | test | generate | prepare | export | slurm | doctor``.

LightningCLI runs ``fit``, ``validate``, ``test`` and ``generate``, which are methods of the trainer; the others are in
``COMMANDS``.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from dppo_lightning.base.errors import ConfigError, Stopped
from dppo_lightning.base.secrets import hide, hide_words, remember
from dppo_lightning.generate import RolloutEngine, TransformersEngine, VLLMEmbedded, VLLMRemote
from dppo_lightning.generate.schedule import check_repeatable
from dppo_lightning.run.callbacks.checkpoint import Checkpoint, identity
from dppo_lightning.run.callbacks.curves import Curves
from dppo_lightning.run.callbacks.health import Health
from dppo_lightning.run.callbacks.heldout import HeldOutEvaluation
from dppo_lightning.run.callbacks.mask_audit import MaskAudit
from dppo_lightning.run.callbacks.profile import Profile
from dppo_lightning.run.callbacks.record import CompletionLog, RunRecord, TimelineLog
from dppo_lightning.run.callbacks.screen import RunProgressBar, StartTable, Summary
from dppo_lightning.run.callbacks.stop import StopOnSignal
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
from dppo_lightning.run.messages import find_mistake, own_messages, print_error, silence_other_libraries
from dppo_lightning.run.metrics_file import MetricsFile
from dppo_lightning.run.parsing import OneLineParser
from dppo_lightning.run.place import RUN_DIR, claim, find_checkpoint, folder_of_evaluation, is_rank_zero
from dppo_lightning.run.resume import check_changes, check_note, read_settings, split_resume, words_of_resume
from dppo_lightning.run.run_directory import RunDirectory
from dppo_lightning.run.slurm.job import SlurmRun, default_run_dir, started_again
from dppo_lightning.scaling.strategies import check_strategy
from dppo_lightning.train.datamodule import RolloutDataModule
from dppo_lightning.train.module import DPPOModule

log = logging.getLogger(__name__)

ENGINES: tuple[type[RolloutEngine], ...] = (VLLMEmbedded, VLLMRemote, TransformersEngine)
"""Engines that a recipe may name without their module: jsonargparse knows only classes that are imported."""

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
        self.stop = StopOnSignal()
        self.asked = args[0] if args else ""
        self.resumed: RunDirectory | None = None  # the run that ``--resume`` names
        if args[:1] == ["fit"]:
            named, rest = split_resume(args[1:])
            self.resumed = None if named is None else RunDirectory(named)
            args = ["fit", *(rest if self.resumed is None else words_of_resume(self.resumed, rest))]
        self.goes_on = self.resumed is not None or started_again(os.environ)
        self.claimed: RunDirectory | None = None
        try:
            self._run(args)
        finally:
            self.stop.forget()
            os.environ.pop(RUN_DIR, None)
            if self.claimed is not None and is_rank_zero():
                if not self.goes_on:
                    # what fails before its first completion leaves nothing, so that the next try is not refused
                    self.claimed.discard_unless_begun()
                self.claimed.release()

    def _run(self, args: list[str]) -> None:
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

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # Lightning's is static, and called on self
        """Name Lightning's commands that there are, and arguments of each that are no options.

        Only the one that is asked for, where one is: each costs .05 s, for the options of all its classes.
        """
        lightning = LightningCLI.subcommands()
        all_of_them = {name: lightning[name] for name in ("fit", "validate", "test")}
        all_of_them |= {"generate": {"model", "datamodule"}}
        return {self.asked: all_of_them[self.asked]} if self.asked in all_of_them else all_of_them

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        # without this ``dppo --help`` does not show the commands that are none of Lightning's
        super()._add_subcommands(parser, **kwargs)
        if self.asked in self.subcommands():
            return
        assert parser._subcommands_action is not None
        for name, command in COMMANDS.items():
            parser._subcommands_action.add_subcommand(name, command.parser(), help=command.help)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options that Lightning does not have."""
        parser.add_argument(
            "--run_dir", type=str | None, default=None, help="Folder of the run's record; null: a new one in runs/."
        )
        parser.add_argument(
            "--profile", type=int, default=0, help="Optimizer steps to trace, after two others; 0: none."
        )
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.add_argument(
            "--deterministic", type=bool, default=False, help="Have two runs on one machine agree to the bit."
        )
        parser.link_arguments("run_dir", "trainer.default_root_dir")
        parser.link_arguments("seed_everything", "data.seed")

    def before_instantiate_classes(self) -> None:
        """Check the job, and claim the run directory or find the checkpoint, before anything slow begins."""
        remember(self.config)
        if self._get(self.config, "deterministic"):
            self._get(self.config, "trainer")["deterministic"] = True
        if self.subcommand != "generate":
            self.slurm.check(self._get(self.config, "trainer"))
        if self.subcommand == "fit":
            self.stop.listen()
            self._claim()
        else:
            self._look_up()

    def _claim(self) -> None:
        named = self._get(self.config, "run_dir") or default_run_dir(os.environ)
        if self.resumed is not None:
            settings = self._parser("fit").dump(self.config["fit"], skip_none=False, skip_validation=True)
            for line in check_changes(read_settings(self.resumed.path / "config.yaml"), yaml.safe_load(settings)):
                log.info(f"changed: {line}")
        self.claimed, checkpoint = claim(named, self._get(self.config, "ckpt_path"), self.goes_on)
        self._record_in(str(self.claimed.path), None if checkpoint is None else str(checkpoint))

    def _look_up(self) -> None:
        """For ``validate``, ``test`` and ``generate``: find the checkpoint, and a folder for what is recorded."""
        named, chosen = self._get(self.config, "run_dir"), self._get(self.config, "ckpt_path")
        checkpoint = find_checkpoint(named, chosen)
        folder = named if self.subcommand == "generate" else folder_of_evaluation(named)
        self._record_in(folder, checkpoint)

    def _record_in(self, folder: str | None, checkpoint: str | None) -> None:
        config = self.config[str(self.subcommand)]
        config["run_dir"], config["trainer.default_root_dir"], config["ckpt_path"] = folder, folder, checkpoint

    def instantiate_classes(self) -> None:
        """Build everything, and refuse what a run that is to be repeated cannot have."""
        super().instantiate_classes()
        if self._get(self.config, "trainer")["deterministic"]:
            check_repeatable(self.datamodule.streaming, self.datamodule.selection)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        # the first place where the module is there and Lightning has not begun: the engine starts next
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "fit" and arguments.get("ckpt_path") is not None:
            settings = identity(self.model, self.datamodule)
            check_note(Path(arguments["ckpt_path"]), settings, self.trainer.max_steps)
        return arguments

    def _run_subcommand(self, subcommand: str) -> None:
        # Python looks for garbage among all objects when a quarter of them are new: of the half a million that imports
        # leave, that is once in some 100,000 steps. Frozen ones do not count; ``collect`` counts the others.
        gc.freeze()
        gc.collect()
        super()._run_subcommand(subcommand)

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
            MetricsFile(run_dir),
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
            callbacks += [*self.slurm.callbacks(callbacks), self.stop]
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
    except Stopped as stop:
        print(stop, flush=True)
        if stop.exit_code:
            sys.exit(stop.exit_code)
    except Exception as error:
        mistake = find_mistake(error)
        if mistake is None:
            raise
        print(hide(f"error: {mistake}"), file=sys.stderr)
        sys.exit(2)
