"""How time and memory of an optimizer step grow with its tokens, and with the vocabulary.

    python benchmarks/scaling.py --plot docs/figures/scaling.png

The step is forward, loss, backward and AdamW of a small Llama (4 layers) on packed sequences of 16 + 240 ids, in
micro-batches of 4,096 ids; the head's memory is that of one call on all tokens, without the gradients of hidden states
and weight, which any method must hold. Memory is measured in processes of their own. The exponent is the slope of log
time over log tokens: 1 is linear.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from _common import arguments, in_turn, machine, median, peak_extra_mb, print_result, print_table
from _sequences import make_sequences
from head import in_new_process
from transformers import LlamaConfig, LlamaForCausalLM

from dppo_lightning.base.batch import pack
from dppo_lightning.base.packing import split_by_tokens
from dppo_lightning.train.objective import Objective, ReferenceKL
from dppo_lightning.train.policy import Policy
from dppo_lightning.trust_region import BinaryTV

PROMPT, COMPLETION = 16, 240
MICRO_BATCH = 4096
FIXED = 2048
"""Tokens of the steps of several vocabularies: enough to fill a chunk of the head at the smallest."""


class Step:
    """An optimizer step on so many token ids."""

    def __init__(self, tokens: int, words: int, width: int) -> None:
        config = LlamaConfig(
            vocab_size=words,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=4,
            num_attention_heads=max(width // 64, 1),
            tie_word_embeddings=True,
        )
        with tempfile.TemporaryDirectory() as folder:
            LlamaForCausalLM(config).save_pretrained(folder)
            self.policy = Policy(folder)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-6)
        self.objective = Objective(BinaryTV(), ReferenceKL())
        self.give(tokens)

    def give(self, tokens: int) -> None:
        """Change the work."""
        words = self.policy.head.weight.shape[0]
        completion = min(COMPLETION, tokens - PROMPT)
        count = max(tokens // (PROMPT + completion), 1)
        sequences = make_sequences(count, 1, PROMPT, (completion, completion), words)
        parts = split_by_tokens(sequences, max(tokens // MICRO_BATCH, 1), "packed")
        self.batches = [pack([sequences[i] for i in p], np.full(len(p), 1 / count), "packed") for p in parts]

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        for batch in self.batches:
            self.policy.head(self.policy.hidden_states(batch), batch, self.objective).loss.backward()
        self.optimizer.step()


@dataclass
class Growth:
    """What was measured at several sizes: seconds and MB of the step, MB of the head."""

    sizes: list[int]
    seconds: list[float]
    step_mb: list[float]
    head_mb: list[float]

    def show(self, name: str) -> None:
        columns = zip(self.sizes, self.seconds, self.step_mb, self.head_mb, strict=True)
        rows = [[str(size), f"{s:.3f}", f"{step:.0f}", f"{head:.0f}"] for size, s, step, head in columns]
        print_table([name, "step, seconds", "step MB", "head MB"], rows)


def head_mb(tokens: int, words: int, width: int) -> float:
    """MB of the head's call beside the two gradients."""
    return in_new_process("ours", tokens, words, width) - 4 * width * (tokens + words) / 1e6


def step_mb(tokens: int, words: int, width: int) -> float:
    """Extra MB of a step, in a process of its own."""
    options = [f"--measure={tokens}", f"--vocabularies={words}", f"--width={width}"]
    command = [sys.executable, __file__, *options]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure(tokens: int, words: int, width: int) -> float:
    """In the child: a small step goes first, so that optimizer state and the libraries' buffers do not count."""
    step = Step(PROMPT + 16, words, width)
    step()
    step.optimizer.zero_grad()
    step.give(tokens)
    return peak_extra_mb(step)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8192, 32768, 131072, 262144])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--plot", help="PNG to write")
    parser.add_argument("--measure", type=int, help="print the extra memory of a step of so many ids, and nothing else")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    words = args.vocabularies[0]
    if args.measure:
        print(measure(args.measure, words, args.width))
        return
    print(machine())

    def growth(values: list[int], size: Callable[[int], tuple[int, int]]) -> Growth:
        """Of steps of ``size(value)`` = (tokens, words)."""
        seconds = in_turn({f"{v}": Step(*size(v), args.width) for v in values}, args.rounds, args.clock)
        return Growth(
            values,
            [median(seconds, f"{v}") for v in values],
            [step_mb(*size(v), args.width) for v in values],
            [head_mb(*size(v), args.width) for v in values],
        )

    by_tokens = growth(args.tokens, lambda tokens: (tokens, words))
    by_words = growth(args.vocabularies, lambda vocabulary: (FIXED, vocabulary))
    exponent = float(np.polyfit(np.log(args.tokens), np.log(by_tokens.seconds), 1)[0])
    print(f"width {args.width}, median of {args.rounds} rounds; vocabulary {words}")
    by_tokens.show("tokens")
    print(f"{FIXED} tokens")
    by_words.show("vocabulary")
    if args.plot:
        draw(args.plot, by_tokens, by_words)
    print_result(
        {
            "time_exponent_tokens": exponent,
            "head_mb_by_vocab": {str(v): round(mb) for v, mb in zip(by_words.sizes, by_words.head_mb, strict=True)},
            "head_mb_by_tokens": {str(n): round(mb) for n, mb in zip(by_tokens.sizes, by_tokens.head_mb, strict=True)},
        }
    )


def draw(path: str, by_tokens: Growth, by_words: Growth) -> None:
    """Seconds above, memory below; tokens on the left, vocabulary on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6), layout="constrained", sharex="col")
    for column, (name, growth) in enumerate((("tokens of the step", by_tokens), ("vocabulary", by_words))):
        above, below = axes[:, column]
        above.loglog(growth.sizes, growth.seconds, "o-", base=2, label="step")
        linear = [growth.seconds[-1] * size / growth.sizes[-1] for size in growth.sizes]
        above.loglog(growth.sizes, linear, "--", base=2, color="grey", label="linear")
        above.set_ylabel("seconds")
        below.semilogx(growth.sizes, growth.step_mb, "o-", base=2, label="step, with its gradients")
        below.semilogx(growth.sizes, growth.head_mb, "s-", base=2, label="head, without gradients")
        below.set(xlabel=name, ylabel="MB", ylim=(0, None))
        below.set_xticks(growth.sizes, [f"{size // 1024}k" if size >= 1024 else str(size) for size in growth.sizes])
        below.minorticks_off()
        above.set_title(f"against {name}")
        for axis in (above, below):
            axis.grid(alpha=0.3)
            axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
