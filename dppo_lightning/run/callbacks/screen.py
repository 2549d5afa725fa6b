"""The terminal during a run: the table at the start, the progress bar, and the summary at the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dppo_lightning.base.records import Group
from dppo_lightning.base.special_tokens import Decoder
from dppo_lightning.sync.named_weights import elements
from dppo_lightning.train.datamodule import RolloutDataModule
from dppo_lightning.train.hooks import RunCallback
from dppo_lightning.train.metrics import heldout_metrics
from dppo_lightning.train.module import DPPOModule


class StartTable(pl.Callback):
    """Print the run's settings and sizes when training starts, and write them to ``start.txt``."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, DPPOModule)
        table = Table(show_header=False, title="dppo fit")
        for row in start_rows(trainer, pl_module):
            table.add_row(*map(Text, row))  # prompts may look like rich's markup
        Console().print(table)
        path = Path(trainer.default_root_dir) / "start.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            Console(file=file, width=120).print(table)


class RunProgressBar(TQDMProgressBar, RunCallback):
    """Lightning's progress bar over the whole run; while a rollout is generated it shows how far generation is."""

    @property
    def total_train_batches(self) -> int:
        return int(self.trainer.num_training_batches)

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {name: f"{value:.3g}" if isinstance(value, float) else value for name, value in metrics.items()}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self.train_progress_bar.set_description("training")

    def init_validation_tqdm(self) -> Tqdm:
        bar = super().init_validation_tqdm()
        bar.disable = True  # an evaluation is one batch, generated as a whole: there is nothing to count
        return bar

    def on_generation_progress(self, trainer: pl.Trainer, done: int, total: int) -> None:
        # The public ``train_progress_bar`` raises a TypeError while there is no bar: only the private attribute tells,
        # and without it a report that comes too early would end the run.
        bar = self._train_progress_bar
        if self.is_disabled or not trainer.training or bar is None:
            return
        bar.set_description("training" if done == total else f"generating {done}/{total}")


