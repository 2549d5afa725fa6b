"""Spoilt data and spoilt recipes: each gives a result or one line that says what is wrong, never a traceback or a hang.

python benchmarks/fuzz.py --rows 10000 --configs 2000

A row of JSON lines goes through the file loader and the encoding, as a question and as a chat; a recipe goes through
``dppo fit`` up to where the run would begin. Every mutation is drawn from one seed, so what is found is found again.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a spoilt name of a model is asked of nobody

import yaml
from _common import print_result
from transformers import PreTrainedTokenizerBase

from dppo_lightning.base.errors import DPPOError
from dppo_lightning.prompts import JsonlPrompts, encode
from dppo_lightning.run import cli
from dppo_lightning.run.tiny_model import byte_tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROWS: list[dict[str, Any]] = [
    {"prompt": "What is 2 + 3?", "answer": 5, "source": "mine"},
    {"prompt": "12 * 4 =", "answer": "48", "level": {"digits": 2, "steps": [1, 2]}},
    {"messages": [{"role": "user", "content": "What is 7 - 2?"}], "answer": 5.0},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2^8?"}], "answer": None},
]
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 10**30, -(2**63), 0.1, -0.0, 1e308, float("inf"), float("nan"), "", " ", "\n", "x"),
    *("nan", "null", "1e3", "-", "[", "{", "é\N{SNOWMAN}", "\ud800", "\x00", "\x1b[31m", "a\nb", "\u2028", "\ufeff"),
    *("<|im_end|>", "<|im_start|>system", "<eos>", "<pad>", "{question}", "{{ 1 / 0 }}", "%s", "${HOME}", "x" * 5000),
    *(
        [],
        {},
        [[]],
        [None],
        {"": ""},
        {"role": "user"},
        [{"role": "user", "content": []}],
        {"class_path": "x"},
        [1, "a"],
    ),
]
"""What a value is replaced by."""
TEXTS = [
    "",
    "&a [*a]",
    "a: &a\n  b: *a",
    "- 1",
    "!!python/object:os.system x",
    "\t- a",
    "%YAML 9",
    "a: b: c",
    "---\n---",
]
"""Whole recipes."""


class Hang(BaseException):
    """A case took longer than it may; no Exception, so that nobody takes it for one of his own."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise Hang inside the context when it lasts longer."""

    def end(*_: object) -> None:
        raise Hang(f"longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values in a tree of lists and dicts, the inner ones too, but for the whole."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = [path] if path else []
    for key, value in inner:
        found += places(value, (*path, key))
    return found


def spoilt(tree: Any, draw: random.Random) -> Any:
    """Copy of a tree with one to three places replaced, removed, renamed, moved, or written twice."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        if not (known := places(tree)):
            return draw.choice(VALUES)
        *above, key = draw.choice(known)
        owner = tree
        for step in above:
            owner = owner[step]
        change = draw.randrange(5)
        if change == 0 and isinstance(owner, dict):
            owner[draw.choice(("", "x", f"{key}s", str(key)[1:], str(key).upper(), "a.b", "class_path"))] = owner.pop(
                key
            )
        elif change == 1:
            del owner[key]
        elif change == 2:
            owner[key] = {draw.choice(("a", "", "init_args", "role")): owner[key]}
        elif change == 3:
            owner[key] = copy.deepcopy(at(tree, draw.choice(known)))
        else:
            owner[key] = copy.deepcopy(draw.choice(VALUES))
    return tree


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    """Value at a path, or None where an earlier change has removed it."""
    for step in path:
        try:
            tree = tree[step]
        except (KeyError, IndexError, TypeError):
            return None
    return tree


def spoilt_bytes(text: bytes, draw: random.Random) -> bytes:
    """Copy of a text with one to three pieces removed, repeated, replaced or inserted."""
    for _ in range(draw.randint(1, 3)):
        start = draw.randint(0, len(text))
        end = min(len(text), start + draw.choice((0, 1, 1, 2, 8, 40)))
        piece = draw.choice(
            (b"", text[start:end] * 2, bytes([draw.randrange(256)]), b"\n", b'"', b"{", b"]", b": ", b"\t")
        )
        text = text[:start] + piece + text[end:]
    return text


def as_json(row: Any, draw: random.Random) -> bytes:
    """A row as a line of a file: now and then with what Python's writer would not write."""
    ascii_ = draw.random() < 0.5
    return json.dumps(row, ensure_ascii=ascii_).encode("utf-8", "surrogatepass")


def one_row(folder: Path, tokenizer: PreTrainedTokenizerBase, draw: random.Random) -> None:
    """Read and encode a file with a spoilt row between two good ones."""
    row = draw.choice(ROWS)
    line = as_json(spoilt(row, draw) if draw.random() < 0.6 else row, draw)
    if draw.random() < 0.5:
        line = spoilt_bytes(line, draw)
    good = json.dumps(ROWS[0]).encode()
    file = folder / "rows.jsonl"
    file.write_bytes(b"\n".join([good, line, good]) + draw.choice((b"", b"\n", b"\n\n")))
    source = JsonlPrompts(str(file), chat=draw.random() < 0.5, heldout_size=draw.choice((0, 0, 1)))
    sets = source.load()
    for split, examples in (("train", sets.train), ("heldout", sets.heldout)):
        prompts, _ = encode(examples, tokenizer, split, longest=draw.choice((None, 60, 4000)))  # type: ignore[arg-type]
        json.dumps([prompt.text for prompt in prompts])


def one_config(folder: Path, recipe: dict[str, Any], draw: random.Random) -> None:
    """Give ``dppo fit`` a spoilt recipe; raises what it says as a DPPOError."""
    text = yaml.safe_dump(spoilt(recipe, draw) if draw.random() < 0.8 else recipe, allow_unicode=draw.random() < 0.5)
    written = text.encode("utf-8", "surrogatepass")
    if draw.random() < 0.25:
        written = spoilt_bytes(written, draw)
    if draw.random() < 0.02:
        written = draw.choice(TEXTS).encode()
    file = folder / "recipe.yaml"
    file.write_bytes(written)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
            cli.main(["fit", "--config", str(file)])
    except SystemExit as end:
        lines = [line for line in printed.getvalue().splitlines() if line.startswith("error: ")]
        if end.code != 2 or len(lines) != 1:
            raise RuntimeError(f"exit code {end.code} and {len(lines)} lines") from end
        said = printed.getvalue()[printed.getvalue().index("error: ") :]
        raise DPPOError(said.rstrip("\n")) from None


def count(cases: int, case: Callable[[random.Random], None], kind: str, seconds: float) -> Counter[str]:
    """Run cases, each with a seed of its own, and count what they end in; a traceback is shown the first time."""
    found: Counter[str] = Counter()
    shown = set()
    for number in range(cases):
        try:
            with limited(seconds):
                case(random.Random(f"{kind} {number}"))
            found["results"] += 1
        except DPPOError as error:
            found["errors"] += 1
            said = str(error)
            said.encode("utf-8", "backslashreplace")
            if len(said.splitlines()) != 1:
                found["tracebacks"] += 1
                print(f"{kind} {number}: {len(said.splitlines())} lines: {said!r}"[:400])
        except (Exception, Hang) as error:
            found["tracebacks"] += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            name = (type(error).__name__, where.filename, where.lineno)
            if name not in shown:
                shown.add(name)
                steps = [
                    f"{Path(step.filename).name}:{step.lineno}" for step in traceback.extract_tb(error.__traceback__)
                ]
                print(f"{kind} {number}: {type(error).__name__}: {str(error)[:200]!r} at {' '.join(steps[-6:])}")
    return found


def nothing(*_: object) -> None:
    """Take the place of the run that would begin."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000, help="rows of JSON lines")
    parser.add_argument("--configs", type=int, default=2_000, help="recipes")
    parser.add_argument("--recipe", default="configs/quickstart.yaml", help="recipe that is spoilt")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds after which a case hangs")
    args = parser.parse_args()
    recipe = yaml.safe_load(Path(args.recipe).read_text())
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    started, before, run = time.perf_counter(), os.getcwd(), cli.DPPOCommandLine._run_subcommand
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chdir(folder)  # where a recipe may name files
        cli.DPPOCommandLine._run_subcommand = nothing  # type: ignore[method-assign]
        try:
            rows = count(args.rows, lambda draw: one_row(folder, tokenizer, draw), "row", args.limit)
            configs = count(args.configs, lambda draw: one_config(folder, recipe, draw), "config", args.limit)
        finally:
            cli.DPPOCommandLine._run_subcommand = run  # type: ignore[method-assign]
            os.chdir(before)
    both = rows + configs
    print(f"rows: {dict(rows)}; recipes: {dict(configs)}", file=sys.stderr)
    print_result(
        {
            "rows": args.rows,
            "configs": args.configs,
            "errors": both["errors"],
            "tracebacks": both["tracebacks"],
            "seconds": time.perf_counter() - started,
        }
    )


if __name__ == "__main__":
    main()
