from pathlib import Path
from typing import Any

import pytest

from dppo_lightning.base.errors import ConfigError, RewardError
from dppo_lightning.reward import PythonReward, Sample, Score

SAMPLES = [Sample("question", "one"), Sample("question", "three")]

MODULE = """
from dppo_lightning.reward import Score

TABLE = {}

def length(samples, scale=1.0):
    return [scale * len(sample.completion) for sample in samples]

def scored(samples):
    return (Score(1.0, {"part": 0.5}) for sample in samples)

def failing(samples):
    return [1 / len(sample.prompt.replace("question", "")) for sample in samples]

def failing_late(samples):
    for sample in samples:
        yield sample.nothing

def nothing(samples):
    pass

def short(samples):
    return [1.0]

class Judge:
    @staticmethod
    def one(samples):
        return [1.0] * len(samples)
"""


@pytest.fixture(autouse=True)
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_rewards.py").write_text(MODULE)
    (tmp_path / "users_broken.py").write_text("def length(samples:\n")
    (tmp_path / "users_unmet.py").write_text("import users_missing\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("path", ["users_rewards.length", "users_rewards:length"])
def test_the_named_function_is_called_with_its_arguments(path: str):
    assert PythonReward(path)(SAMPLES) == [Score(3), Score(5)]
    assert PythonReward(path, {"scale": 2.0})(SAMPLES) == [Score(6), Score(10)]


def test_scores_and_generators_are_fine():
    assert PythonReward("users_rewards:scored")(SAMPLES) == [Score(1, {"part": 0.5})] * 2


def test_a_method_is_reached_after_a_colon():
    assert PythonReward("users_rewards:Judge.one")(SAMPLES) == [Score(1)] * 2


@pytest.mark.parametrize(
    ("path", "arguments", "reason"),
    [
        ("length", None, "is no import path"),
        ("", None, "is no import path"),
        ("users_rewards:", None, "is no import path"),
        (".users_rewards.length", None, "is no import path"),
        ("users_nowhere.length", None, "No module named 'users_nowhere': run from the folder that holds it"),
        ("users_unmet.length", None, "No module named 'users_missing'"),
        ("users_broken.length", None, "users_broken raised SyntaxError"),
        ("users_rewards.width", None, "users_rewards has no 'width'"),
        ("users_rewards.TABLE", None, "is a dict, not a function"),
        ("users_rewards.length", {"size": 1}, "cannot be called with the samples and .*'size'"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused_in_one_line(path: str, arguments: dict[str, Any], reason: str):
    with pytest.raises(ConfigError, match=reason) as error:
        PythonReward(path, arguments)
    assert repr(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [("nothing", "users_rewards.nothing returned a NoneType"), ("short", "1 rewards for 2 completions")],
)
def test_a_wrong_result_is_an_error(name: str, message: str):
    with pytest.raises(RewardError, match=message):
        PythonReward(f"users_rewards.{name}")(SAMPLES)
