"""Reward workers: their life, what they are given, how they fail, and that they leave nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from dppo_lightning.base.errors import ConfigError, RewardError
from dppo_lightning.base.records import Failure
from dppo_lightning.reward import ExactMatch, PythonReward, RewardFunction, Sample, Score, WeightedSum, cell_process
from dppo_lightning.reward.calling import Outcome
from dppo_lightning.reward.cell_process import CellProcess, Closed
from dppo_lightning.reward.pool import RewardPool
from dppo_lightning.reward.rewarding import Rewarding
from tests.helpers.hostile import SECRET, attacks
from tests.helpers.places import ROOT
from tests.helpers.processes import PATIENCE, children, kill, running, take_signals, wait_until, wait_until_gone

WEAK = """
import sys, json
sys.path[:] = json.loads(sys.argv[1])
from dppo_lightning.reward import cell, confine
confine.unshare = lambda flags: False
confine.another_user = lambda paths: confine.User(None, missing="another user")
confine.landlock_version = lambda: 0
cell.main()
"""
"""A worker on a machine that permits nothing."""


@pytest.fixture
def pools() -> Iterator[list[RewardPool]]:
    made: list[RewardPool] = []
    yield made
    for pool in made:
        pool.close()


def start(pools: list[RewardPool], reward: RewardFunction, **settings: object) -> CellProcess:
    pool = RewardPool(reward, Rewarding(**{"timeout": 60.0, **settings}))  # type: ignore[arg-type]
    pools.append(pool)
    caller = pool.caller()
    assert isinstance(caller, CellProcess)
    return caller


def ask(caller: CellProcess, *completions: str, together: bool = True, answer: str | None = None) -> list[Outcome]:
    return caller.score([[Sample("?", completion, answer)] for completion in completions], together)


def command_line(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def value(outcome: Outcome) -> float:
    assert not isinstance(outcome, Failure), outcome
    return outcome[0].value


def test_a_worker_starts_without_the_trainers_environment_and_without_heavy_imports(
    pools: list[RewardPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SECRET, "x")
    found = [ask(start(pools, PythonReward("tests.helpers.hostile.surroundings")), "") for _ in range(2)]
    assert found[0] == found[1]
    assert not isinstance(found[0][0], Failure)
    parts = found[0][0][0].parts
    assert (parts["secret"], parts["heavy"], parts["threads"]) == (0, 0, 1)
    assert parts["variables"] <= 8


def test_an_unpicklable_reward_is_refused_and_may_be_trusted(caplog: pytest.LogCaptureFixture) -> None:
    class Holding(ExactMatch):
        def __init__(self) -> None:
            super().__init__()
            self.lock = threading.Lock()

    with pytest.raises(ConfigError, match=r"Holding cannot be sent to a worker process, TypeError.*isolation: none"):
        RewardPool(Holding(), Rewarding())
    pool = RewardPool(Holding(), Rewarding(isolation="none"))
    assert pool.caller().score([[Sample("?", "7", "7")]], True) == [[Score(1.0)]]
    assert "isolation: none" in caplog.text


def test_a_reward_of_a_script_or_a_function_reaches_the_worker(pools: list[RewardPool]) -> None:
    class Local(RewardFunction):
        def score(self, samples: Sequence[Sample]) -> list[float]:
            return [2.0 for _ in samples]

    assert value(ask(start(pools, Local()), "x")[0]) == 2.0


def test_a_reward_that_cannot_be_loaded_stops_with_its_error(pools: list[RewardPool]) -> None:
    class Odd(ExactMatch):
        def __setstate__(self, state: object) -> None:
            raise LookupError("no such thing")

    with pytest.raises(RewardError, match=r"Odd cannot be loaded in a worker process, LookupError: no such thing"):
        ask(start(pools, Odd()), "7", answer="7")


def test_a_worker_that_is_killed_is_replaced_and_nothing_is_lost(
    pools: list[RewardPool], caplog: pytest.LogCaptureFixture
) -> None:
    caller = start(pools, ExactMatch())
    assert value(ask(caller, "7", answer="7")[0]) == 1
    assert caller.process is not None
    first = caller.process.pid
    kill(children(first) | {first})
    assert [value(one) for one in ask(caller, "7", "8", answer="7")] == [1, 0]
    assert caller.process.pid != first
    assert "another takes its place" in caplog.text


def test_only_the_guilty_completion_of_a_batch_is_charged(pools: list[RewardPool]) -> None:
    """One that ends its process, in a batch that shares it."""
    caller = start(pools, PythonReward("tests.helpers.hostile.obey"))
    outcomes = ask(caller, "value = 1.0", "import os; os._exit(3)", "value = 2.0", "exit()", "value = 3.0")
    assert outcomes[1] == Failure("died", "exit code 3")
    assert isinstance(outcomes[3], Failure)
    assert outcomes[3].kind == "raised"
    assert [value(outcomes[place]) for place in (0, 2, 4)] == [1, 2, 3]


def test_no_attack_leaves_anything_where_the_machine_permits_nothing(
    pools: list[RewardPool], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cell_process, "BOOT", WEAK)
    caller = start(pools, PythonReward("tests.helpers.hostile.obey", runs_completions=True), memory_mib=256)
    programs = attacks(tmp_path / "file", 1, os.getpid())
    chosen = ("evaluate", "exit", "end the process", "allocate 50 GB", "fork", "leave a daemon", "leave files")
    outcomes = ask(caller, *(programs[name][0] for name in chosen), "value = 0.25", together=False)
    for name, outcome in zip(chosen, outcomes[:-1], strict=True):
        kinds = programs[name][1]
        assert outcome.kind in kinds if isinstance(outcome, Failure) else not kinds and value(outcome) == 0.5, name
    assert value(outcomes[-1]) == 0.25
    (line,) = [record.message for record in caplog.records if "does not permit" in record.message]
    assert "own network, own process ids, own IPC, read-only mounts, Landlock, another user" in line
    (tmp_path / "file").unlink(missing_ok=True)  # of the daemon, before it was ended
    assert caller.process is not None
    mine = {caller.process.pid} | children(caller.process.pid)
    pools[0].close()
    wait_until_gone(*mine)
    assert not os.path.exists(caller.folder)
    assert not (tmp_path / "file").exists()


TRAINER = """
import os, signal, sys
from dppo_lightning.reward import ExactMatch, Sample
from dppo_lightning.reward.pool import RewardPool
from dppo_lightning.reward.rewarding import Rewarding

