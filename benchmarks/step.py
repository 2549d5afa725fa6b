"""An optimizer step against TRL's GRPOTrainer, and against itself without shared prompts.

    dppo prepare smollm2 --out models/smollm2
    python benchmarks/step.py --model models/smollm2

Full fine-tune, fp32. Three comparisons; TRL (1.16) is of the extra "bench":

step    Whole steps, the same prompts and reward: ``dppo fit`` with its embedded engine and all that it records, against
        GRPOTrainer with generation by transformers (its vLLM mode does not run on the CPU). Two processes that take
        their steps in turn.
trl     Forward, loss and backward on the same made-up sequences of very different lengths. TRL is given what its
        trainer makes of them: prompts padded on the left, completions on the right to the longest of the batch.
shared  A group whose prompt is forwarded once against one row a sample: the whole model, then three layers at several
        shapes, with the choice that packing.py makes for each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
import yaml
from _arithmetic import Arithmetic
from _common import arguments, in_turn, machine, median, need_peers, print_result, print_table, ratio
from _gate import ROOT, Gated, steps_in_turn
from _sequences import make_sequences

from dppo_lightning.base import packing
from dppo_lightning.base.batch import TrainingBatch, pack
from dppo_lightning.base.packing import Layout, split_by_tokens, worth_sharing
from dppo_lightning.base.records import Sequence
from dppo_lightning.train.objective import Objective, ReferenceKL
from dppo_lightning.train.policy import Policy
from dppo_lightning.trust_region import BinaryTV

LONG_PROMPT = (256, 8, 64)
SHAPES = [LONG_PROMPT, (60, 8, 26), (64, 8, 256), (16, 8, 512), (128, 2, 1024), (64, 8, 1024)]
"""(prompt, samples, completion), in tokens but for the samples."""
LAYERS = 3
PARTS = ("generate", "reward", "train", "sync", "total")


class Ours:
    """Our training part on sequences split into micro-batches."""

    def __init__(self, policy: Policy, sequences: list[Sequence], parts: int, layout: Layout) -> None:
        self.policy, self.objective = policy, Objective(BinaryTV(), ReferenceKL())
        split = [[sequences[i] for i in part] for part in split_by_tokens(sequences, parts, layout)]
        self.batches = [pack(part, np.full(len(part), 1 / len(sequences)), layout) for part in split]

    def __call__(self) -> None:
        self.policy.zero_grad()
        for batch in self.batches:
            self.policy.head(self.policy.hidden_states(batch), batch, self.objective).loss.backward()


class Backbone:
    """Forward and backward of the layers alone."""

    def __init__(self, policy: Policy, batch: TrainingBatch) -> None:
        self.policy, self.batch = policy, batch

    def __call__(self) -> None:
        self.policy.zero_grad()
        self.policy.hidden_states(self.batch).sum().backward()


def whole_step(args: argparse.Namespace) -> dict[str, object]:
    """Whole steps in turn; a table of their parts."""
    work = Arithmetic(
        str(Path(args.model).resolve()), args.prompts, args.samples, args.tokens, args.parts, args.rounds + 1
    )
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(work.config(str(Path(folder) / "run"))))
        commands = {
            "ours": ["-m", "dppo_lightning", "fit", "--config", str(recipe)],
            "TRL": [str(ROOT / "benchmarks" / "_trl.py"), json.dumps(vars(work))],
        }
        children = []
        for name, command in commands.items():
            children.append(Gated(name, command, args.threads))
            stack.callback(children[-1].close)
        reports = steps_in_turn(children, args.rounds)
    seconds = {f"{who} {part}": [r[part] for r in reports[who]] for who in reports for part in PARTS}
    tokens = {who: float(np.median([r["tokens"] for r in reports[who]])) for who in reports}
    print(
        f"\n{args.prompts} prompts x {args.samples} completions of at most {args.tokens} tokens, "
        f"median of {args.rounds} steps"
    )
    rows = []
    for who in reports:
        rows.append([who, *(f"{median(seconds, f'{who} {part}'):.2f}" for part in PARTS), f"{tokens[who]:.0f}"])
    print_table(["seconds", *PARTS, "generated tokens"], rows)
    return {"step_vs_trl": ratio(seconds, "ours total", "TRL total")}


def against_trl(args: argparse.Namespace) -> dict[str, object]:
    """The training part on sequences of very different lengths."""
    from _trl import TrainPart

    policy = Policy(args.model)
    shortest, longest = args.lengths
    mixed = make_sequences(args.groups, 4, 60, (shortest, longest), policy.head.weight.shape[0])
    candidates = {
        "ours": Ours(policy, mixed, args.parts, policy.layout),
        "TRL": TrainPart(args.model, mixed, args.parts),
    }
    seconds = in_turn(candidates, args.rounds, args.clock)
    tokens = sum(sequence.tokens for sequence in mixed)
    print(
        f"\ntraining part, {len(mixed)} completions of {shortest} to {longest} tokens, median of {args.rounds} rounds"
    )
    rows = [[n, f"{median(seconds, n):.2f}", f"{tokens / median(seconds, n):.0f}"] for n in candidates]
    print_table(["", "seconds", "generated tokens/s"], rows)
    return {"train_tokens_per_s_vs_trl": ratio(seconds, "TRL", "ours")}


def shared_prompts(args: argparse.Namespace) -> dict[str, object]:
    """A group's prompt once or for every sample: the whole model at one shape, a few layers at all."""
    policy = Policy(args.model)
    words = policy.head.weight.shape[0]
    prompt, samples, length = args.shapes[0]
    group = make_sequences(1, samples, prompt, (length, length), words)
    candidates = {"rows": Ours(policy, group, 1, "rows"), "packed": Ours(policy, group, 1, "packed")}
    seconds = in_turn(candidates, args.rounds, args.clock)
    print(f"\n{prompt} + {samples} x {length}, whole model, median of {args.rounds} rounds")
    rows = [[n, f"{median(seconds, n):.2f}", f"{samples * length / median(seconds, n):.0f}"] for n in candidates]
    print_table(["", "seconds", "generated tokens/s"], rows)
    result = ratio(seconds, "rows", "packed")

    backbone = getattr(policy.model, policy.model.base_model_prefix)
    backbone.layers = backbone.layers[:LAYERS]
    faster, table = {}, []
    for prompt, samples, length in args.shapes:
        name = f"{prompt} + {samples} x {length}"
        group = make_sequences(1, samples, prompt, (length, length), words)
        weights = np.full(samples, 1 / samples)
        runs = {"rows": Backbone(policy, pack(group, weights, "rows"))}
        for way, cheap in (("once", 1e12), ("apart", 1e-12)):
            with as_if_masked(cheap):
                runs[way] = Backbone(policy, pack(group, weights, "packed"))
        seconds = in_turn(runs, args.rounds, args.clock)
        faster[name] = {way: ratio(seconds, "rows", way) for way in ("once", "apart")}
        chosen = "once" if worth_sharing(prompt, [length - 1] * samples) else "apart"
        cells = [f"{median(seconds, 'rows'):.3f}", *(f"{faster[name][way]:.2f}" for way in ("once", "apart"))]
        table.append([name, *cells, chosen])
    print(f"\n{LAYERS} layers without the head; how many times as fast as rows")
    print_table(["prompt + samples x completion", "rows, seconds", "prompt once", "packed apart", "chosen"], table)
    return {
        "shared_prompt_speedup": result,
        "shared_prompt_speedups": {name: float(f"{ways['once']:.3g}") for name, ways in faster.items()},
    }


