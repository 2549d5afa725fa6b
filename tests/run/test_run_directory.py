"""The owner of a run on disk: claimed once, whole after every fault, cut back to its checkpoint."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dppo_lightning.base.errors import ConfigError, DataError
from dppo_lightning.run.checkpoint_files import CheckpointFiles
from dppo_lightning.run.cli import main
from dppo_lightning.run.metrics_file import MetricsFile, cut_rows, read_rows
from dppo_lightning.run.run_directory import BEST, LAST, RunDirectory, new_run_dir
from dppo_lightning.run.whole_files import replace, reporting, write_text
from tests.helpers.errors import printed_error
from tests.helpers.killing import in_a_process
from tests.helpers.recipes import changed, recipe, refused, run
from tests.helpers.short_runs import shortened

Config = dict[str, Any]


@pytest.fixture(scope="module")
def finished(tiny_policy_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of two steps, whose recipe is beside it; to be read only."""
    folder = tmp_path_factory.mktemp("finished")
    run("fit", recipe(folder, tiny_policy_dir), folder, "--checkpoint.every_n_steps", "1", "--checkpoint.keep", "2")
    return folder


@pytest.fixture
def mine(finished: Path, tmp_path: Path) -> RunDirectory:
    """A copy of that run."""
    shutil.copytree(finished / "run", tmp_path / "run", symlinks=True)
    return RunDirectory(tmp_path / "run")


def _claim_and_die(path: str) -> None:
    RunDirectory(path).claim()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_directory_is_claimed_once_and_a_dead_process_holds_nothing(tmp_path: Path) -> None:
    process = multiprocessing.get_context("forkserver").Process(target=_claim_and_die, args=(str(tmp_path),))
    process.start()
    process.join()
    assert process.exitcode == -9
    first, second = RunDirectory(tmp_path), RunDirectory(tmp_path)
    first.claim()
    with pytest.raises(ConfigError, match="another process is training in"):
        second.claim()
    first.release()
    second.claim()
    second.release()


def test_new_directories_never_share_a_name(tmp_path: Path) -> None:
    assert len({new_run_dir(tmp_path).path for _ in range(20)}) == 20


