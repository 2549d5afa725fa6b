"""What is wrong with a configuration, in one line: the parser of every command."""

from __future__ import annotations

import inspect
import re
from difflib import get_close_matches
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from dppo_lightning import trust_region
from dppo_lightning.advantage import AdvantageEstimator
from dppo_lightning.errors import ConfigError
from dppo_lightning.prompts import PromptSampler, PromptSource
from dppo_lightning.rewards import RewardFunction
from dppo_lightning.rollout.engine import RolloutEngine

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
