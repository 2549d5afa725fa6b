"""``dppo generate``: prompts in, JSON lines of completions with scores out."""

from __future__ import annotations

import json
import os
from pathlib import Path

import lightning.pytorch as pl

from dppo_lightning.errors import ConfigError
from dppo_lightning.module import DPPOModule
from dppo_lightning.prompts import JsonlPrompts
from dppo_lightning.rollout.datamodule import RolloutDataModule


class GeneratingTrainer(pl.Trainer):
    """Lightning's trainer with one more verb."""

    def generate(
        self,
        model: DPPOModule,
        datamodule: RolloutDataModule,
        output: str,
        prompts: str | None = None,
        samples: int = 1,
        ckpt_path: str | None = None,
    ) -> None:
        """Write completions of prompts, with their scores, as JSON lines.

        Args:
            model: The module whose policy generates.
            datamodule: Gives engine, sampling and reward.
            output: File to write; it appears only when it is complete.
            prompts: JSONL file with ``prompt`` or ``messages``; None: the recipe's held-out prompts.
            samples: Completions of each prompt, >= 1.
            ckpt_path: Checkpoint whose weights to use; None: the model folder as it is.

        Raises:
            ConfigError: The output exists already, or ``samples`` is below 1.
            DataError: The prompt file cannot be used.
        """
        target = Path(output)
        if target.exists():
            raise ConfigError(f"{output!r} exists already: choose another --output")
        if samples < 1:
            raise ConfigError(f"samples must be >= 1, got {samples}")
        datamodule.heldout_samples = samples
        if prompts is not None:
            datamodule.prompts = JsonlPrompts(train=prompts)
            datamodule.predict_split = "train"
        batches = self.predict(model, datamodule=datamodule, ckpt_path=ckpt_path) or []
        if not self.is_global_zero:
            return
        records = [record for batch in batches for record in batch]
        if not records:
            raise ConfigError(
                "there are no held-out prompts to complete: set --prompts, or hold some out in data.prompts"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(target.name + ".unfinished")
        unfinished.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        os.replace(unfinished, target)
        print(f"{len(records)} completions in {output}", flush=True)
