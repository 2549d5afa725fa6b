"""CodeReward: runs the program that a completion holds, and counts the tests that it passes."""

from __future__ import annotations

import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args

from dppo_lightning.base.errors import ConfigError, RewardError
from dppo_lightning.base.records import Prompt
from dppo_lightning.reward.base import RewardFunction, Sample
from dppo_lightning.reward.text import compile_pattern

Passed = Literal["all", "share"]

FENCE = r"(?s)```[ \t]*\w*[ \t]*\n(.*?)(?:```|\Z)"

LONGEST_OUTPUT = 1 << 20
"""Bytes of output that are looked at; a program that writes more is wrong."""

KEPT = ("LD_LIBRARY_PATH", "PYTHONHOME", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment of a program: what Python needs to start, and a worker has."""

HARNESS = """
import json, os, sys
channel = int(sys.argv.pop())
names = {"__name__": "solution"}
with open(sys.argv.pop()) as file:
    program = file.read()
exec(compile(program, "solution.py", "exec"), names)
{body}
"""
CALL = """
found = names[{entry_point!r}](*json.loads({arguments!r}))
os.write(channel, json.dumps(found).encode())
"""
ASSERT = """
exec(compile({test!r}, "test.py", "exec"), names)
os.write(channel, {word!r}.encode())
"""


class CodeReward(RewardFunction):
    """Reward for a Python program that passes tests; it runs in processes of its own, behind the wall of the worker.

    The tests are the prompt's column "tests", a list. Each is one of

    - ``{"input": text, "output": text}``: what the program reads and must print; white space at the ends of lines and
      of the output does not count;
    - ``{"arguments": [...], "expected": value}``: arguments of the function that the column "entry_point" names, and
      what it must return, compared as JSON is, numbers to six digits;
    - a text: statements that must run without an error after the program.

    Text of a column "prefix" is put before the program.

    Args:
        score: "all": 1 when every test is passed, else 0. "share": share of passed tests.
        test_timeout: Seconds that one test may take, > 0. All of a completion's tests together have
            ``data.rewarding.timeout``.
        extract: Regular expression; group 1 of its last match in the completion is the program. A completion without a
            match is taken whole. By default a block of Markdown.

    Raises:
        ConfigError: A setting is out of range.
        RewardError: When scoring: a prompt has no tests that can be run.
    """

    def __init__(self, score: Passed = "all", test_timeout: float = 2.0, extract: str = FENCE) -> None:
        if score not in get_args(Passed):
            raise ConfigError(f"score must be one of {', '.join(get_args(Passed))}, got {score!r}")
        if not 0 < test_timeout < math.inf:
            raise ConfigError(f"test_timeout must be > 0 and finite, got {test_timeout}")
        self.measure = score
        self.test_timeout = test_timeout
        self.extract = compile_pattern("extract", extract, needs_group=True)

    def runs(self, prompt: Prompt) -> bool:
        return True

    def check(self, prompts: Sequence[Prompt]) -> dict[int, str]:
        found = {place: _problem(prompt.columns) for place, prompt in enumerate(prompts)}
        return {place: what for place, what in found.items() if what is not None}

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return [self._score(sample) for sample in samples]

    def _score(self, sample: Sample) -> float:
        problem = _problem(sample.columns)
        if problem is not None:
            raise RewardError(f"CodeReward cannot score prompt {sample.prompt[-60:]!r}: it {problem}")
        program = str(sample.columns.get("prefix", "")) + self._program(sample.completion)
        tests, passed = sample.columns["tests"], 0
        for test in tests:
            if passes(program, test, sample.columns.get("entry_point"), self.test_timeout):
                passed += 1
            elif self.measure == "all":
                return 0.0
        return passed / len(tests)

    def _program(self, completion: str) -> str:
        matches = list(self.extract.finditer(completion))
        return completion if not matches or matches[-1][1] is None else matches[-1][1]


def _problem(columns: Mapping[str, Any]) -> str | None:
    """What is wrong with the tests of a prompt, None for nothing."""
    tests = columns.get("tests")
    if not isinstance(tests, Sequence) or isinstance(tests, str) or not tests:
        return "has no column 'tests' with a list of tests"
    for number, test in enumerate(tests):
        keys = set(test) if isinstance(test, Mapping) else set()
        if keys == {"arguments", "expected"}:
            if not isinstance(columns.get("entry_point"), str):
                return "has tests with arguments and no column 'entry_point' that names the function"
            if not isinstance(test["arguments"], Sequence):
                return f"has a test {number} whose arguments are no list"
        elif not isinstance(test, str) and not (
            keys == {"input", "output"} and all(isinstance(test[name], str) for name in keys)
        ):
            return f"has a test {number} that is neither input and output, nor arguments and expected, nor a text"
    return None


def passes(program: str, test: Mapping[str, Any] | str, entry_point: str | None, timeout: float) -> bool:
    """Run a program; tell whether it passes a test.

    Args:
        program: Text of the program.
        test: Test, see CodeReward.
        entry_point: Name of the function that a test with arguments calls.
        timeout: Seconds that it may take.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder, "solution.py")
        try:
            path.write_text(program, encoding="utf-8")
        except UnicodeEncodeError:  # half of a surrogate pair is no program
            return False
        if isinstance(test, Mapping) and "input" in test:
            output = _run([str(path)], folder, test["input"], timeout, from_channel=False)
            return output is not None and _lines(output) == _lines(test["output"])
        if isinstance(test, Mapping):
            body = CALL.format(entry_point=entry_point, arguments=json.dumps(test["arguments"]))
            returned = _run(["-c", HARNESS.replace("{body}", body), str(path)], folder, "", timeout, from_channel=True)
            return returned is not None and _same(returned, test["expected"])
        # A program that ends before its test has said nothing, whatever its exit code.
        word = secrets.token_hex(16)
        body = ASSERT.format(test=test, word=word)
        said = _run(["-c", HARNESS.replace("{body}", body), str(path)], folder, "", timeout, from_channel=True)
        return said == word


