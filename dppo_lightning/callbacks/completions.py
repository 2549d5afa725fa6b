"""CompletionLog: every completion of a run, as JSON lines."""

from __future__ import annotations

import json
from pathlib import Path

import lightning.pytorch as pl

from dppo_lightning.callbacks.base import RunCallback
from dppo_lightning.module import DPPOModule
from dppo_lightning.records import Group


class CompletionLog(RunCallback):
    """Appends to ``completions.jsonl`` (training) and ``heldout.jsonl`` in the run directory.

    A line holds: step (optimizer steps taken before it was trained on, or evaluated), prompt_id, prompt, completion,
    answer, reward, parts, advantage (training only), tokens, finish_reason, versions ([first, last] weight version);
    and raw_completion where the completion's text lacks more than the token that ended it. The groups of one rollout
    are spread over its steps.
    """

    def on_rollout(self, trainer: pl.Trainer, pl_module: pl.LightningModule, groups: list[Group]) -> None:
        _append(trainer, "completions.jsonl", [(group.step, group) for group in groups])

    def on_heldout(self, trainer: pl.Trainer, pl_module: pl.LightningModule, groups: list[Group]) -> None:
        assert isinstance(pl_module, DPPOModule)
        _append(trainer, "heldout.jsonl", [(pl_module.steps_taken, group) for group in groups])


def _append(trainer: pl.Trainer, name: str, groups: list[tuple[int | None, Group]]) -> None:
    if not trainer.is_global_zero:
        return
    path = Path(trainer.default_root_dir) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"step": step} | record) + "\n" for step, group in groups for record in group.records())
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(lines))
