"""The parser of every command, which reports what is wrong with a configuration in one line."""

from __future__ import annotations

import inspect
import re
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from dppo_lightning import trust_region
from dppo_lightning.advantage import AdvantageEstimator
from dppo_lightning.base.errors import ConfigError
from dppo_lightning.generate.engine import RolloutEngine
from dppo_lightning.prompts import PromptSampler, PromptSource
from dppo_lightning.reward import RewardFunction
from dppo_lightning.run.values import check_readable, refuse_empty

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
"""Configuration key -> what is configured there, in words, and its base class."""


class OneLineParser(LightningArgumentParser):
    """Parser that reports what is wrong with a configuration in one line, as a ConfigError."""

    def parse_path(self, cfg_path: Any, **kwargs: Any) -> Any:
        """Parse a recipe; jsonargparse raises what reading it raises, and runs for ever on one that holds itself."""
        check_readable(Path(cfg_path))
        return super().parse_path(cfg_path, **kwargs)

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse a command line; jsonargparse would give an empty value to a constructor, whatever its type."""
        config = super().parse_args(*args, **kwargs)
        if self._subcommands_action is not None:  # private, as in ``config_keys``
            parser, values = self._subcommands_action._name_parser_map[config.subcommand], config[config.subcommand]
            for action in parser._actions:
                if (kind := getattr(action, "_typehint", None)) is not None and action.dest in values:
                    refuse_empty(action.dest, kind, values[action.dest])
        return config

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # jsonargparse tries alternatives of a type by such parsers
            super().error(message, ex)
        raise ConfigError(explain(message, self))


def underscored(words: list[str]) -> list[str]:
    """Spell options as this command line knows them: --dry_run for --dry-run."""
    return [re.sub(r"^--[\w-]+", lambda option: "--" + option[0][2:].replace("-", "_"), word) for word in words]


def explain(message: str, parser: LightningArgumentParser) -> str:
    """Rewrite a message of jsonargparse as one line, with the known names where a name is unknown."""
    line = " ".join(message.split())
    unknown = re.search(r"does not accept option '([\w.]+)'|[Uu]nrecognized arguments: --([\w.]+)", line)
    if unknown:
        key = unknown[1] or unknown[2]
        near = get_close_matches(key, config_keys(parser), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "`dppo fit --help` lists the known ones"
        return f"unknown config key {key!r}: {hint}"
    component = re.search(rf'[Kk]ey "(?:[\w.]*\.)?({"|".join(COMPONENTS)})"', line)
    if not component:
        return line
    what, base = COMPONENTS[component[1]]
    given = re.search(r"path string: (\S+)|'class_path': '([^']+)'|Given value: '?([\w.]+)", line)
    name = next(group for group in given.groups() if group) if given else ""
    if name and re.search(r"[Ii]mport path|not a subclass|ImportError", line):
        return f"unknown {what} {name!r}; known: {', '.join(known_classes(base))}; or the class_path of your own"
    problem = re.search(r"Problem with given class_path '([^']+)': (.+?)(?: - Expected a <class|$)", line)
    if problem:
        return f"{what} {problem[1]!r}: {problem[2].removeprefix('- ')}"
    unfinished = re.search(r"instantiatable class, but (?:(\S+) )?is abstract", line)
    return _unfinished(what, base, unfinished[1] or name) if unfinished else line


def _unfinished(what: str, base: type, path: str) -> str:
    """Say what a class that cannot be built lacks; its module is loaded already, or it is ``base`` itself."""
    module, _, name = path.rpartition(".")
    kind: Any = getattr(sys.modules.get(module), name, base)
    if not issubclass(kind, base):
        return f"{what} {path!r} does not derive from {base.__name__}"
    return f"{what} {path!r} is unfinished: write {', '.join(sorted(kind.__abstractmethods__))}"


def config_keys(parser: LightningArgumentParser) -> list[str]:
    """List the keys that a configuration of ``parser``, or of its subcommand "fit", may hold."""
    # Private parts of jsonargparse, which has no public list of a parser's options or subcommands: without them a
    # misspelt key is refused all the same, but the key that was meant is not named.
    if parser._subcommands_action is not None:
        parser = parser._subcommands_action._name_parser_map["fit"]
    return [action.dest for action in parser._actions]


def known_classes(base: type) -> list[str]:
    """List the concrete classes under ``base`` that come with the library and are imported, by name."""
    found, queue = set(), [base]
    while queue:
        kind = queue.pop()
        queue += kind.__subclasses__()
        if kind.__module__.startswith("dppo_lightning.") and not inspect.isabstract(kind):
            found.add(kind.__name__)
    if base is trust_region.TrustRegion:  # nn.Modules cannot be abstract: the bases are those that are not exported
        found &= set(trust_region.__all__) - {"TrustRegion", "DivergenceMask"}
    return sorted(found)