signal.signal(signal.SIGINT, signal.SIG_IGN)
caller = RewardPool(ExactMatch(), Rewarding()).caller()
for line in sys.stdin:
    print(caller.score([[Sample("?", "7", "7")]], True)[0][0].value, caller.folder, flush=True)
"""


@pytest.fixture
def trainer() -> Iterator[subprocess.Popen[str]]:
    """A process with a worker, in a process group of its own as a shell would start it."""
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINER],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
        preexec_fn=take_signals,
    )
    with process:
        yield process
        process.kill()


def answer(trainer: subprocess.Popen[str]) -> list[str]:
    assert trainer.stdin is not None
    assert trainer.stdout is not None
    trainer.stdin.write("\n")
    trainer.stdin.flush()
    return trainer.stdout.readline().split()


def test_workers_end_with_a_trainer_that_is_killed(trainer: subprocess.Popen[str]) -> None:
    score, folder = answer(trainer)
    workers = children(trainer.pid)
    assert score == "1.0"
    assert len(workers) >= 2
    trainer.send_signal(signal.SIGKILL)
    wait_until_gone(*workers)
    assert not os.path.exists(folder)


def test_ctrl_c_does_not_reach_the_workers(trainer: subprocess.Popen[str]) -> None:
    answer(trainer)
    workers = children(trainer.pid)
    os.killpg(trainer.pid, signal.SIGINT)
    assert answer(trainer)[0] == "1.0"
    assert children(trainer.pid) == workers
    assert all(map(running, workers))


def test_the_end_waits_for_no_completion(pools: list[RewardPool]) -> None:
    caller = start(pools, PythonReward("tests.helpers.hostile.obey"))
    assert value(ask(caller, "value = 1.0")[0]) == 1
    assert caller.process is not None
    mine = {caller.process.pid} | children(caller.process.pid)
    errors: list[type] = []

    def hang() -> None:
        try:
            ask(caller, "while True: pass")
        except Closed as error:
            errors.append(type(error))

    thread = threading.Thread(target=hang)
    thread.start()
    pools[0].close()
    thread.join(PATIENCE)
    assert errors == [Closed]
    assert not any(map(running, mine))


def test_a_trainer_that_is_killed_while_a_worker_starts_leaves_nothing(tmp_path: Path) -> None:
    """Its worker is stopped in the middle of loading the reward."""
    (tmp_path / "slow_to_load.py").write_text("import time\ntime.sleep(600)\ndef f(samples): return [0.0]\n")
    program = TRAINER.replace("ExactMatch()", "Loads()").replace(
        "\nsignal.signal",
        "\nclass Loads(ExactMatch):\n    def __reduce__(self): return __import__, ('slow_to_load',)\nsignal.signal",
        1,
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdin=subprocess.PIPE, text=True
    ) as trainer:
        assert trainer.stdin is not None
        trainer.stdin.write("\n")
        trainer.stdin.flush()
        wait_until(lambda: len(children(trainer.pid)) >= 2)
        workers = children(trainer.pid)
        folders = {word for pid in workers for word in command_line(pid) if "dppo-reward-" in word}
        trainer.kill()
    wait_until_gone(*workers)
    assert folders
    assert not any(map(os.path.exists, folders))


class Slow(RewardFunction):
    """Asynchronous: waits a moment, and tells how many are waiting at that time."""

    def __init__(self) -> None:
        self.now = 0

    async def score(self, samples: Sequence[Sample]) -> list[Score]:
        self.now += 1
        (sample,) = samples
        most = self.now
        if sample.completion == "for ever":
            await asyncio.Event().wait()
        if sample.completion == "raise":
            raise ValueError("no")
        for _ in range(20):
            await asyncio.sleep(0)
            most = max(most, self.now)
        self.now -= 1
        return [Score(float(len(sample.completion)), {"most": float(most)})]


def test_an_asynchronous_reward_is_awaited_for_some_at_a_time() -> None:
    for settings in (Rewarding(concurrency=3, workers=1), Rewarding(concurrency=3, isolation="none")):
        pool = RewardPool(Slow(), settings)
        units = [[Sample("?", "x" * length)] for length in range(10)]
        outcomes = pool.caller().score(units, True)
        pool.close()
        scores = [one[0] for one in outcomes if not isinstance(one, Failure)]
        assert [score.value for score in scores] == list(range(10))
        assert max(score.parts["most"] for score in scores) == 3


@pytest.mark.parametrize("isolation", ["process", "none"])
def test_an_asynchronous_reward_that_fails_for_one_completion_scores_the_others(isolation: str) -> None:
    settings = Rewarding(timeout=3.0, isolation=isolation)  # type: ignore[arg-type]
    pool = RewardPool(WeightedSum([Slow(), ExactMatch()], [1.0, 10.0]), settings)
    texts = ("ab", "for ever", "abc", "raise")
    outcomes = pool.caller().score([[Sample("?", text, "abc")] for text in texts], True)
    pool.close()
    assert [value(outcomes[0]), value(outcomes[2])] == [2.0, 13.0]
    assert isinstance(outcomes[1], Failure)
    assert outcomes[1].kind == "timeout"
    assert isinstance(outcomes[3], Failure)
    assert "ValueError: no" in outcomes[3].detail


def test_json_that_a_scorer_writes_is_read_with_suspicion() -> None:
    for line in (
        b"",
        b"[]",
        b"{}",
        b'{"scores": 1}',
        b'{"scores": [[NaN, {}]]}',
        b'{"scores": [[1.0, {}], [1.0, {}]]}',
    ):
        outcome = cell_process.read_outcome(line, 1, ran=True)
        assert isinstance(outcome, Failure), line
        assert outcome.kind == "died"
    assert cell_process.read_outcome(json.dumps({"failed": ["odd", "x"]}).encode(), 1, ran=False) == Failure(
        "died", "x"
    )
    with pytest.raises(RewardError, match="wrong count"):
        cell_process.read_outcome(b'{"error": "wrong count"}', 1, ran=False)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"isolation": "some"}, "isolation must be one of process, none"),
        ({"workers": 0}, "workers must be >= 1"),
        ({"timeout": 0}, "timeout must be > 0"),
        ({"timeout": float("inf")}, "timeout must be > 0 and finite"),
        ({"memory_mib": 1}, "memory_mib must be >= 16"),
        ({"failure_value": float("nan")}, "failure_value must be finite"),
        ({"max_failed_share": 1.5}, r"max_failed_share must be in \[0, 1\]"),
        ({"concurrency": 0}, "concurrency must be >= 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.rewarding\.{reason}"):
        Rewarding(**settings)  # type: ignore[arg-type]
