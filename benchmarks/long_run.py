"""Whether a long run grows: memory, open files, threads and processor time per step of `dppo fit`, start against end.

python benchmarks/long_run.py --steps 100000

The run has every standard callback, a policy of some thousand parameters and a scripted engine, so that what is
measured is what surrounds a step. Its processes are looked at from outside, through /proc. Growth is the last fifth of
the looks against the second fifth, of medians; the first fifth is the warm-up. Time is processor time, which a loaded
machine does not stretch as it does time on the wall.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

import yaml
from _common import arguments, machine, print_result, print_table

LOOKS = 100
"""Number of times that the processes are looked at, evenly over the steps."""


class Look(NamedTuple):
    """The processes of the run, all together.

    Attributes:
        step: Optimizer steps taken.
        memory: Resident memory that is no file's, in MB.
        files: Open files.
        threads: Threads.
        cpu: Processor time since their start, in seconds.
    """

    step: int
    memory: float
    files: int
    threads: int
    cpu: float


def family(pid: int) -> Iterator[int]:
    """A process, and what it started."""
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from family(int(child))


def look(pid: int, step: int) -> Look:
    """Measure a process and what it started."""
    memory, files, threads, cpu = 0.0, 0, 0, 0.0
    for member in family(pid):
        folder = Path(f"/proc/{member}")
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines() if ":" in line)
        memory += float(status["RssAnon"].split()[0]) / 1000
        files += len(list((folder / "fd").iterdir()))
        threads += int(status["Threads"])
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        cpu += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return Look(step, memory, files, threads, cpu)


def write_policy(folder: Path, tokenizer: str) -> None:
    """Save a Llama of one layer with random weights, and a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from dppo_lightning.base.pretrained import load_tokenizer

    words = load_tokenizer(tokenizer)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)


def write_recipe(folder: Path, steps: int, policy: str, vocabulary: int) -> Path:
    """Save prompts and the recipe of the run."""
    rows = [json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) + "\n" for a in range(8) for b in range(8)]
    split = {"train": rows[:60], "heldout": rows[60:]}
    for name, part in split.items():
        (folder / f"{name}.jsonl").write_text("".join(part))
    prompts = {name: str(folder / f"{name}.jsonl") for name in split}
    engine = "dppo_lightning.generate.scripted.ScriptedEngine"
    recipe = {
        "run_dir": str(folder / "run"),
        "trainer": {"max_steps": steps, "accelerator": "cpu", "enable_progress_bar": False},
        "model": {"policy": policy},
        "data": {
            "prompts": {"class_path": "JsonlPrompts", "init_args": prompts},
            "reward": {"class_path": "RegexMatch", "init_args": {"pattern": "[a-m]"}},
            "engine": {"class_path": engine, "init_args": {"vocabulary": vocabulary}},
            "prompts_per_step": 2,
            "samples_per_prompt": 2,
            "steps_per_rollout": 2,
            "max_new_tokens": 6,
            "parity_tolerance": 1e9,  # a script has log-probs of its own
            "evaluate_every_n_steps": max(steps // 10, 1),
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def steps_taken(audit: Path, place: int) -> tuple[int, int]:
    """Number of whole lines that were added to a file after ``place``, and where they end."""
    if not audit.exists():
        return 0, place
    with audit.open("rb") as file:
        file.seek(place)
        added = file.read()
    return added.count(b"\n"), place + added.rfind(b"\n") + 1


def watch(command: list[str], folder: Path, steps: int, threads: int) -> list[Look]:
    """Start the run, look at it every hundredth of its steps, and wait for its end."""
    looks: list[Look] = []
    with (folder / "output").open("w") as output:
        run = subprocess.Popen(
            command, cwd=folder, stdout=output, stderr=output, env=os.environ | {"OMP_NUM_THREADS": str(threads)}
        )
    step = place = 0
    while run.poll() is None:
        added, place = steps_taken(folder / "run" / "mask_audit.jsonl", place)
        step += added
        if step // max(steps // LOOKS, 1) > (looks[-1].step // max(steps // LOOKS, 1) if looks else 0) and step < steps:
            try:
                looks.append(look(run.pid, step))
            except (FileNotFoundError, ProcessLookupError):  # one has ended meanwhile
                continue
        time.sleep(0.02)
    if run.returncode:
        sys.exit((folder / "output").read_text()[-3000:])
    return looks


def growth(values: list[float]) -> float:
    """Median of the last fifth over that of the second fifth, less 1."""
    fifth = len(values) // 5
    return median(values[-fifth:]) / median(values[fifth : 2 * fifth]) - 1


def main() -> None:
    parser = arguments(__doc__ or "", rounds=1)
    parser.add_argument("--steps", type=int, default=100_000, help="optimizer steps of the run")
    parser.add_argument("--tokenizer", default="models/tiny", help="folder of the tokenizer")
    args = parser.parse_args()
    print(machine())
    folder = Path(tempfile.mkdtemp(prefix="long-run-"))
    try:
        write_policy(folder / "policy", args.tokenizer)
        vocabulary = json.loads((folder / "policy" / "config.json").read_text())["vocab_size"]
        recipe = write_recipe(folder, args.steps, str(folder / "policy"), vocabulary)
        started = time.perf_counter()
        command = [sys.executable, "-m", "dppo_lightning", "fit", "--config", str(recipe)]
        looks = watch(command, folder, args.steps, args.threads)
        seconds = time.perf_counter() - started
    finally:
        shutil.rmtree(folder)
    spans = [(b.cpu - a.cpu) / (b.step - a.step) * 1e3 for a, b in pairwise(looks)]
    rows = [
        [f"{one.step:,}", f"{one.memory:.1f}", str(one.files), str(one.threads), f"{span:.2f}"]
        for one, span in list(zip(looks, spans, strict=False))[:: max(len(looks) // 10, 1)]
    ]
    print_table(["step", "memory (MB)", "open files", "threads", "ms of processor time per step"], rows)
    print_result(
        {
            "steps": args.steps,
            "memory_growth": growth([one.memory for one in looks]),
            "files_growth": growth([one.files for one in looks]),
            "threads_growth": growth([one.threads for one in looks]),
            "time_growth": growth(spans),
            "cpu_ms_per_step": median(spans),
            "wall_ms_per_step": seconds / args.steps * 1e3,
        }
    )


if __name__ == "__main__":
    main()
