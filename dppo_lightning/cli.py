"""The command line: ``dppo fit | validate | test | generate | prepare | export | slurm | doctor``."""

from __future__ import annotations

import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NoReturn

import lightning.pytorch as pl
import transformers
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from dppo_lightning import trust_region
from dppo_lightning.advantage import AdvantageEstimator
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
from dppo_lightning.doctor import doctor
from dppo_lightning.errors import ConfigError, DPPOError
from dppo_lightning.export import export
from dppo_lightning.generation import GeneratingTrainer
from dppo_lightning.metrics_file import MetricsFile
from dppo_lightning.module import DPPOModule
from dppo_lightning.prepare import prepare
from dppo_lightning.prompts import PromptSampler, PromptSource
from dppo_lightning.rewards import RewardFunction
from dppo_lightning.rollout.datamodule import RolloutDataModule
from dppo_lightning.rollout.engine import RolloutEngine
from dppo_lightning.rollout.transformers_engine import TransformersEngine  # noqa: F401  # known by its short name
from dppo_lightning.rollout.vllm_remote import VLLMRemote  # noqa: F401  # known by its short name
from dppo_lightning.scaling.requeue import Requeued, checkpoint_to_continue
from dppo_lightning.scaling.slurm import Job, submit
from dppo_lightning.scaling.slurm_run import SlurmRun, default_run_dir

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


COMPONENTS: dict[str, tuple[str, type]] = {
    "trust_region": ("trust region", trust_region.TrustRegion),
    "masks": ("trust region", trust_region.TrustRegion),
    "advantage": ("advantage estimator", AdvantageEstimator),
    "prompts": ("prompt source", PromptSource),
    "reward": ("reward", RewardFunction),
    "rewards": ("reward", RewardFunction),
    "engine": ("rollout engine", RolloutEngine),
    "sampler": ("prompt sampler", PromptSampler),
}
"""Configuration key -> what its class is, and the base class."""


class OneLineParser(LightningArgumentParser):
    """Reports what is wrong with a configuration in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # jsonargparse tries alternatives of a type by such parsers
            super().error(message, ex)
        raise ConfigError(explain(message, self))


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
        parser._subcommands_action.add_subcommand("prepare", prepare_parser(), help="Write a starting model.")
        parser._subcommands_action.add_subcommand("export", export_parser(), help="Write a trained model.")
        parser._subcommands_action.add_subcommand("slurm", slurm_parser(), help="Submit a run to SLURM.")
        parser._subcommands_action.add_subcommand("doctor", doctor_parser(), help="Check this machine, size a recipe.")

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
        if self.subcommand == "generate":
            return super().instantiate_trainer(logger=False, **kwargs)
        config = self._get(self.config_init, "trainer")
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
        except (ValueError, MisconfigurationException) as error:  # a strategy or device that Lightning does not know
            line = " ".join(str(error).split())
            raise ConfigError(f"trainer: {line}; configs/scaling/ has pieces that work") from error


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


class RecipeReader(DPPOCommandLine):
    """Parses the arguments of ``dppo fit`` and builds nothing."""

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def doctor_parser() -> LightningArgumentParser:
    """Parser of ``dppo doctor``."""
    parser = OneLineParser(prog="dppo doctor", description="Check this machine, and size a recipe.")
    parser.add_argument("--config", action="append", default=[], help="Recipe; several combine, the last one wins.")
    parser.add_argument("--gpus", type=int, help="GPUs to size the recipe for.")
    parser.add_argument("--gpu_memory_gib", type=float, help="Memory of each.")
    return parser


def examine(arguments: list[str]) -> None:
    """Run ``dppo doctor``; exits with code 1 when something fails."""
    chosen = doctor_parser().parse_args(underscored(arguments))
    recipe = None
    if chosen.config:
        given = [word for path in chosen.config for word in ("--config", path)]
        recipe = RecipeReader(["fit", *given]).config.fit.as_dict()
    if not doctor(recipe, chosen.gpus, chosen.gpu_memory_gib):
        sys.exit(1)


def underscored(words: list[str]) -> list[str]:
    """Options as this command line spells them: --dry_run for --dry-run."""
    return [re.sub(r"^--[\w-]+", lambda option: "--" + option[0][2:].replace("-", "_"), word) for word in words]


def slurm(arguments: list[str]) -> None:
    """Run ``dppo slurm``."""
    own, options = arguments, []
    if "--" in arguments:
        place = arguments.index("--")
        own, options = arguments[:place], arguments[place + 1 :]
    chosen = slurm_parser().parse_args(underscored(own)).as_dict()
    dry_run = chosen.pop("dry_run")
    submit(Job(**chosen, options=options, python=sys.executable), dry_run)


def explain(message: str, parser: LightningArgumentParser) -> str:
    """What jsonargparse reports, as one line, with the known names where a name is unknown."""
    line = " ".join(message.split())
    unknown = re.search(r"does not accept option '([\w.]+)'|[Uu]nrecognized arguments: --([\w.]+)", line)
    if unknown:
        key = unknown[1] or unknown[2]
        near = get_close_matches(key, config_keys(parser), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "`dppo fit --help` lists the known ones"
        return f"unknown config key {key!r}: {hint}"
    component = re.search(rf'[Kk]ey "(?:[\w.]*\.)?({"|".join(COMPONENTS)})"', line)
    given = re.search(r"path string: (\S+)|'class_path': '([^']+)'|Given value: '?([\w.]+)", line)
    if component and given and re.search(r"[Ii]mport path|not a subclass|ImportError", line):
        what, base = COMPONENTS[component[1]]
        name = next(group for group in given.groups() if group)
        return f"unknown {what} {name!r}; known: {', '.join(known_classes(base))}; or the class_path of your own"
    return line


def config_keys(parser: LightningArgumentParser) -> list[str]:
    """Keys that a configuration of ``parser``, or of its subcommand "fit", may hold."""
    if parser._subcommands_action is not None:
        parser = parser._subcommands_action._name_parser_map["fit"]
    return [action.dest for action in parser._actions]


def known_classes(base: type) -> list[str]:
    """Names of the concrete classes of a kind that come with the library."""
    found, queue = set(), [base]
    while queue:
        kind = queue.pop()
        queue += kind.__subclasses__()
        if kind.__module__.startswith("dppo_lightning.") and not inspect.isabstract(kind):
            found.add(kind.__name__)
    if base is trust_region.TrustRegion:  # nn.Modules cannot be abstract: the bases are those that are not exported
        found &= set(trust_region.__all__) - {"TrustRegion", "DivergenceMask"}
    return sorted(found)


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
            if arguments[:1] == ["prepare"]:
                chosen = prepare_parser().parse_args(arguments[1:])
                prepare(chosen.name, chosen.out)
            elif arguments[:1] == ["export"]:
                chosen = export_parser().parse_args(arguments[1:])
                export(chosen.run, chosen.out, chosen.checkpoint, chosen.adapter, chosen.dtype)
            elif arguments[:1] == ["slurm"]:
                slurm(arguments[1:])
            elif arguments[:1] == ["doctor"]:
                examine(arguments[1:])
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
