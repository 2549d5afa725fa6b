"""The optimizer step's training part against TRL, and against itself without shared prompts, in one run.

    dppo prepare smollm2 --out models/smollm2
    python benchmarks/step.py --model models/smollm2

Forward, loss and backward on the same made-up sequences, full fine-tune, fp32; no generation and no optimizer. Needs
the extra "bench". TRL is given what its trainer makes of the same groups: prompts padded on the left, completions on
the right to the longest of the batch, and micro-batches of equal numbers of sequences.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import numpy as np
import torch
from _common import arguments, in_turn, machine, median, print_result, print_table, ratio
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from dppo_lightning.batch import Completion, Prompt, Sequence, pack, split_by_tokens
from dppo_lightning.objective import Objective, ReferenceKL
from dppo_lightning.packing import Layout
from dppo_lightning.policy import Policy
from dppo_lightning.trust_region import BinaryTV


def make_sequences(
    prompts: int, samples: int, prompt_length: int, lengths: tuple[int, int], words: int
) -> list[Sequence]:
    """Groups of random ids, completion lengths uniform in ``lengths``."""
    rng = np.random.default_rng(0)
    sequences = []
    for index in range(prompts):
        prompt = Prompt(str(index), tuple(rng.integers(5, words, prompt_length).tolist()), "")
        for _ in range(samples):
            length = int(rng.integers(lengths[0], lengths[1] + 1))
            completion = Completion(
                request_id="",
                token_ids=rng.integers(5, words, length),
                logp=np.full(length, -10.0, np.float32),
                finish_reason="stop",
                versions=np.zeros(length, np.int64),
            )
            sequences.append(Sequence.from_completion(prompt, completion, float(rng.normal())))
    return sequences


class Ours:
    """Our training part on sequences split into micro-batches."""

    def __init__(self, policy: Policy, sequences: list[Sequence], parts: int, layout: Layout) -> None:
        self.policy, self.objective = policy, Objective(BinaryTV(), ReferenceKL())
        split = split_by_tokens(sequences, parts, layout)
        self.batches = [pack(part, np.full(len(part), 1 / len(sequences)), layout) for part in split]

    def __call__(self) -> None:
        self.policy.zero_grad()
        for batch in self.batches:
            self.policy.head(self.policy.hidden_states(batch), batch, self.objective).loss.backward()


class TRL:
    """TRL's loss on the same sequences."""

    def __init__(self, folder: str, sequences: list[Sequence], parts: int) -> None:
        config = GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            beta=0.0,
            per_device_train_batch_size=len(sequences) // parts,
            num_generations=len(sequences) // parts,
            gradient_checkpointing=False,
            report_to=[],
        )
        self.trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=config,
            train_dataset=Dataset.from_dict({"prompt": ["a"]}),
            processing_class=AutoTokenizer.from_pretrained(folder),
        )
        self.trainer.current_gradient_accumulation_steps = parts
        self.model = self.trainer.model.train()
        size = len(sequences) // parts
        whole = _padded(sequences)
        self.batches = [
            {name: value[start : start + size] for name, value in whole.items()}
            for start in range(0, len(sequences), size)
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
    return tensors | {"advantages": torch.tensor([sequence.advantage for sequence in sequences])}


def main() -> None:
    parser = arguments(__doc__ or "", rounds=3)
    parser.add_argument("--model", default="models/smollm2")
    parser.add_argument("--only", choices=["trl", "shared"], help="one of the two comparisons")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(machine())
    policy = Policy(args.model)
    words = policy.head.weight.shape[0]
    candidates: dict[str, Callable[[], object]] = {}
    pairs: dict[str, tuple[str, str]] = {}
    tokens: dict[str, int] = {}

    if args.only != "trl":
        for prompt, samples, length in [(256, 8, 64), (60, 8, 26), (64, 8, 256)]:
            name = f"{prompt} + {samples} x {length}"
            group = make_sequences(1, samples, prompt, (length, length), words)
            candidates[f"{name}, packed"] = Ours(policy, group, 1, "packed")
            candidates[f"{name}, rows"] = Ours(policy, group, 1, "rows")
            pairs[name] = (f"{name}, rows", f"{name}, packed")
            tokens |= dict.fromkeys(pairs[name], samples * length)
    if args.only != "shared":
        mixed = make_sequences(4, 4, 60, (16, 512), words)
        candidates["16..512, ours"] = Ours(policy, mixed, 4, policy.layout)
        candidates["16..512, TRL"] = TRL(args.model, mixed, 4)
        pairs["trl"] = ("16..512, TRL", "16..512, ours")
        tokens |= dict.fromkeys(pairs["trl"], sum(sequence.tokens for sequence in mixed))

    seconds = in_turn(candidates, args.rounds, args.clock)
    rows = [[n, f"{median(seconds, n):.2f}", f"{tokens[n] / median(seconds, n):.0f}"] for n in candidates]
    print_table(["prompt + samples x completion", "seconds", "generated tokens/s"], rows)
    faster = {name: ratio(seconds, slow, quick) for name, (slow, quick) in pairs.items()}
    result: dict[str, object] = {}
    if "trl" in faster:
        result["train_tokens_per_s_vs_trl"] = faster.pop("trl")
    if faster:
        result |= {"shared_prompt_speedup": faster["256 + 8 x 64"], "shared_prompt_speedups": faster}
    print_result(result)


if __name__ == "__main__":
    main()
