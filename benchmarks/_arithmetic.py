"""The task of the whole-step comparison: sums of one-digit numbers, as in configs/smollm2_arithmetic.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dppo_lightning.base.pretrained import load_tokenizer
from dppo_lightning.base.records import Prompt
from dppo_lightning.prompts import ReasoningGymPrompts, Shuffled, encode
from dppo_lightning.reward import ReasoningGymReward

SEED = 0
QUESTIONS = 200


@dataclass(frozen=True)
class Arithmetic:
    """How much of it.

    Attributes:
        model: Folder of the model.
        prompts: Prompts of a step.
        samples: Completions of each.
        tokens: Longest completion.
        parts: Micro-batches of a step.
        steps: Optimizer steps, one on each rollout.
    """

    model: str
    prompts: int = 8
    samples: int = 8
    tokens: int = 32
    parts: int = 4
    steps: int = 6

    def source(self) -> dict[str, Any]:
        """Arguments of ReasoningGymPrompts; a chat where the model has a template for one."""
        chat = load_tokenizer(self.model).chat_template is not None
        parameters = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}
        return {"task": "chain_sum", "parameters": parameters, "chat": chat, "train": QUESTIONS, "heldout": 0}

    def drawn(self) -> list[Prompt]:
        """The prompts of all steps, in the order in which ``dppo fit`` draws them."""
        examples = ReasoningGymPrompts(**self.source()).load().train
        prompts, _ = encode(examples, load_tokenizer(self.model), "train", None)
        sampler = Shuffled()
        sampler.start(prompts, SEED)
        return sampler.draw(self.prompts * self.steps)

    def reward(self) -> ReasoningGymReward:
        return ReasoningGymReward(score="lenient")

    def config(self, run_dir: str) -> dict[str, Any]:
        """Of ``dppo fit``."""
        return {
            "seed_everything": SEED,
            "run_dir": run_dir,
            "checkpoint": {"save_top_k": 0, "save_last": False},
            "trainer": {
                "max_steps": self.steps,
                "accumulate_grad_batches": self.parts,
                "gradient_clip_val": 1.0,
                "enable_progress_bar": False,
                "logger": {"class_path": "_gate.GateLogger"},
            },
            "model": {
                "policy": self.model,
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-6, "weight_decay": 0.0}},
            },
            "data": {
                "prompts": {
                    "class_path": "dppo_lightning.prompts.ReasoningGymPrompts",
                    "init_args": self.source(),
                },
                "reward": {
                    "class_path": "dppo_lightning.reward.ReasoningGymReward",
                    "init_args": {"score": "lenient"},
                },
                "prompts_per_step": self.prompts,
                "samples_per_prompt": self.samples,
                "max_new_tokens": self.tokens,
            },
        }
