"""Bad input ends in one line that says what to change, exit code 2, no traceback, and nothing half-written."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.errors import printed_error
from tests.helpers.recipes import PROMPTS, changed, recipe, refused, run
from tests.helpers.run_files import write_jsonl

Config = dict[str, Any]
REWARDS = """
from dppo_lightning.reward import RewardFunction

def short(samples):
    return [0.0] * (len(samples) - 1)

def not_a_number(samples):
    return [float("nan")] * len(samples)

def fails(samples):
    raise KeyError("gold")

class Unfinished(RewardFunction):
    pass"""


@pytest.fixture
def config(tmp_path: Path, tiny_policy_dir: str) -> Config:
    return recipe(tmp_path, tiny_policy_dir)


def jsonl(folder: Path, text: str) -> dict[str, Any]:
    path = folder / "bad.jsonl"
    path.write_text(text)
    return {"data__prompts__init_args": {"train": str(path)}}


def reward(name: str) -> dict[str, Any]:
    return {"data__reward": {"class_path": "PythonReward", "init_args": {"function": name}}}


GOOD = json.dumps(PROMPTS[0]) + "\n"
CASES: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "missing data file": (
        lambda _: {"data__prompts__init_args": {"train": "nowhere/prompts.jsonl"}},
        r"nowhere/prompts\.jsonl.*No such file",
    ),
    "malformed line": (lambda folder: jsonl(folder, GOOD + "{'prompt': 1}\n"), r"bad\.jsonl.*2.*JSON"),
    "row that is no object": (lambda folder: jsonl(folder, GOOD + "[1, 2]\n"), r"bad\.jsonl.*2"),
    "row without a prompt": (lambda folder: jsonl(folder, GOOD * 2 + '{"answer": "4"}\n'), r"bad\.jsonl.*3.*prompt"),
    "empty data set": (lambda folder: jsonl(folder, ""), r"bad\.jsonl.*(no|empty)"),
    "every prompt too long": (
        lambda _: {"data__max_prompt_tokens": 2},
        r"too long.*limit is 2.*data\.max_prompt_tokens",
    ),
    "completion longer than the context": (lambda _: {"data__max_new_tokens": 512}, r"max_new_tokens=512.*512"),
    "unknown task": (
        lambda _: {"data__prompts": {"class_path": "ReasoningGymPrompts", "init_args": {"task": "spel_backward"}}},
        r"spel_backward.*spell_backward",
    ),
    "wrong parameter of a task": (
        lambda _: {
            "data__prompts": {
                "class_path": "ReasoningGymPrompts",
                "init_args": {"task": "spell_backward", "parameters": {"min_word_len": -3}},
            }
        },
        r"spell_backward.*min_word_len",
    ),
    "missing model folder": (
        lambda _: {"model__policy": "./no/such/model"},
        r"'\./no/such/model' does not exist.*prepare",
    ),
    "unknown model id": (lambda _: {"model__policy": "nobody-here/no-model"}, r"nobody-here/no-model"),
    "reward that does not import": (lambda _: reward("no_such_package.score"), r"no_such_package"),
    "reward that the module lacks": (lambda _: reward("json.no_such_function"), r"json.*no_such_function"),
    "reward with a wrong count": (lambda _: reward("bad_rewards.short"), r"returned \d+ rewards for \d+ completions"),
    "reward that is NaN": (lambda _: reward("bad_rewards.not_a_number"), r"nan.*finite"),
    "reward that raises": (lambda _: reward("bad_rewards.fails"), r"bad_rewards.fails.*KeyError.*gold"),
    "one sample with a group baseline": (lambda _: {"data__samples_per_prompt": 1}, r"GroupMean.*samples_per_prompt"),
    "top_p in training": (lambda _: {"data__top_p": 0.9}, r"top_p=0\.9.*biases every ratio.*set top_p to 1"),
    "top_k in training": (lambda _: {"data__top_k": 5}, r"top_k=5.*set top_k to 0"),
    "greedy training": (lambda _: {"data__temperature": 0.0}, r"temperature=0"),
    "threshold of zero": (
        lambda _: {"model__trust_region": {"class_path": "BinaryTV", "init_args": {"delta": 0.0}}},
        r"BinaryTV: delta must be > 0, got 0",
    ),
    "unknown region": (
        lambda _: {"model__trust_region": {"class_path": "BinaryTW"}},
        r"unknown trust region 'BinaryTW'; known: BandPO, BinaryKL, BinaryTV,",
    ),
    "region that its module lacks": (
        lambda _: {"model__trust_region": {"class_path": "bad_rewards.Region"}},
        r"trust region 'bad_rewards\.Region': module 'bad_rewards' has no attribute 'Region'$",
    ),
    "region without its module": (
        lambda _: {"model__trust_region": {"class_path": "no_such_module.Region"}},
        r"trust region 'no_such_module\.Region': No module named 'no_such_module'$",
    ),
    "unfinished reward": (
        lambda _: {"data__reward": {"class_path": "bad_rewards.Unfinished"}},
        r"reward 'bad_rewards\.Unfinished' is unfinished: write score$",
    ),
    "reward that is none": (
        lambda _: {"data__prompts": {"class_path": "bad_rewards.Unfinished"}},
        r"prompt source 'bad_rewards\.Unfinished' does not derive from PromptSource$",
    ),
    "unknown key": (lambda _: {"data__samples_per_promt": 4}, r"samples_per_promt.*samples_per_prompt"),
    "unknown argument of a region": (
        lambda _: {"model__trust_region": {"class_path": "BinaryTV", "init_args": {"epsilon": 0.2}}},
        r"epsilon",
    ),
    "value of a wrong type": (lambda _: {"data__prompts_per_step": "many"}, r"prompts_per_step.*many"),
    "no prompts a step": (lambda _: {"data__prompts_per_step": 0}, r"prompts_per_step must be >= 1"),
    "no number of steps": (lambda _: {"trainer__max_steps": -1}, r"trainer\.max_steps"),
    "constant length missing": (lambda _: {"model__aggregation": "seq-sum-constant"}, r"model\.constant_length"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_of_fit(
    name: str, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    change, pattern = CASES[name]
    line = refused(capsys, "fit", changed(config, **change(tmp_path)), tmp_path)
    assert re.search(pattern, line), line
    assert not (tmp_path / "run").exists()


def test_a_model_folder_without_tokenizer(
    config: Config, tmp_path: Path, tiny_policy_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(tiny_policy_dir, folder, ignore=shutil.ignore_patterns("tokenizer*", "special_tokens*"))
    line = refused(capsys, "fit", changed(config, model__policy=str(folder)), tmp_path)
    assert "no tokenizer in" in line
    assert not (tmp_path / "run").exists()


def test_vllm_that_is_not_installed(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else find_spec(name, *rest)
    )
    line = refused(capsys, "fit", changed(config, data__engine={"class_path": "VLLMEmbedded"}), tmp_path)
    assert "vLLM is not installed: pip install" in line
    assert not (tmp_path / "run").exists()


def test_a_directory_that_holds_a_run_is_refused_and_left_alone(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("fit", changed(config, trainer__max_steps=1), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert "already holds a run: go on with it by dppo fit --resume" in refused(capsys, "fit", config, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_a_prompt_that_is_too_long_is_dropped_and_counted(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    rows = [*PROMPTS[:12], {"prompt": "x" * 600}]
    prompts = {"train": write_jsonl(tmp_path / "long.jsonl", rows)}
    run("fit", changed(config, data__prompts__init_args=prompts, trainer__max_steps=1), tmp_path)
    assert "dropped prompts longer than 506 tokens: 1 for training" in caplog.text


def test_generate_refuses_an_output_that_exists(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("mine\n")
    line = refused(capsys, "generate", config, tmp_path, "--output", str(output))
    assert "exists already" in line
    assert output.read_text() == "mine\n"


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["prepare", "huge", "--out", "x"], "huge"),
        (["prepare", "tiny"], "out"),
        (["fit", "--config", "no_such_recipe.yaml"], "no_such_recipe.yaml"),
        (["fit", "--model.polcy", "x"], "model.policy"),
    ],
)
def test_a_wrong_command_line(arguments: list[str], pattern: str, capsys: pytest.CaptureFixture[str]) -> None:
    from dppo_lightning.run.cli import main

    assert pattern in printed_error(capsys, main, arguments)


def test_a_bug_is_not_dressed_up_as_a_mistake_of_the_user(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dppo_lightning.train.module import DPPOModule

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(DPPOModule, "configure_optimizers", broken)
    with pytest.raises(ZeroDivisionError):
        run("fit", config, tmp_path)
