"""What the README and docs/ say: every link exists, every command can be given, every metric is listed."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dppo_lightning.advantage import AdvantageEstimator
from dppo_lightning.generate import RolloutEngine
from dppo_lightning.prompts import PromptSource
from dppo_lightning.reward import RewardFunction, Sample
from dppo_lightning.run.cli import DPPOCommandLine, RecipeReader, main
from dppo_lightning.run.commands import export_parser, prepare_parser
from dppo_lightning.run.doctor.command import doctor_parser
from dppo_lightning.run.parsing import known_classes, underscored
from dppo_lightning.run.slurm.script import Job
from dppo_lightning.train.metrics import GLOSSARY
from tests.helpers.benchmarks import BENCHMARKS, shown_help
from tests.helpers.places import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MAKE_TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def commands() -> Iterator[tuple[str, str]]:
    """(page, command) of every line of a bash block; a line that ends with a backslash goes on."""
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip() and not line.startswith("#"):
                    yield str(page.relative_to(ROOT)), line.strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_exists(page: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize(("page", "command"), list(commands()))
def test_every_command_can_be_given(
    page: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    words = shlex.split(command.replace(".venv/bin/", ""), comments=True)
    if words[0] == "make":
        assert set(words[1:]) <= MAKE_TARGETS
    elif words[:2] == ["dppo", "prepare"]:
        assert prepare_parser().parse_args(words[2:]).name in ("tiny", "smollm2")
    elif words[:2] == ["dppo", "export"]:
        assert export_parser().parse_args(words[2:]).out
    elif words[:2] == ["dppo", "slurm"]:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr("dppo_lightning.run.commands.submit", submitted := Submitted())
        main(words[1:])
        assert submitted.job is not None
    elif words[:2] == ["dppo", "doctor"]:
        assert all((ROOT / path).is_file() for path in doctor_parser().parse_args(underscored(words[2:])).config)
    elif words[0] == "dppo":
        give(words[1:], monkeypatch, tmp_path)
    elif words[:3] == ["python", "-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words[3:] if not word.startswith("-"))
    else:
        assert words[0] == "python", command
        script = ROOT / words[1]
        if script.parent == BENCHMARKS:
            shown = shown_help(script.stem, monkeypatch, capsys)
        else:
            shown = subprocess.check_output([sys.executable, script, "--help"], text=True)
        for option in (word for word in words[2:] if word.startswith("--")):
            assert option.split("=")[0] in shown


class Submitted:
    """Stands in for submitting a job."""

    job: Job | None = None

    def __call__(self, job: Job, dry_run: bool) -> None:
        assert all((ROOT / path).is_file() for path in job.config)
        self.job = job


def give(arguments: list[str], monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Build everything that a ``dppo`` command builds, and stop where it would begin to work."""
    page = (ROOT / "docs" / "write-your-own.md").read_text()
    for name in ("my_regions.py", "my_parts.py"):
        (folder / name).write_text("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)))
    (folder / "configs").symlink_to(ROOT / "configs")
    if "--resume" in arguments or "--ckpt_path" in arguments:
        leave_a_run(folder / "runs" / "one")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(DPPOCommandLine, "_run_subcommand", lambda self, name: None)
    if arguments[1:] == ["--help"]:
        with pytest.raises(SystemExit) as exit_:
            DPPOCommandLine(arguments)
        assert exit_.value.code == 0
        return
    assert DPPOCommandLine(arguments).model is not None


def leave_a_run(folder: Path) -> None:
    """What a run of the quickstart, of forty steps, leaves to go on from; but for the weights."""
    (folder / "checkpoints").mkdir(parents=True)
    reader = RecipeReader(["fit", "--config", str(ROOT / "configs" / "quickstart.yaml")])
    (folder / "config.yaml").write_text(reader._parser("fit").dump(reader.config.fit, skip_none=False))
    (folder / "checkpoints" / "step=40.ckpt").touch()
    (folder / "checkpoints" / "step=40.json").write_text('{"format": 1, "step": 40, "logs": {}}')


def test_the_prompts_and_rewards_of_the_docs_can_be_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "prompts-and-rewards.md").read_text()
    (tmp_path / "my_rewards.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)))
    blocks = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    arguments = ["fit", "--config", "configs/quickstart.yaml"]
    for place, block in enumerate(blocks):
        (tmp_path / f"{place}.yaml").write_text(block)
        arguments += ["--config", f"{place}.yaml"]
    give(arguments, monkeypatch, tmp_path)
    for name in re.findall(r"`(dppo_lightning\.(?:prompts|rewards)\.\w+)`", page):
        module, _, kind = name.rpartition(".")
        assert hasattr(importlib.import_module(module), kind)


def test_every_metric_is_listed_with_its_meaning() -> None:
    rows = re.findall(
        r"^\| `([a-z_0-9]+/[a-z_0-9]+)` \| (.+) \|$", (ROOT / "docs" / "runs.md").read_text(), re.MULTILINE
    )
    assert dict(rows) == {name: meaning.replace("|", r"\|") for name, meaning in GLOSSARY.items()}
    assert [name for name, _ in rows] == list(GLOSSARY)


def test_the_picture_of_the_five_verbs_names_files_that_exist() -> None:
    (picture,) = re.findall(r"```text\n( prompts .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(picture.strip("\n").splitlines()) == 12
    for name in re.findall(r"[\w/]+\.py", picture):
        assert (ROOT / "dppo_lightning" / name).exists(), name


def test_the_parts_of_write_your_own_do_what_they_say() -> None:
    page = (ROOT / "docs" / "write-your-own.md").read_text()
    parts: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[-1], parts)
    samples = [Sample("", completion) for completion in ("ok", "far too long an answer")]
    assert [score.value for score in parts["Brief"](20)(samples)] == [1, 0]
    sets = parts["Sums"](4).load()
    assert (len(sets.train), len(sets.heldout)) == (6, 10)
    assert parts["SignOnly"]().estimate([np.array([0.0, 1.0, 0.5])])[0].tolist() == [-1, 1, 0]
    named = re.findall(r"`(dppo_lightning\.[\w.]+)\.(\w+)`", page)
    assert all(hasattr(importlib.import_module(module), kind) for module, kind in named if kind != "Brief")


def test_every_public_kind_has_a_row() -> None:
    pages = {page: (ROOT / "docs" / page).read_text() for page in ("prompts-and-rewards.md", "engine.md")}
    for base, page in (
        (PromptSource, "prompts-and-rewards.md"),
        (RewardFunction, "prompts-and-rewards.md"),
        (AdvantageEstimator, "prompts-and-rewards.md"),
        (RolloutEngine, "engine.md"),
    ):
        for name in known_classes(base):
            if name != "ScriptedEngine":  # of the tests
                assert re.search(rf"^\| `dppo_lightning\.\w+\.{name}`", pages[page], re.MULTILINE), name
