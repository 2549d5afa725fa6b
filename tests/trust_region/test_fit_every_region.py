"""``dppo fit`` with every region, by configuration alone, on the CPU."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dppo_lightning.train.scoring import Scorer
from tests.helpers.errors import printed_error
from tests.helpers.recipes import run
from tests.helpers.run_files import read_jsonl, read_rows, write_jsonl
from tests.trust_region.cases import DEFAULTS, Case

PROMPTS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(3) for b in range(3)]
# a small learning rate would leave every mask at rest: two steps on one rollout, and the second meets a moved policy
OPTIMIZER = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.02}}
PACKAGE = "dppo_lightning.trust_region."


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model is slower on several threads, by far where they share a core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def configuration(case: Case) -> dict[str, Any]:
    """The region as a user writes it."""
    name = type(case.region).__name__
    arguments: dict[str, Any] = {}
    if name == "VACO":
        arguments = {"delta": 0.1}
    if name == "Combined":
        arguments = {"masks": [{"class_path": PACKAGE + "IcePop"}, {"class_path": PACKAGE + "BinaryTV"}]}
    return {"class_path": PACKAGE + name, "init_args": arguments}


def fit(folder: Path, policy: str, region: dict[str, Any], **model: Any) -> Path:
    """Three optimizer steps; the run directory."""
    folder.mkdir()
    prompts = write_jsonl(folder / "prompts.jsonl", PROMPTS)
    config = {
        "run_dir": str(folder / "run"),
        "trainer": {
            "max_steps": 3,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "accumulate_grad_batches": 2,
        },
        "model": {"policy": policy, "trust_region": region, "optimizer": OPTIMIZER, **model},
        "data": {
            "prompts": {"class_path": "JsonlPrompts", "init_args": {"train": prompts}},
            "reward": {"class_path": "RegexMatch", "init_args": {"pattern": "[0-9]"}},
            "engine": {"class_path": "TransformersEngine"},
            "prompts_per_step": 2,
            "samples_per_prompt": 3,
            "steps_per_rollout": 2,
            "max_new_tokens": 5,
        },
    }
    run("fit", config, folder)
    return folder / "run"


def start_rows(run: Path) -> dict[str, str]:
    """The start table's rows; a value that was wrapped is joined again, without its spaces."""
    rows: dict[str, str] = {}
    name = ""
    for line in (run / "start.txt").read_text().splitlines():
        cells = [cell.strip() for cell in re.split("[│|]", line)[1:-1]]
        if len(cells) == 2:
            name = cells[0] or name
            rows[name] = rows.get(name, "") + cells[1].replace(" ", "")
    return rows


def steps(run: Path) -> list[dict[str, float]]:
    """The logged values of each optimizer step."""
    rows = [{n: float(value) for n, value in row.items() if value} for row in read_rows(run / "metrics.csv")]
    return [row for row in rows if "train/loss" in row]


@pytest.mark.parametrize("case", DEFAULTS, ids=lambda case: type(case.region).__name__)
def test_every_region_trains_by_configuration_and_the_start_table_names_it(
    case: Case, tmp_path: Path, tiny_policy_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember, passes = Scorer.remember, []
    monkeypatch.setattr(Scorer, "remember", lambda *arguments: (passes.append(arguments), remember(*arguments))[1])
    name = type(case.region).__name__
    run = fit(tmp_path / name, tiny_policy_dir, configuration(case))
    table, described = start_rows(run), case.region.describe()
    thresholds = {key: value for key, value in described.items() if key not in ("region", "anchor")}
    expected = ",".join(f"{key}={value.replace(' ', '')}" for key, value in thresholds.items())
    assert table["trust region"] == f"{name}({expected})"
    assert table["anchor"] == f"{described['anchor']} policy".replace(" ", "")
    assert json.loads((run / "run.json").read_text())["sessions"][0]["trust_region"] == described

    logged = steps(run)
    assert [row["train/staleness"] for row in logged] == [0, 1, 0]
    assert (len(passes) > 0) == bool(case.region.needs & {"recomputed_logp", "full"})
    assert ["time/choose" in row for row in logged] == ["chosen" in case.region.needs] * 3
    audit = read_jsonl(run / "mask_audit.jsonl")
    assert [line["step"] for line in audit] == [0, 1, 2]
    for line, row in zip(audit, logged, strict=True):
        assert line["totals"]["tokens"] == row["train/tokens"]
        assert line["totals"]["stopped_share"] == pytest.approx(row["train/masked_share"])
    assert (run / "mask_audit.txt").is_file()
    if name in ("PPOClip", "BinaryTV"):
        assert logged[1]["train/masked_share"] > 0  # the policy does move so far that a region has work


@pytest.mark.parametrize("region", ["SequenceMask", "TopKKL", "FullTV"])
def test_diagnostics_are_logged_beside_any_region_and_in_order(
    region: str, tmp_path: Path, tiny_policy_dir: str
) -> None:
    run = fit(tmp_path / region, tiny_policy_dir, {"class_path": PACKAGE + region}, divergence_diagnostics=True)
    fresh, stale, _ = steps(run)
    for kind in ("tv", "kl"):
        binary, topk, full = (stale[f"diagnostics/{name}_{kind}"] for name in ("binary", "topk", "full"))
        assert 1e-4 < binary <= topk <= full
        assert fresh[f"diagnostics/full_{kind}"] < 1e-5
    assert stale["diagnostics/binary_tv"] == pytest.approx(stale["train/mismatch_tv"], rel=1e-4)
    if region == "FullTV":
        assert stale["diagnostics/full_tv"] == pytest.approx(stale["train/divergence"])


def test_an_anchor_that_the_method_does_not_have_ends_in_one_line(
    tmp_path: Path, tiny_policy_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for region in ("IcePop", "TopKTV"):
        config = {"class_path": PACKAGE + region, "init_args": {"anchor": "recomputed"}}
        line = printed_error(capsys, fit, tmp_path / region, tiny_policy_dir, config)
        assert "anchor" in line
