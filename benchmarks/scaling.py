"""How time and memory of the head grow: with tokens at one vocabulary, with the vocabulary at one number of tokens.

    python benchmarks/scaling.py --plot docs/figures/scaling.png

The exponent is the slope of log time over log tokens: 1 is linear.
"""

from __future__ import annotations

import matplotlib
import numpy as np
import torch
from _common import arguments, in_turn, machine, median, print_result, print_table
from head import Case, in_new_process


def main() -> None:
    parser = arguments(__doc__ or "", rounds=3)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8192, 32768, 65536, 131072, 262144])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--plot", help="PNG to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(machine())
    words, few = args.vocabularies[0], 2048  # enough to fill a chunk at the smallest vocabulary

    cases = {f"{n}": Case(n, words, args.width) for n in args.tokens}
    seconds = in_turn({name: case.ours for name, case in cases.items()}, args.rounds, args.clock)
    times = [median(seconds, f"{n}") for n in args.tokens]
    exponent = float(np.polyfit(np.log(args.tokens), np.log(times), 1)[0])
    memory = {n: in_new_process("ours", n, words, args.width) - gradients(n, words, args.width) for n in args.tokens}
    by_words = {
        v: in_new_process("ours", few, v, args.width) - gradients(few, v, args.width) for v in args.vocabularies
    }

    print(f"vocabulary {words}, width {args.width}; MB without the gradients of hidden states and weight")
    rows = [[str(n), f"{t:.3f}", f"{memory[n]:.0f}"] for n, t in zip(args.tokens, times, strict=True)]
    print_table(["tokens", "seconds", "head MB"], rows)
    print_table(["vocabulary", "head MB"], [[str(v), f"{mb:.0f}"] for v, mb in by_words.items()])
    if args.plot:
        draw(args.plot, args.tokens, times, by_words)
    print_result(
        {
            "time_exponent_tokens": exponent,
            "head_mb_by_vocab": {str(v): round(mb) for v, mb in by_words.items()},
            "head_mb_by_tokens": {str(n): round(mb) for n, mb in memory.items()},
        }
    )


def gradients(tokens: int, words: int, width: int) -> float:
    """MB of the two gradients, which any method must hold."""
    return 4 * width * (tokens + words) / 1e6


def draw(path: str, tokens: list[int], times: list[float], by_words: dict[int, float]) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.loglog(tokens, times, "o-", base=2)
    left.set(xlabel="tokens", ylabel="seconds", title="time of the head")
    right.semilogx(list(by_words), list(by_words.values()), "o-", base=2)
    right.set(xlabel="vocabulary", ylabel="MB", title="memory beside the gradients", ylim=(0, None))
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
