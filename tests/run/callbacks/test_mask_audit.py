"""The masked-token audit against counting by hand."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.run.callbacks.mask_audit import MaskAudit, Tally
from dppo_lightning.train.module import DPPOModule
from tests.helpers.run_files import read_jsonl

VOCABULARY = 11


class Words:
    """A tokenizer whose token 3 looks like markup."""

    def decode(self, ids: list[int]) -> str:
        return "[red]" if ids == [3] else f"w{ids[0]}"


def fake_module() -> DPPOModule:
    """A module that has a vocabulary and a tokenizer, and nothing else."""
    module = DPPOModule(policy="none")
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=VOCABULARY))
    module.policy = SimpleNamespace(model=SimpleNamespace(config=config))
    return module


@pytest.fixture
def module() -> DPPOModule:
    return fake_module()


@pytest.fixture
def trainer(tmp_path: Path, module: DPPOModule) -> Any:
    trainer = SimpleNamespace(
        accumulate_grad_batches=2,
        global_step=0,
        is_global_zero=True,
        default_root_dir=str(tmp_path),
        strategy=SingleDeviceStrategy("cpu"),
        datamodule=SimpleNamespace(tokenizer=Words()),
    )
    module.trainer = trainer
    return trainer


def micro_batch(seed: int, tokens: int = 60) -> tuple[Any, Any]:
    """What the callback is given of N tokens."""
    g = torch.Generator().manual_seed(seed)
    batch = SimpleNamespace(
        tokens=tokens,
        targets=torch.randint(VOCABULARY - 1, (tokens,), generator=g),
        rollout_logp=torch.rand(tokens, generator=g).clamp(min=1e-3).log(),
        advantage=torch.randint(-1, 2, (tokens,), generator=g).float(),
        position=torch.arange(tokens),
    )
    output = SimpleNamespace(
        keep=torch.rand(tokens, generator=g) < 0.6, logp=torch.rand(tokens, generator=g).clamp(min=1e-3).log()
    )
    return batch, output


def take_steps(audit: MaskAudit, trainer: Any, module: DPPOModule, seeds: list[int]) -> None:
    """Optimizer steps of two micro-batches each."""
    for index, seed in enumerate(seeds):
        batch, output = micro_batch(seed)
        audit.on_tokens(trainer, module, batch, output)
        trainer.global_step += index % 2
        audit.on_train_batch_end(trainer, module, None, batch, index)


def lines(trainer: Any) -> list[dict[str, Any]]:
    return read_jsonl(Path(trainer.default_root_dir) / "mask_audit.jsonl")


def counted_by_hand(seeds: list[int]) -> tuple[dict[int, dict[str, Any]], dict[str, int]]:
    rows: dict[int, dict[str, Any]] = defaultdict(lambda: defaultdict(list))
    totals: dict[str, int] = defaultdict(int)
    for seed in seeds:
        batch, output = micro_batch(seed)
        for i in range(batch.tokens):
            token, a = int(batch.targets[i]), float(batch.advantage[i])
            mu, pi = float(batch.rollout_logp[i].exp()), float(output.logp[i].exp())
            totals["tokens"] += 1
            totals["negative"] += a < 0
            totals["negative_moved"] += a < 0 and abs(pi - mu) > 0.5
            rows[token]["seen"].append(1)
            if output.keep[i]:
                continue
            totals["stopped"] += 1
            totals["stopped_positive"] += a > 0
            totals["stopped_negative"] += a < 0
            totals["stopped_rare"] += mu < 0.15
            for name, value in (("mu", mu), ("pi", pi), ("positive", a > 0), ("position", i)):
                rows[token][name].append(value)
    return rows, totals


def check_against_hand(line_totals: dict[str, Any], top: list[dict[str, Any]], seeds: list[int], length: int) -> None:
    rows, totals = counted_by_hand(seeds)
    assert {name: line_totals[name] for name in totals} == totals
    assert line_totals["stopped_share"] == totals["stopped"] / totals["tokens"]
    assert line_totals["stopped_rare_share"] == totals["stopped_rare"] / totals["stopped"]
    assert line_totals["negative_moved_share"] == totals["negative_moved"] / totals["negative"]
    order = sorted((token for token in rows if rows[token]["mu"]), key=lambda token: (-len(rows[token]["mu"]), token))
    assert [row["id"] for row in top] == order[:length]
    for row in top:
        mine = rows[row["id"]]
        assert row["stopped"] == len(mine["mu"])
        assert row["seen"] == len(mine["seen"])
        for name in ("mu", "pi", "position"):
            assert row[name] == pytest.approx(sum(mine[name]) / len(mine[name]), abs=1e-5)
        assert row["positive_share"] == pytest.approx(sum(mine["positive"]) / len(mine["mu"]), abs=1e-5)


def test_each_step_is_counted_as_by_hand(trainer: Any, module: DPPOModule) -> None:
    take_steps(MaskAudit(rows=4), trainer, module, [0, 1, 2, 3])
    first, second = lines(trainer)
    assert (first["step"], second["step"]) == (0, 1)
    check_against_hand(first["totals"], first["top"], [0, 1], 4)
    check_against_hand(second["totals"], second["top"], [2, 3], 4)


def test_the_run_is_the_sum_of_its_steps_and_ends_in_a_table(
    trainer: Any, module: DPPOModule, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    audit = MaskAudit(rows=20)
    take_steps(audit, trainer, module, [0, 1, 2, 3])
    check_against_hand(audit.run.totals(), audit.run.most_stopped(20), [0, 1, 2, 3], 20)
    audit.on_fit_end(trainer, module)
    written = (tmp_path / "mask_audit.txt").read_text()
    totals = counted_by_hand([0, 1, 2, 3])[1]
    assert f"{totals['stopped']} of 240" in written
    assert '"[red]"' in written
    assert "w10" not in written, "the id was never seen"
    assert "mean mu" in capsys.readouterr().out


def test_a_resumed_run_counts_on(trainer: Any, module: DPPOModule, tmp_path: Path) -> None:
    whole, before = MaskAudit(), MaskAudit()
    take_steps(whole, trainer, module, [0, 1, 2, 3])
    take_steps(before, trainer, module, [0, 1])
    torch.save(before.state_dict(), tmp_path / "state.pt")
    after = MaskAudit()
    after.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    take_steps(after, trainer, module, [2, 3])
    assert torch.equal(after.run.by_token, whole.run.by_token)
    assert torch.equal(after.run.total, whole.run.total)


def test_the_state_holds_only_ids_that_were_seen() -> None:
    tally = Tally()
    tally.make_room(100_000, torch.device("cpu"))
    tally.count(*micro_batch(0))
    assert tally.state_dict()["by_token"].shape[1] == len(set(micro_batch(0)[0].targets.tolist()))


def test_ranks_are_summed(module: DPPOModule, trainer: Any) -> None:
    trainer.strategy = SimpleNamespace(reduce=lambda sums, reduce_op: 2 * sums)
    take_steps(MaskAudit(), trainer, module, [0, 1])
    assert lines(trainer)[0]["totals"]["tokens"] == 240


def test_empty_micro_batches_and_steps_are_counted_as_nothing(trainer: Any, module: DPPOModule) -> None:
    audit = MaskAudit()
    for index in range(2):
        batch, output = micro_batch(0, tokens=0)
        audit.on_tokens(trainer, module, batch, output)
        trainer.global_step += index
        audit.on_train_batch_end(trainer, module, None, batch, index)
    (line,) = lines(trainer)
    assert line["totals"]["tokens"] == 0
    assert line["totals"]["stopped_share"] is None
    assert line["top"] == []


def test_nothing_stopped_is_said_so_in_the_file_and_not_printed(
    trainer: Any, module: DPPOModule, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    audit = MaskAudit()
    batch, output = micro_batch(0)
    output.keep[:] = True
    audit.on_tokens(trainer, module, batch, output)
    audit.on_train_batch_end(trainer, module, None, batch, 1)
    audit.on_fit_end(trainer, module)
    assert "no token was stopped" in (tmp_path / "mask_audit.txt").read_text()
    assert not capsys.readouterr().out


def test_an_interrupted_run_leaves_its_table(trainer: Any, module: DPPOModule, tmp_path: Path) -> None:
    audit = MaskAudit()
    audit.on_exception(trainer, module, KeyboardInterrupt())
    assert not (tmp_path / "mask_audit.txt").exists(), "a run that never began"
    take_steps(audit, trainer, module, [0, 1])
    audit.on_exception(trainer, module, KeyboardInterrupt())
    assert (tmp_path / "mask_audit.txt").exists()


def test_no_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="rows must be >= 1"):
        MaskAudit(rows=0)
