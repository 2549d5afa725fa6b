"""What the wall around rewards costs: completions decoded and scored in worker processes, and in this one.

python benchmarks/rewards.py
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from _common import arguments, in_turn, machine, median, print_result, print_table, ratio

from dppo_lightning.base.pretrained import load_tokenizer
from dppo_lightning.base.records import Completion, Group, Prompt
from dppo_lightning.base.special_tokens import Decoder
from dppo_lightning.base.timeline import Timeline
from dppo_lightning.reward import ExactMatch
from dppo_lightning.reward.rewarding import Rewarding
from dppo_lightning.reward.worker import RewardWorker


def make_groups(completions: int, samples: int, tokens: int) -> list[Group]:
    """Groups of random completions."""
    rng = np.random.default_rng(0)
    groups = []
    for index in range(completions // samples):
        rows = rng.integers(1, 90, (samples, tokens))
        zeros, versions = np.zeros(tokens, np.float32), np.zeros(tokens, np.int64)
        answers = [Completion(str(sample), row, zeros, "length", versions) for sample, row in enumerate(rows)]
        groups.append(Group(Prompt(f"train/{index}", (1,), "?", "7"), answers, []))
    return groups


def score_all(worker: RewardWorker, groups: list[Group]) -> None:
    """Score every group, as the stream does with groups that finish at the same time."""
    for future in [worker.submit(group) for group in groups]:
        future.result()


def make_worker(tokenizer: Any, isolation: Any, workers: int | None) -> RewardWorker:
    return RewardWorker(ExactMatch(), Decoder(tokenizer), Rewarding(isolation, workers), Timeline())


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", default="models/tiny", help="whose tokenizer decodes the completions")
    parser.add_argument("--completions", type=int, default=1024, help="scored in one round, 64 a call")
    parser.add_argument("--samples", type=int, default=8, help="completions of a group")
    parser.add_argument("--tokens", type=int, default=256, help="of a completion")
    parser.add_argument("--workers", type=int, help="worker processes; default: as in a run")
    args = parser.parse_args()
    print(machine())
    tokenizer = load_tokenizer(args.model)
    groups = make_groups(args.completions, args.samples, args.tokens)
    inside, isolated = (make_worker(tokenizer, kind, args.workers) for kind in ("none", "process"))
    started = time.perf_counter()
    score_all(isolated, groups[:1])
    start_seconds = time.perf_counter() - started
    candidates = {
        "in this process": lambda: score_all(inside, groups),
        "in worker processes": lambda: score_all(isolated, groups),
    }
    seconds = in_turn(candidates, args.rounds, args.clock)
    for worker in (inside, isolated):
        worker.close()
    rows = [[name, f"{median(seconds, name) * 1e3:.0f}"] for name in candidates]
    print_table([f"{args.completions:,} completions of {args.tokens} tokens", "ms"], rows)
    print(f"the first worker was there after {start_seconds:.2f} s")
    print_result(
        {
            "isolated_over_in_process": ratio(seconds, "in worker processes", "in this process"),
            "completions_per_s": args.completions / median(seconds, "in worker processes"),
            "start_seconds": start_seconds,
        }
    )


if __name__ == "__main__":
    main()
