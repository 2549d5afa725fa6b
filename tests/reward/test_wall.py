"""Completions that attack: what they may do, what they cost, and that nothing of them is left."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from dppo_lightning.base.records import Failure
from dppo_lightning.generate.engine import Request, Sampling
from dppo_lightning.generate.schedule import Schedule
from dppo_lightning.generate.scripted import ScriptedEngine
from dppo_lightning.reward import (
    CodeReward,
    ExactMatch,
    MathReward,
    PythonReward,
    ReasoningGymReward,
    RegexMatch,
    RewardFunction,
    Sample,
)
from dppo_lightning.reward.cell_process import CellProcess
from dppo_lightning.reward.gym import evaluates
from dppo_lightning.reward.pool import RewardPool
from dppo_lightning.reward.rewarding import Rewarding
from dppo_lightning.train.metrics import heldout_metrics
from tests.helpers.hostile import SECRET, attacks
from tests.helpers.models import END
from tests.helpers.processes import children, wait_until
from tests.helpers.streams import give_weights, make_stream, numbered_prompts
from tests.reward.cases import CASES, Case, gym_sample


@dataclass
class Place:
    """Surroundings of the attacks.

    Attributes:
        folder: Folder that must stay empty.
        server: Socket that nobody may connect to.
        victim: Process that nobody may end.
    """

    folder: Path
    server: socket.socket
    victim: subprocess.Popen[bytes]

    @property
    def port(self) -> int:
        return int(self.server.getsockname()[1])

    def untouched(self) -> bool:
        """Tell whether nobody connected, no file was written and no process ended."""
        if self.victim.poll() is not None:
            return False
        self.server.setblocking(False)
        try:
            self.server.accept()
        except BlockingIOError:
            return not list(self.folder.iterdir())
        return False


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setenv(SECRET, SECRET)
    folder = tmp_path / "canary"
    folder.mkdir()
    folder.chmod(0o777)
    with socket.create_server(("127.0.0.1", 0)) as server, subprocess.Popen(["sleep", "600"]) as victim:
        try:
            yield Place(folder, server, victim)
            assert nothing_left()
        finally:
            victim.kill()


def nothing_left() -> bool:
    wait_until(lambda: not any("dppo_lightning.reward.cell" in command(pid) for pid in children(os.getpid())))
    return True


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


SHORT, LONG = 0.5, 60.0
"""Seconds for completions that never end, and for those that do, however loaded the machine is."""


@contextmanager
def worker(reward: RewardFunction, timeout: float) -> Iterator[CellProcess]:
    """One worker, of which nothing is left."""
    pool = RewardPool(reward, Rewarding(timeout=timeout, memory_mib=256))
    caller = pool.caller()
    assert isinstance(caller, CellProcess)
    try:
        yield caller
    finally:
        pool.close()
    assert caller.folder
    assert not os.path.exists(caller.folder)


OBEDIENT = PythonReward("tests.helpers.hostile.obey", runs_completions=True)


def test_no_attack_gets_through_a_reward_that_runs_completions(place: Place) -> None:
    """Each program is scored as if the others had not been there, and the harmless ones among them get their score."""
    programs = attacks(place.folder / "file", place.port, place.victim.pid)
    harmless = Sample("?", "value = 0.5")
    for timeout in (SHORT, LONG):
        mine = {name: each for name, each in programs.items() if ("timeout" in each[1]) is (timeout == SHORT)}
        samples = [sample for program, _ in mine.values() for sample in (Sample("?", program), harmless)]
        with worker(OBEDIENT, timeout) as caller:
            outcomes = caller.score([[sample] for sample in samples], together=False)
        for (name, (_, kinds)), outcome in zip(mine.items(), outcomes[::2], strict=True):
            if isinstance(outcome, Failure):
                assert outcome.kind in kinds.split(), (name, outcome)
            else:
                assert not kinds, (name, outcome)
                assert outcome[0].value == 0.5, name
        if timeout == LONG:
            assert [not isinstance(o, Failure) and o[0].value for o in outcomes[1::2]] == [0.5] * len(mine)
    assert place.untouched()


EXPRESSIONS = {
    "evaluate": "0 * 7",
    "write": "[open({file!r}, 'w').write('x')]",
    "write in a shell": "__import__('os').system('echo x > {file}')",
    "exit": "exit()",
    "raise SystemExit": "(_ for _ in ()).throw(SystemExit(0))",
    "end the process": "__import__('os')._exit(0)",
    "hang": "9**9**8",
    "sleep": "__import__('time').sleep(1000)",
    "allocate 50 GB": "bytearray(50 << 30)",
    "print": "[print('x' * (1 << 20)) for _ in range(1024)]",
    "fork": "[__import__('os').fork() for _ in range(2)]",
    "thread": "__import__('_thread').start_new_thread(exec, ('while True: pass',))",
    "connect": "__import__('socket').create_connection(('127.0.0.1', {port}), 1)",
    "environment": "__import__('os').environ[{secret!r}]",
}


ENDLESS = ("hang", "sleep", "thread")
"""Those that may last as long as they are given."""


@cache
def question(task: str) -> Sample:
    return gym_sample("", task)  # some tasks take a second to make one


def answer(completion: str, task: str) -> Sample:
    return replace(question(task), completion=completion)


def attack_gym(tasks: Sequence[str], place: Place) -> None:
    """Give the scorers of tasks every expression as an answer."""
    known = {"file": str(place.folder / "file"), "port": place.port, "secret": SECRET}
    reward = ReasoningGymReward()
    running = [task for task in tasks if evaluates(task)]
    texts = {name: text.format(**known) for name, text in EXPRESSIONS.items()}
    with worker(reward, SHORT) as caller:
        for name in ENDLESS:
            mine = [answer(texts[name], task) for task in running]
            for task, outcome in zip(running, caller.score([[sample] for sample in mine], False), strict=True):
                assert isinstance(outcome, Failure) or outcome[0].value < 1, (task, name, outcome)
    with worker(reward, LONG) as caller:
        for name, text in texts.items():
            if name not in ENDLESS:
                mine = [answer(text, task) for task in running]
                for task, outcome in zip(running, caller.score([[sample] for sample in mine], False), strict=True):
                    if isinstance(outcome, Failure):
                        assert outcome.kind != "timeout", (task, name, outcome)
                        assert name != "evaluate", (task, outcome)
                    else:
                        assert 0 <= outcome[0].value <= 1, (task, name, outcome)
        for task in set(tasks) - set(running):
            mine = [answer(text, task) for text in texts.values()]
            here = [reward([sample]) for sample in mine]  # to these tasks every answer is text
            assert caller.score([[sample] for sample in mine], True) == here, task
    assert place.untouched()


def test_no_attack_gets_through_the_scorers_of_some_tasks(place: Place) -> None:
    attack_gym(["spiral_matrix", "countdown", "spell_backward"], place)


@pytest.mark.slow
def test_no_attack_gets_through_the_scorer_of_any_task(place: Place) -> None:
    from reasoning_gym.factory import DATASETS

    attack_gym(sorted(DATASETS.keys() - {"composite"}), place)


def test_no_attack_gets_through_code_under_test(place: Place) -> None:
    """A program that attacks passes no test, and one that does not is tested beside it."""
    programs = attacks(place.folder / "file", place.port, place.victim.pid)
    tests = {"tests": [{"input": "", "output": "right"}]}
    lasting = [name for name, (_, kinds) in programs.items() if "timeout" in kinds or name == "start threads"]
    names = [name for name in programs if name not in lasting]
    honest = Sample("?", "print('right')", None, tests)
    samples = [s for name in names for s in (Sample("?", programs[name][0], None, tests), honest)]
    with worker(CodeReward(test_timeout=20), LONG) as caller:
        outcomes = caller.score([[sample] for sample in samples], together=False)
    for name, outcome in zip(names, outcomes[::2], strict=True):
        assert isinstance(outcome, Failure) or outcome[0].value == 0, (name, outcome)
    assert [not isinstance(o, Failure) and o[0].value for o in outcomes[1::2]] == [1] * len(names)
    endless = [Sample("?", programs[name][0], None, tests) for name in lasting]
    with worker(CodeReward(test_timeout=0.3), LONG) as caller:
        for outcome in caller.score([[sample] for sample in endless], together=False):
            assert isinstance(outcome, Failure) or outcome[0].value == 0
    assert place.untouched()


def test_no_attack_gets_through_mathematics_and_text(place: Place) -> None:
    known = {"file": place.folder / "file", "port": place.port, "secret": SECRET}
    # "hang" is a formula, which mathematics tries to compute: see the next test
    texts = [text.format(**known) for name, text in EXPRESSIONS.items() if name != "hang"]
    for reward in (MathReward(), ExactMatch(), RegexMatch("= (.*)", compare=True)):
        samples = [Sample("?", f"{form}{text}{form}", "12") for text in texts for form in ("", "$", "= ")]
        with worker(reward, LONG) as caller:
            for sample, outcome in zip(samples, caller.score([[s] for s in samples], together=True), strict=True):
                assert not isinstance(outcome, Failure), (sample.completion, outcome)
                assert outcome[0].value == 0, sample.completion
    assert place.untouched()


@pytest.mark.parametrize(
    ("reward", "endless", "right"),
    [
        (RegexMatch(r"(\w+\s?)+;"), "a" * 60, "a;"),
        (MathReward(), "$9^{9^{9^{9}}}+1$", "12"),
    ],
    ids=["regex", "math"],
)
def test_a_computation_without_end_costs_its_time_limit_and_nobody_else(
    reward: RewardFunction, endless: str, right: str, place: Place
) -> None:
    samples = [Sample("?", text, "12") for text in (right, endless, right, "no")]
    with worker(reward, 4.0) as caller:
        outcomes = caller.score([[sample] for sample in samples], together=True)
    assert isinstance(outcomes[1], Failure)
    assert outcomes[1].kind in ("timeout", "memory")
    assert [not isinstance(o, Failure) and o[0].value for o in outcomes] == [1, False, 1, 0]


BEHIND = ("exact-case", "regex-compare", "math", "python", "gym-extract", "code", "sum")


@pytest.mark.parametrize("case", [case for case in CASES if case.name in BEHIND], ids=lambda case: case.name)
def test_scores_are_the_same_behind_the_wall(case: Case) -> None:
    with worker(case.reward, LONG) as caller:
        for together in (True, False):
            assert caller.score([[sample] for sample in case.samples], together) == [
                case.reward([sample]) for sample in case.samples
            ]


SAYINGS = ("value = 0.5", "exit()", "import os; os._exit(0)", "import os; os.system('echo x > {file}'); value = 1.0")


def test_a_run_whose_model_attacks_goes_on_and_counts(place: Place, tiny_policy_dir: str) -> None:
    """Two optimizer steps' rollouts of a model that says each of these, and an evaluation."""
    texts = [text.format(file=place.folder / "file") for text in SAYINGS]

    def script(request: Request, version: int) -> tuple[Sequence[int], Sequence[float]]:
        text = texts[int(request.id.rsplit("/")[-1])]
        return [*(ord(letter) - 32 for letter in text), END], [-1.0] * (len(text) + 1)

    stream = make_stream(
        ScriptedEngine(script=script),
        PreTrainedTokenizerFast.from_pretrained(tiny_policy_dir),
        numbered_prompts(3),
        reward=OBEDIENT,
        rewarding=Rewarding(failure_value=-1.0, timeout=LONG),
        sampling=Sampling(max_new_tokens=200),
        samples_per_prompt=len(texts),
        schedule=Schedule(3, 1, 2),
    )
    rewards = [0.5, -1.0, -1.0, 1.0]
    for step in range(2):
        give_weights(stream, step)
        rollout = stream.next_rollout(step)
        assert [np.asarray(group.rewards).tolist() for group in rollout.groups] == [rewards] * 3
        counts = {name: count for name, count in rollout.counts.items() if name.startswith("reward/")}
        assert counts == {
            "reward/failed_timeout": 0,
            "reward/failed_memory": 0,
            "reward/failed_died": 3,
            "reward/failed_raised": 3,
        }
    groups = stream.sample(numbered_prompts(2), len(texts), Sampling(max_new_tokens=200), "heldout")
    assert [np.asarray(group.rewards).tolist() for group in groups] == [rewards] * 2
    assert heldout_metrics(groups, 1.0)["heldout/not_scored"] == 4
    stream.close()
    assert place.untouched()


def test_the_tests_own_place_would_notice(place: Place) -> None:
    """The canaries work: the same programs, without a wall."""
    (place.folder / "file").write_text("x")
    assert not place.untouched()
    names: dict[str, float] = {}
    exec(attacks(place.folder, place.port, place.victim.pid)["read the environment"][0], names)
    assert names["value"] == 1.0
