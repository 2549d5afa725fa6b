"""What the stream costs the main thread for each completion, by the number of groups in the making.

python benchmarks/bookkeeping.py
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from _common import arguments, machine, print_result, print_table

from dppo_lightning.advantage import GroupMean
from dppo_lightning.base.pretrained import load_tokenizer
from dppo_lightning.base.records import Completion, Prompt
from dppo_lightning.generate.engine import EngineSpec, Failed, Request, Sampling
from dppo_lightning.generate.schedule import Schedule
from dppo_lightning.generate.scripted import ScriptedEngine
from dppo_lightning.generate.stream import RolloutStream
from dppo_lightning.prompts import Shuffled
from dppo_lightning.reward import RewardFunction, Rewarding
from dppo_lightning.reward.base import Sample


class OneByOne(ScriptedEngine):
    """Delivers one completion a call, the worst case for who collects them; counts the seconds that it takes itself."""

    def __init__(self) -> None:
        super().__init__(vocabulary=90)
        self.ready: deque[Completion | Failed] = deque()
        self.seconds = 0.0

    @contextmanager
    def counted(self) -> Iterator[None]:
        started = time.thread_time()
        yield
        self.seconds += time.thread_time() - started

    def submit(self, requests: Sequence[Request]) -> None:
        with self.counted():
            super().submit(requests)

    def poll(self, timeout: float | None = None) -> list[Completion | Failed]:
        with self.counted():
            self.ready.extend(super().poll(timeout))
        return [self.ready.popleft()] if self.ready else []


class Length(RewardFunction):
    def score(self, samples: Sequence[Sample]) -> list[float]:
        return [float(len(sample.completion)) for sample in samples]


def milliseconds(tokenizer: Any, groups: int, samples: int) -> float:
    """Of the main thread's processor time, per completion, in rollouts of so many groups; the engine's left out."""
    engine, sampler = OneByOne(), Shuffled()
    engine.start(EngineSpec("none"))
    sampler.start([Prompt(f"train/{i}", (1 + i % 90,), "?") for i in range(groups)], seed=0)
    steps = max(1, 200 // groups)
    schedule = Schedule(groups, 1, steps)
    stream = RolloutStream(
        engine,
        sampler,
        tokenizer,
        Length(),
        GroupMean(),
        Sampling(max_new_tokens=8),
        samples,
        0,
        schedule,
        rewarding=Rewarding("none"),  # its own cost is that of benchmarks/rewards.py
    )
    seconds = 0.0
    for step in range(steps):
        with stream.updating(step):
            engine.update_weights([], step)
        engine.seconds, started = 0.0, time.thread_time()
        stream.next_rollout(step, lambda done, total: None)
        seconds += time.thread_time() - started - engine.seconds
    stream.close()
    return 1e3 * seconds / (steps * groups * samples)


def main() -> None:
    parser = arguments(__doc__ or "", rounds=3)
    parser.add_argument("--model", default="models/tiny", help="whose tokenizer decodes the completions")
    parser.add_argument("--groups", type=int, nargs="+", default=[10, 100, 1_000, 10_000])
    parser.add_argument("--samples", type=int, default=8, help="completions of a group")
    args = parser.parse_args()
    print(machine())
    tokenizer = load_tokenizer(args.model)
    took: dict[int, list[float]] = {groups: [] for groups in args.groups}
    for _ in range(args.rounds):
        for groups in args.groups:
            took[groups].append(milliseconds(tokenizer, groups, args.samples))
    medians = {groups: statistics.median(values) for groups, values in took.items()}
    header = ["groups", "completions", "ms of the main thread per completion"]
    rows = [[f"{groups:,}", f"{groups * args.samples:,}", f"{value:.3f}"] for groups, value in medians.items()]
    print_table(header, rows)
    print_result({"ms_per_completion": {str(groups): float(f"{value:.3g}") for groups, value in medians.items()}})


if __name__ == "__main__":
    main()