class Summary(RunCallback):
    """Print held-out reward and accuracy before and after training, the time taken, and the run directory.

    The numbers are of the whole run, also of one that went on from a checkpoint.
    """

    def __init__(self) -> None:
        self.evaluations: list[dict[str, float]] = []  # the first and the last
        self.started = time.perf_counter()
        self.earlier = 0.0  # seconds of the sessions before

    def state_dict(self) -> dict[str, Any]:
        """Evaluations before and after, and seconds of training so far."""
        return {"evaluations": self.evaluations, "seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.evaluations, self.earlier = state_dict["evaluations"], state_dict["seconds"]
        self.started = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started = time.perf_counter()

    def on_heldout(self, trainer: pl.Trainer, pl_module: pl.LightningModule, groups: list[Group]) -> None:
        metrics = heldout_metrics(groups, trainer.datamodule.solved_at)  # type: ignore[attr-defined]
        self.evaluations = [*self.evaluations[:1], metrics]

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            print("\n".join(self.lines(trainer)), flush=True)

    def lines(self, trainer: pl.Trainer) -> list[str]:
        """Three lines: held-out results, time, run directory."""
        return [
            self._heldout(),
            f"time: {self._seconds():.0f} s for {trainer.global_step} steps",
            f"run: {Path(trainer.default_root_dir)} (curves.png, metrics.csv, completions.jsonl, checkpoints/)",
        ]

    def _seconds(self) -> float:
        return self.earlier + time.perf_counter() - self.started

    def _heldout(self) -> str:
        if not self.evaluations:
            return "held out: no held-out prompts"
        before, after = self.evaluations[0], self.evaluations[-1]
        reward = f"reward {before['heldout/reward']:.3f} -> {after['heldout/reward']:.3f}"
        accuracy = f"accuracy {before['heldout/avg_at_k']:.3f} -> {after['heldout/avg_at_k']:.3f}"
        change = after["heldout/reward"] - before["heldout/reward"]
        return f"held out: {reward} ({change:+.3f}), {accuracy}"


def start_rows(trainer: pl.Trainer, module: DPPOModule) -> list[tuple[str, str]]:
    """Rows (what, value) of the table at the start."""
    data = module.data
    assert module.policy is not None
    sizes = [(elements(parameter), parameter.requires_grad) for parameter in module.policy.parameters()]
    parameters, trained = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
    counts = f"{_count(parameters)} parameters" + (f", {_count(trained)} trained" if trained < parameters else "")
    region = ", ".join(f"{k}={v}" for k, v in module.region.describe().items() if k not in ("region", "anchor"))
    per_step = data.prompts_per_step * data.samples_per_prompt
    passes = trainer.max_steps * data.prompts_per_step / len(data.train_prompts)
    reference = f"{module.kl.kind} in the {module.kl.where}, beta {module.kl.coefficient:g}"
    left_out = f", {data.left_out} left out (their answers cannot be read)" if data.left_out else ""
    engine = data.engine.health().description
    return [
        ("model", f"{module.policy_name} ({counts}, {trainer.precision})"),
        ("layout", module.layout + (f" ({module.policy.why_rows})" if module.policy.why_rows else "")),
        ("trust region", f"{type(module.region).__name__}({region})"),
        ("anchor", f"{module.region.describe()['anchor']} policy"),
        ("KL to reference", reference if module.kl.coefficient > 0 else "none"),
        ("advantage, aggregation", f"{type(data.advantage).__name__}, {module.aggregation}"),
        ("engine", f"{engine}, {data.rollout_dtype}"),
        ("prompts", f"{len(data.train_prompts)} for training, {len(data.heldout_prompts)} held out{left_out}"),
        ("  first prompt, ids", _ids(data.train_prompts[0].token_ids)),
        ("  first prompt, text", _text(_decoded(data, data.train_prompts[0].token_ids))),
        ("  a completion ends with", "; ".join(f"{token}, from {origin}" for token, origin in _stops(data))),
        ("prompts_per_step", str(data.prompts_per_step)),
        ("samples_per_prompt", str(data.samples_per_prompt)),
        ("steps_per_rollout", str(data.steps_per_rollout)),
        ("max_staleness", _staleness(data)),
        ("  completions per step", f"{per_step} in {trainer.accumulate_grad_batches} micro-batch(es)"),
        ("  completions per rollout", str(per_step * data.steps_per_rollout)),
        ("  steps", f"{trainer.max_steps} ({passes:.2g} passes over the training prompts)"),
        ("run directory", str(trainer.default_root_dir)),
    ]


def _ids(ids: Sequence[int], ends: int = 6) -> str:
    shown = [str(token) for token in ids]
    if len(shown) > 2 * ends:
        shown[ends:-ends] = ["..."]
    return f"{' '.join(shown)} ({len(ids)} in all)"


def _text(text: str, ends: int = 60) -> str:
    return repr(text if len(text) <= 2 * ends else f"{text[:ends]} ... {text[-ends:]}")


def _stops(data: RolloutDataModule) -> list[tuple[str, str]]:
    """List each token that ends a completion: (its id and text, the setting or file that names it)."""
    return [(f"{token} {_decoded(data, [token])!r}", origin) for token, origin in data.stops.items()]


def _decoded(data: RolloutDataModule, ids: Sequence[int]) -> str:
    return Decoder(data.tokenizer).raw_texts([ids])[0]


def _staleness(data: RolloutDataModule) -> str:
    streaming = data.streaming
    oldest = streaming.max_staleness + data.steps_per_rollout - 1
    ahead = f"late groups: {streaming.late}, interrupted completions: {streaming.partial}"
    how = ahead if streaming.max_staleness else "generation and training take turns"
    return f"{streaming.max_staleness} ({how}); oldest token trained on: {oldest} step(s)"


def _count(number: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)
