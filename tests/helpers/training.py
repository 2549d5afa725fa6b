"""DPPOModule trained on recorded sequences, in one process or in the processes of a pool."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor

from dppo_lightning.base.batch import TrainingBatch, pack
from dppo_lightning.base.errors import ConfigError
from dppo_lightning.base.records import Sequence
from dppo_lightning.base.timeline import Timeline
from dppo_lightning.generate.engine import Sampling
from dppo_lightning.scaling.ranks import Controller
from dppo_lightning.scaling.sharding import FSDP2Strategy
from dppo_lightning.scaling.zero import ZeroStrategy
from dppo_lightning.train.assembly import StepPlan, plan_step
from dppo_lightning.train.module import DPPOModule
from dppo_lightning.train.objective import ReferenceKL
from dppo_lightning.train.policy import Policy
from dppo_lightning.trust_region import BinaryTV, TrustRegion
from tests.helpers.runs import QUIET, Memory

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")

LENGTHS = ([2, 40, 3, 5, 2, 7, 4, 1], [30, 2, 1], [9], [4, 4, 5, 3, 2, 1, 1], [25, 24, 2, 2], [6, 5, 4, 3, 2, 1])
"""Completion lengths of six steps. Over two ranks some micro-batches are empty, and in the third a rank's all are."""


def record(policy_dir: str) -> list[list[Sequence]]:
    """Six steps of sequences whose log mu is near the policy's log pi, so that the region stops some tokens."""
    numbers = np.random.default_rng(0)
    policy = Policy(policy_dir)
    steps = []
    for lengths in LENGTHS:
        sequences = []
        for length in lengths:
            prompt = int(numbers.integers(1, 12))
            ids = numbers.integers(0, 96, prompt + length)
            places = np.arange(prompt, prompt + length)
            blank = np.zeros(length, np.float32)
            sequence = Sequence(ids, places, blank, np.zeros(length, np.int64), float(numbers.normal()))
            logp = policy.logp(pack([sequence], np.ones(1), policy.layout)).numpy()
            sequence.rollout_logp = np.minimum(logp + numbers.normal(0, 0.3, length), 0).astype(np.float32)
            sequence.reference_logp = logp
            sequences.append(sequence)
        steps.append(sequences)
    return steps


class NothingDirected:
    """In the place of Ranks: each rank does what it is given, and nobody compares."""

    world_size = 1

    def together(self) -> AbstractContextManager[None]:
        return nullcontext()

    def agree(self, value: Any, what: str) -> None:
        pass

    def all_gather(self, value: Any) -> list[Any]:
        if not torch.distributed.is_initialized():
            return [value]
        values: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(values, value)
        return values


class Recorded(pl.LightningDataModule):
    """Hands a rank its micro-batches of recorded steps, as the rollout data module would."""

    sampling = Sampling()
    controller = Controller(NothingDirected())  # type: ignore[arg-type]
    steps_per_rollout = 1
    seed = 0
    longest = None

    def __init__(self, steps: list[list[Sequence]]) -> None:
        super().__init__()
        self.steps = steps
        self.plan: StepPlan | None = None
        self.timeline = Timeline()

    def pump(self) -> None:
        pass

    def train_dataloader(self) -> Any:
        return Loader(self)

    def transfer_batch_to_device(self, batch: TrainingBatch, device: torch.device, dataloader_idx: int) -> Any:
        return batch.to(device)


class Loader:
    def __init__(self, data: Recorded) -> None:
        self.data = data

    def __len__(self) -> int:
        trainer: Any = self.data.trainer
        return trainer.max_steps * trainer.accumulate_grad_batches

    def __iter__(self) -> Iterator[TrainingBatch]:
        trainer: Any = self.data.trainer
        module, mine = trainer.lightning_module, trainer.accumulate_grad_batches
        while trainer.global_step < trainer.max_steps:
            step = trainer.global_step
            plans = plan_step(
                [], self.data.steps[step], step, True, module.weights, module.layout, trainer.world_size, mine
            )
            self.data.plan = plans[trainer.global_rank]
            yield from self.data.plan.batches


class EngineLess(DPPOModule):
    """Without an engine to synchronise with."""

    def ensure_synced(self) -> dict[str, float]:
        return {}


def strategy_of(name: str) -> Strategy | str:
    if name.startswith("zero"):
        return ZeroStrategy(stage=int(name[-1]), param_persistence_threshold=0)  # type: ignore[arg-type]
    return {"one": "auto", "ddp": DDPStrategy(), "fsdp2": FSDP2Strategy()}[name]


def optimizer_of(name: str) -> Any:
    if name == "sgd":
        return lambda parameters: torch.optim.SGD(parameters, lr=1e-5)
    return lambda parameters: torch.optim.AdamW(parameters, lr=5e-4, weight_decay=0.01)


def train(
    policy_dir: str,
    steps: list[list[Sequence]],
    strategy: str,
    optimizer: str = "sgd",
    accumulate: int = 1,
    max_steps: int = 6,
    resume: Path | None = None,
    save: Path | None = None,
    beta: float = 0.0,
    clip: float | None = None,
    precision: str = "32-true",
    gradient_checkpointing: bool = False,
    probe: Any = None,
    region: TrustRegion | None = None,
    module_settings: Mapping[str, Any] = {},
    **trainer_settings: Any,
) -> Trained:
    """Train, and return what came of it on this rank."""
    world = 1 if strategy == "one" else torch.distributed.get_world_size()
    module = EngineLess(
        policy_dir,
        region or BinaryTV(0.002),
        optimizer=optimizer_of(optimizer),
        kl=ReferenceKL(beta),
        gradient_checkpointing=gradient_checkpointing,
        **module_settings,
    )
    metrics = Memory()
    trainer = pl.Trainer(
        **QUIET
        | {
            "devices": world,
            "strategy": strategy_of(strategy) if strategy != "one" else "auto",
            "logger": metrics,
            "max_steps": max_steps,
            "accumulate_grad_batches": accumulate,
            "gradient_clip_val": clip,
            "precision": precision,
            "use_distributed_sampler": False,
        }
        | trainer_settings
    )
    finder = Finder(save, probe)
    trainer.callbacks.append(finder)  # type: ignore[attr-defined]
    trainer.fit(module, datamodule=Recorded(steps), ckpt_path=resume, weights_only=False)
    return Trained(finder.first or {}, finder.weights, metrics.rows, finder.found)


@dataclass
class Trained:
    """On rank 0 the weights after the first and the last step; what was logged; what ``probe(module)`` returned."""

    first: dict[str, Tensor]
    last: dict[str, Tensor]
    rows: list[dict[str, float]]
    found: Any

    def of(self, name: str) -> Tensor:
        """The logged values of one metric."""
        return torch.tensor([row[name] for row in self.rows if name in row])


class Finder(pl.Callback):
    """At the end of training: the weights, a checkpoint, and what else is asked for."""

    def __init__(self, save: Path | None, probe: Any) -> None:
        self.save = save
        self.probe = probe
        self.first: dict[str, Tensor] | None = None  # empty on the ranks that are given no weights
        self.weights: dict[str, Tensor] = {}
        self.found: Any = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 1 and self.first is None:
            self.first = copies(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.save is not None:
            trainer.save_checkpoint(self.save)
        if self.probe is not None:
            self.found = self.probe(pl_module)
        self.weights = copies(pl_module)


def copies(module: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.policy.named_weights()}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def refused_training(*arguments: Any, **keywords: Any) -> str:
    """What the ConfigError says that ``train`` ends in."""
    try:
        train(*arguments, **keywords)
    except ConfigError as error:
        return str(error)
    return "not refused"