def _run(words: list[str], folder: str, text: str, timeout: float, from_channel: bool) -> str | None:
    """Run Python; what it wrote to its output, or to a channel that only our harness knows. None where it failed."""
    with tempfile.TemporaryFile(dir=folder) as given, tempfile.TemporaryFile(dir=folder) as written:
        given.write(text.encode(errors="replace"))
        given.seek(0)
        channel = written.fileno()
        process = subprocess.Popen(
            [sys.executable, "-I", *words, *([str(channel)] if from_channel else [])],
            cwd=folder,
            env={name: os.environ[name] for name in KEPT if name in os.environ} | {"HOME": folder, "TMPDIR": folder},
            stdin=given,
            stdout=subprocess.DEVNULL if from_channel else written,
            stderr=subprocess.DEVNULL,
            pass_fds=[channel] if from_channel else [],
            start_new_session=True,
        )
        try:
            failed = process.wait(timeout) != 0
        except subprocess.TimeoutExpired:
            failed = True
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        written.seek(0)
        found = written.read(LONGEST_OUTPUT + 1)
        return None if failed or len(found) > LONGEST_OUTPUT else found.decode(errors="replace")


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _same(returned: str, expected: Any) -> bool:
    try:
        return equal(json.loads(returned), json.loads(json.dumps(expected)))
    except (ValueError, RecursionError):
        return False


def equal(found: Any, expected: Any) -> bool:
    """Tell whether two values of JSON are equal, numbers to six digits; true and 1 are different."""
    if isinstance(found, bool) or isinstance(expected, bool):
        return found is expected
    if isinstance(found, int | float) and isinstance(expected, int | float):
        return found == expected or math.isclose(found, expected, rel_tol=1e-6, abs_tol=1e-9)
    if isinstance(found, list) and isinstance(expected, list):
        return len(found) == len(expected) and all(map(equal, found, expected))
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(equal(found[key], expected[key]) for key in found)
    return bool(found == expected)
