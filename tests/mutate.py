"""Does a fault in the numeric core make a test fail? Run by ``make mutants``; the faults are those of mutants.py.

Each is applied alone, to a copy of the tree in a temporary folder, and its tests are run there. The last line is JSON:
``{"killed": n, "of": m, "survived": [...]}``; the exit status is 1 where one survived.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest

from tests.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[1]
PRELOADED = ("torch", "lightning.pytorch", "transformers.models.llama.modeling_llama", "hypothesis")
"""Loaded once, before the processes of the tests branch off: on its own each would take longer than most tests."""
FAILED = 1  # pytest's exit status where tests ran and some failed; any other says that they could not run


def mutated(mutant: Mutant, text: str) -> str:
    """The file's text with the fault.

    Raises:
        ValueError: ``old`` does not stand in it exactly once.
    """
    found = text.count(mutant.old)
    if found != 1:
        raise ValueError(
            f"{mutant.file} has {mutant.old!r} {found} times, not once: mend the entry in tests/mutants.py"
        )
    return text.replace(mutant.old, mutant.new)


def name(mutant: Mutant) -> str:
    return f"{mutant.file}: {mutant.old} -> {mutant.new or '(nothing)'}"


def copy_tree(folder: Path) -> Path:
    for part in ("dppo_lightning", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def start(tree: Path, tests: Iterable[str], silent: bool = True) -> ForkProcess:
    """Pytest in a copy of the tree, in a process whose exit status is pytest's."""
    process = get_context("fork").Process(target=_tests_in, args=(tree, tuple(tests), silent))
    process.start()
    return process


def _tests_in(tree: Path, tests: tuple[str, ...], silent: bool) -> None:
    os.setsid()
    os.chdir(tree)
    sys.path[0] = str(tree)  # in place of this file's folder, which has the tests without a fault
    sys.modules.pop("mutants", None)
    if silent:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
    os._exit(pytest.main(["-x", "-q", "-o", "addopts=", "-p", "no:cacheprovider", *tests]))


class Attempt:
    """A mutant in a tree of its own, until ``end``."""

    def __init__(self, mutant: Mutant, tree: Path) -> None:
        self.mutant, self.tree, self.path = mutant, tree, tree / mutant.file
        self.text = self.path.read_text()
        self.path.write_text(mutated(mutant, self.text))
        self.started = time.perf_counter()
        self.process = start(tree, mutant.tests)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def end(self) -> str | None:
        """Take the fault out again. None where a test failed, else what happened."""
        status = self.process.exitcode
        if status is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.join()
        self.path.write_text(self.text)
        if status is None:
            return f"no end after {self.seconds:.0f} s"
        return None if status == FAILED else "its tests pass" if status == 0 else f"pytest ended with status {status}"


def try_all(chosen: list[Mutant], trees: list[Path], limit: float) -> list[str]:
    """One mutant at a time in each tree; the names of those that survived, in the order of the list."""
    waiting, running, survived = list(chosen), list[Attempt](), set[Mutant]()
    try:
        while waiting or running:
            while waiting and len(running) < len(trees):
                free = next(tree for tree in trees if all(attempt.tree != tree for attempt in running))
                running.append(Attempt(waiting.pop(0), free))
            left = min(limit - attempt.seconds for attempt in running)
            wait([attempt.process.sentinel for attempt in running], max(left, 0))
            for attempt in list(running):
                attempt.process.join(0)
                if attempt.process.exitcode is None and attempt.seconds < limit:
                    continue
                problem = attempt.end()
                running.remove(attempt)
                verdict = "killed" if problem is None else f"SURVIVED ({problem})"
                print(f"{verdict} in {attempt.seconds:.0f} s: {name(attempt.mutant)}", flush=True)
                if problem is not None:
                    survived.add(attempt.mutant)
    finally:
        for attempt in running:
            attempt.end()
    return [name(mutant) for mutant in chosen if mutant in survived]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutants whose file and change contain this text")
    parser.add_argument("--jobs", type=int, default=2, help="mutants tried at once, each on one core")
    parser.add_argument("--limit", type=float, default=300, help="seconds that one mutant's tests may take")
    arguments = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if arguments.only in name(mutant)]
    sys.dont_write_bytecode = True  # a fault that is as long as what it replaces would find the other's bytecode
    for module in PRELOADED:
        importlib.import_module(module)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trees = [copy_tree(Path(folder, str(number))) for number in range(arguments.jobs)]
        tests = sorted({test for mutant in chosen for test in mutant.tests})
        sound = start(trees[0], tests, silent=False)
        sound.join()
        if sound.exitcode != 0:
            sys.exit("the tests fail without a mutant, so they say nothing of one")
        survived = try_all(chosen, trees, arguments.limit)
    print(json.dumps({"killed": len(chosen) - len(survived), "of": len(chosen), "survived": survived}))
    sys.exit(bool(survived))


if __name__ == "__main__":
    main()
