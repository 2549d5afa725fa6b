"""``dppo fit``, ``validate``, ``test`` and ``generate``, whole, on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from dppo_lightning.run.cli import main
from dppo_lightning.train.metrics import GLOSSARY
from tests.helpers.recipes import PROMPTS, changed, recipe, run
from tests.helpers.run_files import read_jsonl, read_metrics, read_rows, write_jsonl
from tests.helpers.short_runs import shortened

Config = dict[str, Any]


@pytest.fixture
def config(tmp_path: Path, tiny_policy_dir: str) -> Config:
    return recipe(tmp_path, tiny_policy_dir)


@pytest.fixture(scope="module")
def finished(tiny_policy_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of the recipe as it is, after its two steps; to be read only."""
    folder = tmp_path_factory.mktemp("finished")
    run("fit", recipe(folder, tiny_policy_dir), folder)
    return folder / "run"


def test_a_run_records_what_it_did(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("fit", changed(config, data__steps_per_rollout=2), tmp_path, curves=True)
    folder = tmp_path / "run"
    completions = read_jsonl(folder / "completions.jsonl")
    assert len(completions) == 2 * 2 * 4
    for group in (completions[i : i + 4] for i in range(0, 16, 4)):
        assert len({row["prompt_id"] for row in group}) == 1
        rewards = [float(any(c.isdigit() for c in row["completion"])) for row in group]
        assert [row["reward"] for row in group] == rewards
        assert [row["advantage"] for row in group] == pytest.approx([r - sum(rewards) / 4 for r in rewards])
        assert all(row["versions"] == [0, 0] for row in group)
    assert [row["step"] for row in read_jsonl(folder / "heldout.jsonl")] == [0] * 4 + [2] * 4

    rows = read_rows(folder / "metrics.csv")
    names = set(rows[0]) - {"epoch", "step"}
    assert all(name in GLOSSARY or "/part/" in name or name.startswith("staleness/") for name in names)
    staleness = [float(row["train/staleness"]) for row in rows if row["train/staleness"]]
    assert staleness == [0, 1]
    assert len([row for row in rows if row["heldout/reward"]]) == 2

    (record,) = json.loads((folder / "run.json").read_text())["sessions"]
    assert record["trust_region"]["region"] == "BinaryTV"
    assert record["versions"]["torch"] == torch.__version__
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["samples_per_prompt"] == 4
    assert Image.open(folder / "curves.png").size[0] > 1000
    assert list((folder / "tensorboard").rglob("events.out.tfevents*"))
    assert list((folder / "checkpoints").glob("*.ckpt"))

    summary = capsys.readouterr().out.strip().splitlines()[-3:]
    assert summary[0].startswith("held out: reward ")
    assert "for 2 steps" in summary[1]
    assert str(folder) in summary[2]


def test_the_start_table_names_what_will_be_trained(config: Config, tmp_path: Path) -> None:
    run("fit", changed(config, trainer__max_steps=1), tmp_path)
    table = (tmp_path / "run" / "start.txt").read_text()
    numbers = ("prompts_per_step", "samples_per_prompt", "steps_per_rollout")
    for text in (
        "BinaryTV(delta=0.15",
        "rollout policy",
        "transformers on cpu",
        *numbers,
        "12 for training, 4 held out",
        "16 11 16 29 (4 in all)",  # 0+0= in the tokenizer's characters
        "'0+0='",
        "95 '<end>', from tokenizer",
    ):
        assert text in table, table


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_follows_every_update(config: Config, tmp_path: Path) -> None:
    engine = {"class_path": "VLLMEmbedded", "init_args": {"kv_cache_gib": 0.25}}
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}
    topk = {"class_path": "TopKTV", "init_args": {"k": 5}}
    run("fit", changed(config, data__engine=engine, model__optimizer=optimizer, model__trust_region=topk), tmp_path)
    errors = read_metrics(tmp_path / "run" / "metrics.csv")["sync/parity_error"]
    assert len(errors) == 2
    assert max(errors) < 1e-4  # nats, float32 on both sides; an engine without the update is off by 1e-2 and more
    versions = [row["versions"] for row in read_jsonl(tmp_path / "run" / "completions.jsonl")]
    assert versions == [[0, 0]] * 8 + [[1, 1]] * 8
    assert "vLLM" in (tmp_path / "run" / "start.txt").read_text()