def test_two_runs_started_at_once_in_one_place(tiny_policy_dir: str, tmp_path: Path) -> None:
    """Without a name each gets a directory; with one name the second is refused, whoever is first."""
    config = recipe(tmp_path, tiny_policy_dir)
    del config["run_dir"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
    words = ["fit", "--config", "recipe.yaml", "--trainer.max_steps=1"]
    assert [in_a_process(words, tmp_path) for _ in range(2)] == [0, 0]
    assert len(list((tmp_path / "runs").iterdir())) == 2
    held = RunDirectory(tmp_path / "one")
    held.claim()
    assert in_a_process([*words, "--run_dir=one"], tmp_path) == 2
    held.release()
    assert [path.name for path in (tmp_path / "one").iterdir()] == [".lock"]


def test_a_directory_that_holds_a_run_is_refused_with_the_command_that_goes_on(
    mine: RunDirectory, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = changed(yaml.safe_load((finished / "recipe.yaml").read_text()), run_dir=str(mine.path))
    before = {path: path.read_bytes() for path in mine.path.rglob("*") if path.is_file()}
    line = refused(capsys, "fit", config, tmp_path)
    assert f"already holds a run: go on with it by dppo fit --resume {mine.path}" in line
    assert {path: path.read_bytes() for path in before} == before


def test_checkpoints_are_found_by_name(mine: RunDirectory) -> None:
    assert mine.resolve("last") == mine.resolve("step=2") == mine.checkpoint_of(2).resolve()
    assert mine.resolve(str(mine.checkpoint_of(1))) == mine.checkpoint_of(1)
    for name in ("best", "nope.ckpt", ""):
        with pytest.raises(ConfigError, match=r"there are last.ckpt, step=1.ckpt, step=2.ckpt; name one of them"):
            mine.resolve(name)
    with pytest.raises(ConfigError, match=r"no checkpoint 'last' in .*: it has none"):
        RunDirectory(mine.path / "nowhere").resolve("last")


def test_a_link_that_leads_nowhere_is_no_last_checkpoint(mine: RunDirectory) -> None:
    mine.checkpoint_of(2).unlink()
    assert mine.newest() == mine.checkpoint_of(1)


def test_logs_are_cut_back_and_later_checkpoints_removed(mine: RunDirectory) -> None:
    lines = (mine.path / "completions.jsonl").read_text().splitlines(keepends=True)
    with (mine.path / "completions.jsonl").open("a") as file:
        file.write('{"step": 9, "torn')
    (mine.path / "notes.jsonl").write_text("of a later time\n")
    mine.cut_back(mine.checkpoint_of(1))
    assert (mine.path / "completions.jsonl").read_text() == "".join(lines[:8])
    assert [row["step"] for row in read_rows(mine.path / "metrics.csv")] == ["0", "0"]
    assert not (mine.path / "notes.jsonl").exists()
    assert not mine.checkpoint_of(2).exists()
    assert not (mine.checkpoints / LAST).is_symlink()


def test_a_run_that_is_killed_twice_before_its_first_checkpoint_is_gone_on_with_once_more(
    mine: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second time even before it has written its settings; and a session that fails leaves them, too."""
    shutil.rmtree(mine.checkpoints)
    assert mine.set_aside() == mine.path / "before" / "0"
    words = ["fit", "--resume", str(mine.path), "--trainer.max_steps=1"]
    printed_error(capsys, main, [*words, "--data.engine=TransformersEngine", "--data.engine.device=none"])
    with shortened():
        main(words)
    assert mine.newest() == mine.checkpoint_of(1)


def test_a_log_that_has_lost_lines_is_not_gone_on_from(mine: RunDirectory) -> None:
    (mine.path / "heldout.jsonl").write_text("")
    with pytest.raises(DataError, match=r"heldout.jsonl has lost lines since step=2.ckpt was written: it has 0 bytes"):
        mine.cut_back(mine.newest())


def test_pruning_keeps_the_newest_and_what_is_pointed_to(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.checkpoints.mkdir()
    for step in (2, 10, 4, 8):
        directory.checkpoint_of(step).mkdir()
        (directory.checkpoint_of(step) / "shard").touch()
    directory.point(LAST, directory.checkpoint_of(10))
    directory.point(BEST, directory.checkpoint_of(4))
    directory.prune(2)
    assert sorted(path.name for path in directory.checkpoints.iterdir()) == [
        BEST,
        LAST,
        "step=10.ckpt",
        "step=4.ckpt",
        "step=8.ckpt",
    ]


@pytest.mark.parametrize("folder", [False, True])
def test_a_replaced_file_or_folder_is_whole(folder: bool, tmp_path: Path) -> None:
    old, new = tmp_path / "name", tmp_path / "new"
    for path, text in ((old, "old"), (new, "new")):
        if folder:
            path.mkdir()
        (path / "shard" if folder else path).write_text(text)
    replace(new, old)
    assert (old / "shard" if folder else old).read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["name"]


def test_what_fails_half_way_leaves_what_was_there(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "before")

    def fail() -> None:
        with reporting(tmp_path / "file"):
            (tmp_path / ".unfinished-file").write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"file could not be written \(.*No space left"):
        fail()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "before")]


def test_metrics_are_appended_and_a_new_column_loses_no_row(tmp_path: Path) -> None:
    first = MetricsFile(tmp_path)
    first.log_metrics({"a": 1.0}, step=0)
    first.log_metrics({"a": 2.0, "epoch": 0.0}, step=1)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("2,")  # torn by a kill
    second = MetricsFile(tmp_path)
    second.log_metrics({"b": 0.1}, step=2)
    assert second.rows == 3
    assert read_rows(tmp_path / "metrics.csv") == [
        {"step": "0", "a": "1.0", "b": ""},
        {"step": "1", "a": "2.0", "b": ""},
        {"step": "2", "a": "", "b": "0.1"},
    ]
    cut_rows(tmp_path / "metrics.csv", 1)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.csv")] == ["0"]
    cut_rows(tmp_path / "metrics.csv", 0)
    assert not (tmp_path / "metrics.csv").exists()


def test_a_state_that_could_not_be_loaded_again_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a state_dict of yours must hold plain values and tensors only"):
        CheckpointFiles().save_checkpoint({"state": Path("of a class")}, tmp_path / "x.ckpt")


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, ("canary", "w")


def test_a_checkpoint_never_runs_code(
    mine: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "bomb": Bomb()}, mine.checkpoint_of(2))
    line = printed_error(capsys, main, ["fit", "--resume", str(mine.path), "--trainer.max_steps=3"])
    assert "step=2.ckpt cannot be read" in line
    assert not (tmp_path / "canary").exists()


def test_a_truncated_checkpoint_is_one_line_and_nothing_is_overwritten(
    mine: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = mine.checkpoint_of(2).read_bytes()
    mine.checkpoint_of(2).write_bytes(whole[: len(whole) // 2])
    line = printed_error(capsys, main, ["fit", "--resume", str(mine.path), "--trainer.max_steps=3"])
    assert "step=2.ckpt cannot be read" in line
    assert mine.checkpoint_of(1).exists()
    assert len((mine.path / "completions.jsonl").read_text().splitlines()) == 16


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--model.trust_region=PPOClip"],
            "model.trust_region.class_path is 'dppo_lightning.trust_region.PPOClip'",
        ),
        (["--seed_everything=5"], "seed_everything is 5 and was 0"),
        (["--data.samples_per_prompt=2"], "data.samples_per_prompt is 2 and was 4: a run cannot change it"),
        (["--trainer.max_steps=1"], "step=2.ckpt has 2 optimizer steps and trainer.max_steps=1: raise it"),
        (["--run_dir=elsewhere"], "--resume names the run directory: leave --run_dir out"),
        (
            ["--ckpt_path=step=1"],
            "the run has gone on to step=2.ckpt: to go on from step=1.ckpt, in a directory",
        ),
    ],
)
def test_what_may_not_change_is_refused(
    words: list[str], says: str, mine: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in mine.path.rglob("*") if path.is_file()}
    assert says in printed_error(capsys, main, ["fit", "--resume", str(mine.path), *words])
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model__trust_region": "PPOClip"}, "is of a run with model.trust_region="),
        ({"seed_everything": 3}, "is of a run with data.seed=0, and this one has 3"),
        ({"data__steps_per_rollout": 2}, "is of a run with data.steps_per_rollout=1, and this one has 2"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    changes: dict[str, Any],
    says: str,
    mine: RunDirectory,
    tiny_policy_dir: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = changed(recipe(tmp_path, tiny_policy_dir), run_dir=str(tmp_path / "new"), trainer__max_steps=3, **changes)
    assert says in refused(capsys, "fit", config, tmp_path, "--ckpt_path", str(mine.checkpoint_of(2)))
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_of_a_newer_version_is_refused(mine: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    note = mine.checkpoint_of(2).with_suffix(".json")
    note.write_text(note.read_text().replace('"format": 1', '"format": 7'))
    line = printed_error(capsys, main, ["fit", "--resume", str(mine.path), "--trainer.max_steps=3"])
    assert "step=2.ckpt has format 7 and this version reads 1: install a newer dppo-lightning" in line


def test_a_new_learning_rate_is_applied_and_said(mine: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    optimizer = ["--model.optimizer=AdamW", "--model.optimizer.lr=0.25"]
    with shortened():
        main(["fit", "--resume", str(mine.path), "--trainer.max_steps=3", *optimizer])
    said = capsys.readouterr().out
    assert "changed: trainer.max_steps: 2 -> 3" in said
    rates = [row["train/learning_rate"] for row in read_rows(mine.path / "metrics.csv") if row["train/learning_rate"]]
    assert rates[-1] == "0.25"
    assert float(rates[0]) < 0.25


def _fit_without_room(arguments: list[str], limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with shortened():
        main(arguments)


def test_a_full_disk_is_one_line_and_the_checkpoint_before_is_gone_on_from(
    mine: RunDirectory, capfd: pytest.CaptureFixture[str]
) -> None:
    """No file may become as large as a checkpoint is."""
    words = ["fit", "--resume", str(mine.path), "--trainer.max_steps=4"]
    size = mine.checkpoint_of(2).stat().st_size
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_fit_without_room, args=(words, size // 2))
    process.start()
    process.join()
    assert process.exitcode == 2
    with shortened():
        main(words)
    assert mine.newest() == mine.checkpoint_of(4)
    rows = [row["step"] for row in read_rows(mine.path / "metrics.csv") if row["train/reward"]]
    assert rows == ["0", "1", "2", "3"]


def test_an_evaluation_leaves_the_run_alone_and_says_when_there_is_nothing_to_evaluate(
    mine: RunDirectory, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((finished / "recipe.yaml").read_text()) | {"run_dir": str(mine.path)}
    before = {path: path.read_bytes() for path in mine.path.rglob("*") if path.is_file()}
    run("validate", config, tmp_path, "--ckpt_path", "last")
    assert {path: path.read_bytes() for path in before} == before
    (folder,) = (mine.path / "evaluations").iterdir()
    assert [row["step"] for row in read_rows(folder / "metrics.csv")] == ["2"]
    assert "no checkpoint 'best'" in refused(capsys, "validate", config, tmp_path, "--ckpt_path", "best")
    config = {name: value for name, value in config.items() if name != "run_dir"}
    assert "needs the run: set --run_dir" in refused(capsys, "validate", config, tmp_path, "--ckpt_path", "last")
