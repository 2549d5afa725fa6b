"""CompletionLog: every completion of a run, as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np

from dppo_lightning.batch import Group
from dppo_lightning.callbacks.base import RunCallback


class CompletionLog(RunCallback):
    """Appends to ``completions.jsonl`` (training) and ``heldout.jsonl`` in the run directory.

    A line holds: step (optimizer steps taken before it was trained on, or evaluated), prompt_id, prompt, completion,
    answer, reward, parts, advantage (training only), tokens, finish_reason, versions ([first, last] weight version).
    """

    def on_rollout(self, trainer: pl.Trainer, pl_module: pl.LightningModule, groups: list[Group]) -> None:
        _append(trainer, "completions.jsonl", groups)

    def on_heldout(self, trainer: pl.Trainer, pl_module: pl.LightningModule, groups: list[Group]) -> None:
        _append(trainer, "heldout.jsonl", groups)


def completion_records(groups: list[Group]) -> Iterator[dict[str, Any]]:
    """One JSON-ready record for each completion."""
    for group in groups:
        for index, (completion, text) in enumerate(zip(group.completions, group.texts, strict=True)):
            record: dict[str, Any] = {
                "prompt_id": group.prompt.id,
                "prompt": group.prompt.text,
                "completion": text,
                "answer": group.prompt.answer,
            }
            if group.rewards is not None:
                record["reward"] = float(group.rewards[index])
                record["parts"] = {name: _number(values[index]) for name, values in group.reward_parts.items()}
            if group.advantages is not None:
                record["advantage"] = float(group.advantages[index])
            versions = [int(completion.versions[0]), int(completion.versions[-1])] if len(completion) else []
            yield record | {
                "tokens": len(completion),
                "finish_reason": completion.finish_reason,
                "versions": versions,
            }


def _number(value: float) -> float | None:
    """JSON has no NaN: a part that the reward did not report for this completion is null."""
    return None if np.isnan(value) else float(value)


def _append(trainer: pl.Trainer, name: str, groups: list[Group]) -> None:
    if not trainer.is_global_zero:
        return
    path = Path(trainer.default_root_dir) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"step": trainer.global_step} | record) + "\n" for record in completion_records(groups))
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(lines))
