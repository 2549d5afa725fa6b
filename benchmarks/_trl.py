"""TRL's GRPOTrainer on the same work, its training part alone and whole steps. Imports TRL, so import it late.

As a script it is the child that takes whole steps: ``python benchmarks/_trl.py '{"model": ..., ...}'``.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from _arithmetic import Arithmetic
from _gate import Gate
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainerControl
from trl import GRPOConfig, GRPOTrainer

from dppo_lightning.base.records import Sequence
from dppo_lightning.reward import Sample


def make_trainer(
    folder: str, batch: int, parts: int, rows: Dataset, reward: Callable[..., list[float]], **settings: Any
) -> GRPOTrainer:
    """A full fine-tune in fp32 without KL, ``batch`` completions a step in ``parts`` micro-batches."""
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        beta=0.0,
        per_device_train_batch_size=batch // parts,
        gradient_accumulation_steps=parts,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **settings,
    )
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=reward,
        args=config,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(folder),
    )


class TrainPart:
    """Loss and gradients of given sequences, as its trainer would lay them out.

    Prompts are padded on the left, completions on the right to the longest of the batch, and micro-batches hold equal
    numbers of sequences.
    """

    def __init__(self, folder: str, sequences: list[Sequence], parts: int) -> None:
        rows = Dataset.from_dict({"prompt": ["a"]})
        count = len(sequences)
        self.trainer = make_trainer(
            folder, count, parts, rows, lambda completions, **_: [0.0] * len(completions), num_generations=count
        )
        self.trainer.current_gradient_accumulation_steps = parts
        self.model = self.trainer.model.train()
        size, whole = count // parts, _padded(sequences)
        self.batches = [
            {name: value[start : start + size] for name, value in whole.items()} for start in range(0, count, size)
        ]

    def __call__(self) -> None:
        self.model.zero_grad()
        for batch in self.batches:
            inputs = batch | {"num_items_in_batch": batch["completion_mask"].sum()}
            self.trainer._compute_loss(self.model, inputs).backward()


def _padded(sequences: list[Sequence]) -> dict[str, Tensor]:
    prompts = [sequence.token_ids[: sequence.generated[0]] for sequence in sequences]
    completions = [sequence.token_ids[sequence.generated] for sequence in sequences]
    wide, long = max(map(len, prompts)), max(map(len, completions))
    columns = {
        "prompt_ids": [np.pad(ids, (wide - len(ids), 0)) for ids in prompts],
        "prompt_mask": [np.pad(np.ones(len(ids), np.int64), (wide - len(ids), 0)) for ids in prompts],
        "completion_ids": [np.pad(ids, (0, long - len(ids))) for ids in completions],
        "completion_mask": [np.pad(np.ones(len(ids), np.int64), (0, long - len(ids))) for ids in completions],
        "old_per_token_logps": [np.full(long, -10.0, np.float32)] * len(sequences),
    }
    tensors = {name: torch.from_numpy(np.stack(rows)) for name, rows in columns.items()}
    return tensors | {"advantages": torch.tensor([float(sequence.advantage[0]) for sequence in sequences])}


class Timed:
    """Seconds spent in some of a trainer's methods, and the tokens that came out of generation."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.seconds = {"generate": 0.0, "reward": 0.0}
        self.tokens = 0
        generate, reward = trainer._generate_single_turn, trainer._calculate_rewards

        def timed_generate(*args: Any, **kwargs: Any) -> Any:
            with self._counted("generate"):
                found = generate(*args, **kwargs)
            self.tokens += sum(map(len, found[0]))
            return found

        def timed_reward(*args: Any, **kwargs: Any) -> Any:
            with self._counted("reward"):
                return reward(*args, **kwargs)

        trainer._generate_single_turn, trainer._calculate_rewards = timed_generate, timed_reward

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """What was counted since the last time."""
        taken = {**self.seconds, "tokens": float(self.tokens)}
        self.seconds, self.tokens = dict.fromkeys(self.seconds, 0.0), 0
        return taken


class GateCallback(TrainerCallback):
    """A gate at the end of every optimizer step."""

    def __init__(self, timed: Timed) -> None:
        self.timed, self.gate = timed, Gate()

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        values = self.timed.take()
        now = time.perf_counter() - self.gate.begun
        self.gate.step_over(values | {"train": now - values["generate"] - values["reward"], "sync": 0.0})


def take_steps(work: Arithmetic) -> None:
    """Train as ``work`` says, one step for each line of standard input."""
    prompts, reward = work.drawn(), work.reward()
    tokenizer = AutoTokenizer.from_pretrained(work.model)
    for prompt in prompts:
        assert tuple(tokenizer(prompt.text)["input_ids"]) == prompt.token_ids, "TRL must be given the same ids"

    def score(prompts: list[str], completions: list[str], place: list[int], **_: Any) -> list[float]:
        samples = [
            Sample(prompt=text, completion=completion, answer=drawn[i].answer, columns=drawn[i].columns)
            for text, completion, i in zip(prompts, completions, place, strict=True)
        ]
        return [scored.value for scored in reward(samples)]

    drawn = prompts
    trainer = make_trainer(
        work.model,
        work.prompts * work.samples,
        work.parts,
        Dataset.from_dict({"prompt": [p.text for p in prompts], "place": list(range(len(prompts)))}),
        score,
        num_generations=work.samples,
        max_completion_length=work.tokens,
        temperature=1.0,
        num_iterations=1,
        max_steps=work.steps,
        shuffle_dataset=False,
        learning_rate=1e-6,
        logging_steps=1,
    )
    trainer.add_callback(GateCallback(Timed(trainer)))
    trainer.train()


if __name__ == "__main__":
    take_steps(Arithmetic(**json.loads(sys.argv[1])))
