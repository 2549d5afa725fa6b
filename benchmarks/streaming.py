"""Generation beside training: seconds a step by staleness, on a scripted engine and on the real one.

python benchmarks/streaming.py
python benchmarks/streaming.py --seeds 0 1 2 --plot docs/figures/timeline.png
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _common import arguments, machine, print_result, print_table

from dppo_lightning.advantage import GroupMean
from dppo_lightning.base.pretrained import load_tokenizer
from dppo_lightning.base.records import Prompt
from dppo_lightning.generate.engine import EngineSpec, Sampling
from dppo_lightning.generate.schedule import Schedule, Streaming
from dppo_lightning.generate.scripted import ScriptedEngine
from dppo_lightning.generate.stream import RolloutStream
from dppo_lightning.prompts import Shuffled
from dppo_lightning.reward import RewardFunction
from dppo_lightning.reward.base import Sample
from dppo_lightning.run.callbacks.curves import read_metrics
from dppo_lightning.run.callbacks.record import LANES, read_timeline

STALENESS = (0, 1, 4)
RECIPE = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


class Length(RewardFunction):
    def score(self, samples: Sequence[Sample]) -> list[float]:
        return [float(len(sample.completion)) for sample in samples]


def scripted(model: str, seconds: float, steps: int) -> dict[str, float]:
    """A completion and a training step of ``seconds`` each: what a step takes beside the slower side, and the sum."""

    def stream(ahead: int) -> RolloutStream:
        engine = ScriptedEngine(vocabulary=90, delay=seconds, real_time=True)
        engine.start(EngineSpec(model))
        sampler = Shuffled()
        sampler.start([Prompt(f"train/{i}", (1 + i,), str(i)) for i in range(64)], seed=0)
        sampling = Sampling(max_new_tokens=16)
        schedule, streaming = Schedule(8, 1, steps + 1), Streaming(ahead)
        return RolloutStream(
            engine, sampler, load_tokenizer(model), Length(), GroupMean(), sampling, 4, 0, schedule, streaming
        )

    def run(ahead: int, generate: bool = True, train: bool = True) -> float:
        """Median seconds of a step, without the first, which has nothing to run beside."""
        source, took = stream(ahead), []
        for step in range(steps + 1):
            started = time.perf_counter()
            with source.updating(step):
                source.inbox.engine.update_weights([], step)
            if generate:
                source.next_rollout(step)
            if train:
                source.pump()
                time.sleep(seconds)
            took.append(time.perf_counter() - started)
        source.close()
        return statistics.median(took[1:])

    generating, training = run(0, train=False), run(0, generate=False)
    beside, in_turn = run(1), run(0)
    rows = [
        ["generation alone", generating],
        ["training alone", training],
        ["max_staleness 0", in_turn],
        ["max_staleness 1", beside],
    ]
    print_table(["scripted engine", "ms a step"], [[name, f"{value * 1e3:.1f}"] for name, value in rows])
    return {
        "step_over_slower_side": beside / max(generating, training),
        "step_over_sum_sync": in_turn / (generating + training),
    }


def fit(folder: Path, staleness: int, seed: int, steps: int, model: str, every: int) -> Path:
    """One run of the quickstart recipe with a rollout for every step, in a process of its own."""
    run_dir = folder / f"staleness{staleness}-seed{seed}"
    settings = {
        "config": RECIPE,
        "run_dir": run_dir,
        "seed_everything": seed,
        "model.policy": model,
        "trainer.max_steps": steps,
        "trainer.enable_progress_bar": False,
        "data.steps_per_rollout": 1,
        "data.streaming.max_staleness": staleness,
        "data.evaluate_every_n_steps": every,
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    done = subprocess.run([sys.executable, "-m", "dppo_lightning", "fit", *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return run_dir


def seconds_by_step(run_dir: Path) -> list[float]:
    """When each optimizer step ended, in seconds of training time: held-out evaluation is not counted."""
    spans = [event for event in read_timeline(run_dir / "timeline.json") if event["ph"] == "X"]
    evaluated = sorted((e["ts"], e["dur"]) for e in spans if e["name"] == "evaluate")
    first = min(e["ts"] for e in spans if e["name"] == "wait")
    ends: dict[int, float] = {}
    for event in spans:
        if event["name"] == "train":
            end = event["ts"] + event["dur"]
            idle = sum(duration for start, duration in evaluated if first <= start < end)
            ends[event["args"]["step"]] = (end - first - idle) / 1e6
    return [ends[step] for step in sorted(ends)]


def real(args: Any, folder: Path) -> dict[str, Any]:
    """Steps a second, and the held-out reward after equal steps and after equal time."""
    runs = {
        (s, seed): fit(folder, s, seed, args.steps, args.model, args.every) for seed in args.seeds for s in STALENESS
    }
    took = {key: seconds_by_step(run_dir) for key, run_dir in runs.items()}
    rewards = {key: read_metrics(run_dir / "metrics.csv")["heldout/reward"] for key, run_dir in runs.items()}
    rows, result = [], {}
    for staleness in STALENESS:
        rates, equal_steps, equal_time = [], [], []
        for seed in args.seeds:
            mine, limit = took[staleness, seed], min(took[s, seed][-1] for s in STALENESS)
            points = rewards[staleness, seed]
            rates.append(len(mine) / mine[-1])
            equal_steps.append(points[-1][1])
            done = sum(end <= limit for end in mine)
            equal_time.append([value for step, value in points if step <= done][-1])
        masked = [read_metrics(runs[staleness, s] / "metrics.csv")["train/masked_share"] for s in args.seeds]
        share = statistics.mean(value for points in masked for _, value in points)
        rows.append(
            [
                str(staleness),
                f"{statistics.median(rates):.2f}",
                " ".join(f"{value:.3f}" for value in equal_steps),
                " ".join(f"{value:.3f}" for value in equal_time),
                f"{share:.4f}",
            ]
        )
        result[f"steps_per_s_{staleness}"] = statistics.median(rates)
    before = " ".join(f"{rewards[0, seed][0][1]:.3f}" for seed in args.seeds)
    print(f"held-out reward before training: {before}; {args.steps} steps, seeds {args.seeds}")
    header = ["max_staleness", "steps/s", "reward, equal steps", "reward, equal time", "masked share"]
    print_table(header, rows)
    if args.plot:
        draw({s: runs[s, args.seeds[0]] for s in (0, 1)}, args.plot)
    return result


def draw(runs: dict[int, Path], path: Path) -> None:
    """The spans of three steps in the middle of each run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lanes = [lane for lane in LANES if lane != "evaluate"]
    figure, axes = pyplot.subplots(len(runs), 1, figsize=(11, 2.6 * len(runs)), constrained_layout=True)
    width = 0.0
    for axis, (staleness, run_dir) in zip(axes, runs.items(), strict=True):
        spans = [event for event in read_timeline(run_dir / "timeline.json") if event["ph"] == "X"]
        trained = {e["args"]["step"]: e for e in spans if e["name"] == "train"}
        middle = max(0, min(len(trained) // 2 + 3, len(trained) - 4))  # between two evaluations
        begin = trained[middle]["ts"] + trained[middle]["dur"]
        end = max(trained[step]["ts"] + trained[step]["dur"] for step in (middle, min(middle + 3, max(trained))))
        width = max(width, (end - begin) / 1e3)
        for event in spans:
            if event["name"] in lanes and event["ts"] < end and event["ts"] + event["dur"] > begin:
                place = lanes.index(event["name"])
                bar = ((event["ts"] - begin) / 1e3, event["dur"] / 1e3)
                alpha = 0.12 if event["name"] == "generate" else 0.9  # thirty-two groups of a rollout, one over another
                axis.broken_barh([bar], (place - 0.4, 0.8), facecolors=f"C{place}", alpha=alpha)
        axis.set_yticks(range(len(lanes)), lanes)
        axis.invert_yaxis()
        axis.set_title(f"max_staleness {staleness}: three steps")
        axis.set_xlabel("ms")
    for axis in axes:
        axis.set_xlim(0, width)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", default="models/tiny")
    parser.add_argument("--only", choices=["scripted", "engine"], help="one half; default: both")
    parser.add_argument("--seconds", type=float, default=0.05, help="of a scripted completion, and of its training")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of a run on the real engine")
    parser.add_argument("--every", type=int, default=20, help="steps between held-out evaluations of such a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the runs on the real engine")
    parser.add_argument("--plot", type=Path, help="draw the time lines of staleness 0 and 1")
    args = parser.parse_args()
    print(machine())
    result: dict[str, Any] = {}
    if args.only != "engine":
        result |= scripted(args.model, args.seconds, 8 * args.rounds)
    if args.only != "scripted":
        with tempfile.TemporaryDirectory() as folder:
            result |= real(args, Path(folder))
    print_result(result)


if __name__ == "__main__":
    main()
