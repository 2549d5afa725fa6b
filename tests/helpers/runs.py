"""Small training runs in this process: a letter is asked, letters are answered, by the transformers engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor

from dppo_lightning.base.records import Group
from dppo_lightning.generate.transformers_engine import TransformersEngine
from dppo_lightning.prompts.base import Example, PromptSets, PromptSource
from dppo_lightning.sync.weight_sync import WeightSync
from dppo_lightning.train.datamodule import RolloutDataModule
from dppo_lightning.train.hooks import RunCallback
from dppo_lightning.train.module import DPPOModule
from tests.helpers.rewards import IN_PROCESS, ShareOf

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
}


class Letters(PromptSource):
    """Prompts of one to three characters, so that rows differ in length."""

    def __init__(self, train: int = 6, heldout: int = 0) -> None:
        self.train = train
        self.heldout = heldout

    def load(self) -> PromptSets:
        examples = [Example(prompt=chr(97 + i) * (1 + i % 3)) for i in range(self.train + self.heldout)]
        return PromptSets(examples[: self.train], examples[self.train :])


@dataclass
class Record(RunCallback):
    """What happened: groups of each rollout; weights and gradients at each optimizer step."""

    rollouts: list[list[Group]] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)

    def on_rollout(self, trainer: pl.Trainer, pl_module: pl.LightningModule, groups: list[Group]) -> None:
        self.rollouts.append(groups)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        parameters = dict(pl_module.policy.model.named_parameters())
        self.weights.append({name: p.detach().clone() for name, p in parameters.items()})
        self.gradients.append({name: p.grad.clone() for name, p in parameters.items() if p.grad is not None})


class SyncSeen(pl.Callback):
    """Keeps the last weight sync, which is gone with the engine."""

    sync: WeightSync

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.sync = pl_module.weight_push.sync

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.sync = pl_module.weight_push.sync


class Memory(DummyLogger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:  # type: ignore[override]
        self.rows.append(dict(metrics))

    def of(self, name: str) -> list[float]:
        """The values of one metric, in the order of logging."""
        return [row[name] for row in self.rows if name in row]


@dataclass
class Run:
    module: DPPOModule
    data: RolloutDataModule
    record: Record
    metrics: Memory

    @property
    def weights(self) -> dict[str, Tensor]:
        assert self.module.policy is not None
        return dict(self.module.policy.named_weights())


def sgd(lr: float) -> Any:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def build(policy: str, module: Mapping[str, Any] = {}, data: Mapping[str, Any] = {}) -> tuple[Any, Any]:
    """A module and a data module: three prompts a step, four completions of up to six characters each."""
    defaults: dict[str, Any] = {
        "prompts": Letters(),
        "reward": ShareOf(),
        "engine": TransformersEngine(),
        "prompts_per_step": 3,
        "samples_per_prompt": 4,
        "max_new_tokens": 6,
        "rewarding": IN_PROCESS,
    }
    return DPPOModule(policy, **{"optimizer": sgd(0.1), **module}), RolloutDataModule(**defaults | dict(data))


def fit(
    policy: str,
    module: Mapping[str, Any] = {},
    data: Mapping[str, Any] = {},
    callbacks: Sequence[pl.Callback] = (),
    **trainer: Any,
) -> Run:
    """Train; keywords are arguments of DPPOModule, RolloutDataModule and Trainer."""
    model, source = build(policy, module, data)
    record, metrics = Record(), Memory()
    settings = QUIET | {"logger": metrics, "max_steps": 1} | trainer
    pl.Trainer(callbacks=[record, *callbacks], **settings).fit(model, datamodule=source)
    return Run(model, source, record, metrics)
