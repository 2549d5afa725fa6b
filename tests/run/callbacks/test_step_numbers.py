"""One number for one step: what the files of a run say of it agrees."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dppo_lightning.base.records import Group
from dppo_lightning.run.callbacks.heldout import HeldOutEvaluation
from dppo_lightning.run.callbacks.mask_audit import MaskAudit
from dppo_lightning.run.callbacks.record import CompletionLog, TimelineLog, read_timeline
from dppo_lightning.run.metrics_file import MetricsFile
from tests.helpers.run_files import read_jsonl, read_rows
from tests.helpers.runs import QUIET, Letters, Record, build

STEPS, EVALUATED, MICRO_BATCHES = 5, [0, 2, 4, 5], 3
ROLLOUTS = {0: 0, 1: 0, 2: 2, 3: 2, 4: 4}  # step -> first step of its rollout


class Files:
    """What the files of a run directory say."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def lines(self, name: str) -> list[dict[str, Any]]:
        return read_jsonl(self.folder / name)

    def metric(self, name: str) -> dict[int, float]:
        rows = read_rows(self.folder / "metrics.csv")
        found = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
        assert len(dict(found)) == len(found)
        return dict(found)

    def tensorboard(self, name: str) -> dict[int, float]:
        events = EventAccumulator(str(self.folder / "tensorboard"))
        events.Reload()
        return {event.step: event.value for event in events.Scalars(name)}

    def spans(self, lane: str) -> list[int]:
        return [e["args"]["step"] for e in read_timeline(self.folder / "timeline.json") if e["name"] == lane]


def loggers(folder: Path) -> list[Any]:
    return [MetricsFile(folder), TensorBoardLogger(folder, name="tensorboard", version="")]


@pytest.fixture(scope="module")
def run(tiny_policy_dir: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Files, list[list[Group]]]:
    """Two steps a rollout, three micro-batches a step, an evaluation every second step and at the end."""
    folder, record = tmp_path_factory.mktemp("run"), Record()
    data = {"prompts": Letters(6, heldout=2), "steps_per_rollout": 2, "evaluate_every_n_steps": 2}
    module, source = build(tiny_policy_dir, data=data)
    callbacks = [HeldOutEvaluation(), CompletionLog(), MaskAudit(), TimelineLog(), record]
    settings = QUIET | {
        "logger": loggers(folder),
        "default_root_dir": folder,
        "max_steps": STEPS,
        "accumulate_grad_batches": MICRO_BATCHES,
    }
    trainer = pl.Trainer(callbacks=callbacks, **settings)
    trainer.fit(module, datamodule=source)
    trainer.save_checkpoint(folder / "end.ckpt")
    return Files(folder), record.rollouts


def test_an_evaluation_counts_the_steps_taken_before_it(run: tuple[Files, Any]) -> None:
    files, _ = run
    assert list(files.metric("heldout/reward")) == EVALUATED
    assert list(files.tensorboard("heldout/reward")) == EVALUATED
    assert list(Counter(line["step"] for line in files.lines("heldout.jsonl"))) == EVALUATED
    assert files.spans("evaluate") == EVALUATED
    for line in files.lines("heldout.jsonl"):  # as many steps made the weights that answered
        assert set(line["versions"]) == {line["step"]}


def test_the_reward_of_an_evaluation_is_that_of_its_completions(run: tuple[Files, Any]) -> None:
    files, _ = run
    logged = files.metric("heldout/reward")
    for step in EVALUATED:
        rewards = [line["reward"] for line in files.lines("heldout.jsonl") if line["step"] == step]
        assert logged[step] == pytest.approx(sum(rewards) / len(rewards))
        assert files.tensorboard("heldout/reward")[step] == pytest.approx(logged[step])


def test_every_file_counts_a_step_by_those_before_it(run: tuple[Files, Any]) -> None:
    files, _ = run
    every = list(range(STEPS))
    assert list(files.metric("train/loss")) == list(files.tensorboard("train/loss")) == every
    assert [line["step"] for line in files.lines("mask_audit.jsonl")] == every
    assert list(Counter(line["step"] for line in files.lines("completions.jsonl"))) == every
    assert files.spans("train") == [step for step in every for _ in range(MICRO_BATCHES)]
    assert files.spans("sync") == sorted({0, *ROLLOUTS.values(), STEPS})
    assert files.spans("wait") == sorted(set(ROLLOUTS.values()))


def test_a_completion_has_the_step_that_trains_on_it(run: tuple[Files, list[list[Group]]]) -> None:
    files, rollouts = run
    tokens, rewards = Counter[int](), Counter[int]()
    for line in files.lines("completions.jsonl"):
        tokens[line["step"]] += line["tokens"]
        rewards[line["step"]] += line["reward"]
        assert set(line["versions"]) == {ROLLOUTS[line["step"]]}
    assert tokens == files.metric("train/tokens")
    completions = Counter(group.step for groups in rollouts for group in groups for _ in group.completions)
    for step, reward in files.metric("train/reward").items():
        assert rewards[step] / completions[step] == pytest.approx(reward)


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_an_evaluation_of_a_checkpoint_counts_the_steps_that_made_it(
    verb: str, run: tuple[Files, Any], tiny_policy_dir: str, tmp_path: Path
) -> None:
    module, source = build(tiny_policy_dir, data={"prompts": Letters(6, heldout=2)})
    settings = QUIET | {"logger": loggers(tmp_path), "default_root_dir": tmp_path}
    trainer = pl.Trainer(callbacks=[CompletionLog()], **settings)
    evaluate = getattr(trainer, verb)
    evaluate(module, datamodule=source, ckpt_path=run[0].folder / "end.ckpt", verbose=False)
    files = Files(tmp_path)
    assert list(files.metric("heldout/reward")) == list(files.tensorboard("heldout/reward")) == [STEPS]
    assert {(line["step"], *line["versions"]) for line in files.lines("heldout.jsonl")} == {(STEPS, STEPS, STEPS)}


def test_a_sanity_check_is_no_evaluation(tiny_policy_dir: str, tmp_path: Path) -> None:
    module, source = build(tiny_policy_dir, data={"prompts": Letters(6, heldout=2)})
    settings = QUIET | {"num_sanity_val_steps": 1, "max_steps": 1, "default_root_dir": tmp_path}
    pl.Trainer(callbacks=[CompletionLog()], **settings).fit(module, datamodule=source)
    assert {line["step"] for line in Files(tmp_path).lines("heldout.jsonl")} == {1}
