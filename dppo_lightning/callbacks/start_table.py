"""StartTable: what is about to be trained, and how, on one screen; and the same as a file in the run directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dppo_lightning.module import DPPOModule
from dppo_lightning.rollout.datamodule import RolloutDataModule
from dppo_lightning.scaling.weights import elements
from dppo_lightning.special_tokens import Decoder


class StartTable(pl.Callback):
    """Prints the table when training starts and writes it to ``start.txt``."""

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


def start_rows(trainer: pl.Trainer, module: DPPOModule) -> list[tuple[str, str]]:
    """(what, value) rows of the table."""
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
    """(id and text of a token that ends a completion, who names it)."""
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