@contextmanager
def as_if_masked(cheap: float) -> Iterator[None]:
    """Let the rule of packing.py take a mask for so cheap: then it shares every prompt, or none."""
    measured, packing.MASKED = packing.MASKED, cheap
    try:
        yield
    finally:
        packing.MASKED = measured


COMPARISONS = {"step": whole_step, "trl": against_trl, "shared": shared_prompts}


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", default="models/smollm2")
    parser.add_argument("--only", choices=list(COMPARISONS), help="one of the comparisons")
    parser.add_argument("--prompts", type=int, default=8, help="of a whole step")
    parser.add_argument("--samples", type=int, default=8, help="completions of each")
    parser.add_argument("--tokens", type=int, default=32, help="longest completion of a whole step")
    parser.add_argument("--parts", type=int, default=4, help="micro-batches of a step")
    parser.add_argument("--groups", type=int, default=2, help="groups of 4 completions, training part against TRL")
    parser.add_argument("--lengths", type=int, nargs=2, default=[16, 512], help="of their completions")
    parser.add_argument("--small", action="store_true", help="tiny sizes and one round, to see that it works")
    args = parser.parse_args()
    args.shapes = SHAPES
    if args.small:
        args.rounds, args.prompts, args.samples, args.tokens, args.parts = 1, 2, 2, 4, 2
        args.groups, args.lengths, args.shapes = 1, [4, 16], [(16, 2, 4), (8, 2, 40)]
    chosen = [args.only] if args.only else list(COMPARISONS)
    if set(chosen) & {"step", "trl"}:
        need_peers()
    torch.set_num_threads(args.threads)
    print(machine())
    result: dict[str, object] = {}
    for name in chosen:
        result |= COMPARISONS[name](args)
    print_result(result)


if __name__ == "__main__":
    main()
