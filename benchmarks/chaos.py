"""Runs that are killed at random moments and go on: what is lost, doubled or changed against an uninterrupted run.

Each round begins a run, kills the trainer, the engine or a reward worker with SIGKILL at random moments, goes on by
``dppo fit --resume`` as often as needed, and compares what is left with an uninterrupted run: weights to the last bit,
every line of completions, evaluations, metrics (but times) and audit.

python benchmarks/chaos.py --rounds 20
"""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch
from _common import arguments, machine, print_result, print_table

ROOT = Path(__file__).parents[1]
LOGS = ("completions.jsonl", "heldout.jsonl", "mask_audit.jsonl")
TIMES = ("time/", "perf/", "stream/ready", "stream/in_flight")
"""Beginnings of the names of metrics that say when something was done, not what."""
TARGETS = ("trainer", "engine", "reward")


def words(run: Path, engine: str, steps: int) -> list[str]:
    """Words of the command that begins the run: the quickstart's task, small and short."""
    return [
        *("fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), "--run_dir", str(run)),
        *("--model.policy", str(ROOT / "models" / "tiny"), "--data.engine", engine),
        *(f"--trainer.max_steps={steps}", "--trainer.enable_progress_bar=false", "--data.prompts_per_step=8"),
        *("--data.prompts.train=2000", "--data.prompts.heldout=16", "--data.heldout_samples=1"),
        *("--data.evaluate_every_n_steps=6", "--checkpoint.every_n_steps=3"),
    ]


def start(arguments_: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start ``dppo``, in a session of its own, with what it prints in a file."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dppo_lightning", *arguments_]
    with log.open("ab") as output:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )


def victim(trainer: subprocess.Popen[bytes], target: str) -> int | None:
    """Number of the process to kill; None where there is none of that kind at the moment."""
    if target == "trainer":
        return trainer.pid
    try:
        children = psutil.Process(trainer.pid).children(recursive=True)
        named = [(child.pid, " ".join(child.cmdline())) for child in children]
    except psutil.Error:
        return None
    kind = "vllm" if target == "engine" else "reward"
    found = [pid for pid, command in named if kind in command]
    return random.choice(found) if found else None


def interrupted(run: Path, engine: str, steps: int, seconds: float, log: Path) -> Counter[str]:
    """One round: begin, kill, go on until the run is over; how often what was killed."""
    killed: Counter[str] = Counter()
    trainer = start(words(run, engine, steps), log)
    for _ in range(random.randint(1, 3)):
        until = time.monotonic() + random.uniform(0.0, seconds)
        while time.monotonic() < until and trainer.poll() is None:
            time.sleep(0.01)
        target = random.choice(TARGETS)
        pid = victim(trainer, target)
        if trainer.poll() is not None or pid is None:
            continue
        os.kill(pid, signal.SIGKILL)
        killed[target] += 1
        if target == "trainer":
            trainer.wait()
            trainer = start(next_words(run, engine, steps), log)
    for _ in range(1 + killed["engine"]):  # an engine that is killed while it starts up ends the run, in one line
        if trainer.wait() == 0:
            return killed
        trainer = start(next_words(run, engine, steps), log)
    trainer.kill()
    raise SystemExit(f"{log.read_text()[-4000:]}\nthe run does not go on")


def next_words(run: Path, engine: str, steps: int) -> list[str]:
    """Words of the command that goes on, or that begins where the run was killed before it had begun."""
    return ["fit", "--resume", str(run)] if (run / "config.yaml").exists() else words(run, engine, steps)


def made(run: Path) -> dict[str, Any]:
    """What a run has made: the lines of its logs, its rows of metrics, its weights."""
    lines: dict[str, Any] = {name: (run / name).read_text().splitlines() for name in LOGS}
    with (run / "metrics.csv").open(newline="") as file:
        rows = [
            {name: value for name, value in row.items() if value and not name.startswith(TIMES)}
            for row in csv.DictReader(file)
        ]
    lines["metrics.csv"] = [json.dumps(row) for row in rows]
    weights = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return {"lines": lines, "weights": weights}


def compare(found: dict[str, Any], whole: dict[str, Any]) -> dict[str, int]:
    """Lines that are lost, and lines that are there too often, torn or changed; whether the weights are equal."""
    lost = doubled = 0
    for name, expected in whole["lines"].items():
        here, there = Counter(found["lines"][name]), Counter(expected)
        lost += (there - here).total()
        doubled += (here - there).total()
    equal = all(torch.equal(found["weights"][name], weight) for name, weight in whole["weights"].items())
    return {"bit_equal": int(equal), "lost": lost, "doubled": doubled}


def main() -> None:
    parser = arguments(__doc__ or "", rounds=20)
    parser.add_argument("--steps", type=int, default=18, help="optimizer steps of a run")
    parser.add_argument("--engine", default="VLLMEmbedded", help="class of the engine")
    parser.add_argument("--seed", type=int, default=0, help="seed of what is killed when")
    chosen = parser.parse_args()
    random.seed(chosen.seed)
    with tempfile.TemporaryDirectory() as folder:
        begun, log = time.monotonic(), Path(folder) / "whole.log"
        if start(words(Path(folder) / "whole", chosen.engine, chosen.steps), log).wait() != 0:
            raise SystemExit(log.read_text())
        seconds = time.monotonic() - begun
        whole = made(Path(folder) / "whole")
        rows, total, killed = [], Counter[str](), Counter[str]()
        for number in range(chosen.rounds):
            run = Path(folder) / f"run{number}"
            mine = interrupted(run, chosen.engine, chosen.steps, seconds, Path(folder) / f"run{number}.log")
            result = compare(made(run), whole)
            total.update(result)
            killed.update(mine)
            rows.append(
                [str(number), ", ".join(f"{n} {target}" for target, n in mine.items()), *map(str, result.values())]
            )
    print(machine())
    print_table(["round", "killed", "bit_equal", "lost", "doubled"], rows)
    print_result({"rounds": chosen.rounds, **total, "killed": dict(killed)})


if __name__ == "__main__":
    main()