def test_the_same_seed_trains_the_same_and_another_does_not(config: Config, tmp_path: Path) -> None:
    logs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("fit", changed(config, run_dir=str(tmp_path / name), seed_everything=seed), tmp_path)
        logs.append((tmp_path / name / "completions.jsonl").read_text())
    assert logs[0] == logs[1]
    assert logs[0] != logs[2]


def test_several_configs_combine_and_the_last_one_wins(config: Config, tmp_path: Path) -> None:
    more = tmp_path / "more.yaml"
    more.write_text(yaml.safe_dump({"model": {"trust_region": {"class_path": "PPOClip"}}, "trainer": {"max_steps": 1}}))
    run("fit", config, tmp_path, "--config", str(more))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["sessions"][0]["trust_region"]["region"] == "PPOClip"
    assert {row["step"] for row in read_jsonl(tmp_path / "run" / "heldout.jsonl")} == {0, 1}


def test_a_region_of_the_users_own_trains(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_regions.py").write_text(
        "from dppo_lightning.trust_region import DivergenceMask\n\n\n"
        "class HellingerMask(DivergenceMask):\n"
        "    def divergence(self, tokens):\n"
        "        p, q = tokens.logp.exp(), tokens.rollout_logp.exp()\n"
        "        return 1 - (p * q).sqrt() - ((1 - p) * (1 - q)).sqrt()\n"
    )
    monkeypatch.chdir(tmp_path)
    region = {"class_path": "my_regions.HellingerMask", "init_args": {"delta": 0.02}}
    run("fit", changed(config, model__trust_region=region), tmp_path)
    assert "HellingerMask(delta=0.02" in (tmp_path / "run" / "start.txt").read_text()
    assert len(read_jsonl(tmp_path / "run" / "completions.jsonl")) == 16


def test_training_goes_on_from_a_checkpoint(finished: Path, config: Config, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    longer = changed(config, trainer__max_steps=3)
    with shortened():
        main(["fit", "--resume", str(tmp_path / "run"), "--trainer.max_steps", "3"])
    rows = read_jsonl(tmp_path / "run" / "completions.jsonl")
    assert [row["step"] for row in rows] == [0] * 8 + [1] * 8 + [2] * 8
    whole = tmp_path / "whole"
    whole.mkdir()
    run("fit", changed(longer, run_dir=str(whole / "run")), whole)
    assert read_jsonl(whole / "run" / "completions.jsonl") == rows


@pytest.mark.parametrize("command", ["validate", "test"])
def test_a_checkpoint_is_evaluated(
    command: str, finished: Path, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    after = [row["completion"] for row in read_jsonl(finished / "heldout.jsonl") if row["step"] == 2]
    checkpoint = finished / "checkpoints" / "last.ckpt"
    run(command, changed(config, run_dir=str(tmp_path / "other")), tmp_path, "--ckpt_path", str(checkpoint))
    again = [row["completion"] for row in read_jsonl(tmp_path / "other" / "heldout.jsonl")]
    assert again == after
    assert "heldout/reward" in capsys.readouterr().out


def test_generate_writes_completions_with_scores(config: Config, tmp_path: Path) -> None:
    prompts = write_jsonl(tmp_path / "asked.jsonl", PROMPTS[:3])
    output = tmp_path / "out" / "completions.jsonl"
    run("generate", config, tmp_path, "--output", str(output), "--prompts", prompts, "--samples", "2")
    rows = read_jsonl(output)
    assert [row["prompt"] for row in rows] == [PROMPTS[i]["prompt"] for i in (0, 0, 1, 1, 2, 2)]
    for row in rows:
        assert row["reward"] == float(any(c.isdigit() for c in row["completion"]))
        assert 1 <= row["tokens"] <= 6
    assert not (tmp_path / "run").exists()


def test_a_trace_and_the_utilisation_are_in_the_run_directory(config: Config, tmp_path: Path) -> None:
    run("fit", changed(config, trainer__max_steps=3), tmp_path, "--profile", "1")
    assert json.loads((tmp_path / "run" / "profile.json").read_text())["traceEvents"]
    shares = read_metrics(tmp_path / "run" / "metrics.csv")["perf/flops_utilisation"]
    assert len(shares) == 3
    assert all(0 < share < 1 for share in shares)
