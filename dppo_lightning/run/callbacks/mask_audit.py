"""MaskAudit: which tokens the trust region stopped, how often, and where they stood."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jaxtyping import Float
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from dppo_lightning.base.batch import TrainingBatch
from dppo_lightning.base.errors import ConfigError, one_line
from dppo_lightning.run.whole_files import append_text
from dppo_lightning.train.head import HeadOutput
from dppo_lightning.train.hooks import RunCallback, ends_step
from dppo_lightning.train.module import DPPOModule

log = logging.getLogger(__name__)

BY_TOKEN = ("seen", "stopped", "mu", "pi", "positive", "position")
"""Names of the sums kept for every token id; all but the first are over stopped tokens only."""
TOTALS = ("tokens", "stopped", "stopped_positive", "stopped_negative", "stopped_rare", "negative", "negative_moved")
"""Names of the counts kept over all tokens."""
RARE = 0.15  # mu of the tokens that ratio clipping stops most (arXiv 2602.04879, finding 4)
MOVED = 0.5  # |pi - mu| of the few tokens that cause the collapse (section 5.3)

Row = dict[str, Any]


class MaskAudit(RunCallback):
    """Write which tokens the trust region stopped, in every optimizer step and in the whole run.

    ``mask_audit.jsonl`` gets a line for every optimizer step, ``mask_audit.txt`` a table at the end, which is printed
    too. A line holds ``step`` (optimizer steps taken before it), ``totals`` and ``top``, the tokens stopped most often.
    The sums are taken on the tensors of the head; only the rows that are shown become Python numbers.

    Totals: ``tokens``; ``stopped``, of these ``stopped_positive`` and ``stopped_negative`` by sign of the advantage and
    ``stopped_rare`` with mu < 0.15; ``negative``, tokens with A < 0, of these ``negative_moved`` with |pi - mu| > 0.5;
    and the shares ``stopped_share`` (of tokens), ``stopped_rare_share`` (of stopped), ``negative_moved_share`` (of
    negative), null where there is nothing to divide by.

    A row of ``top``: ``id``, ``token``, ``stopped``, ``seen``, and of the stopped ones the means ``mu``, ``pi`` and
    ``position`` (place in the completion) and ``positive_share`` (A > 0).

    Args:
        rows: Number of tokens in a line of the JSONL file and in the table, >= 1.

    Raises:
        ConfigError: ``rows`` is out of range.
    """

    def __init__(self, rows: int = 20) -> None:
        if rows < 1:
            raise ConfigError(f"MaskAudit: rows must be >= 1, got {rows}")
        self.rows = rows
        self.step = Tally()
        self.run = Tally()

    def on_tokens(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: TrainingBatch, output: HeadOutput
    ) -> None:
        assert isinstance(pl_module, DPPOModule)
        assert pl_module.policy is not None
        self.step.make_room(pl_module.policy.model.config.get_text_config().vocab_size, batch.targets.device)
        self.step.count(batch, output)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not ends_step(trainer, batch_idx):
            return
        self.step.reduce(lambda sums: trainer.strategy.reduce(sums, reduce_op="sum"))
        self.run.merge(self.step)
        if trainer.is_global_zero:
            line = {
                "step": trainer.global_step - 1,
                "totals": self.step.totals(),
                "top": with_text(self.step.most_stopped(self.rows), pl_module),
            }
            append_text(Path(trainer.default_root_dir) / "mask_audit.jsonl", json.dumps(line) + "\n")
        self.step = Tally()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write_table(trainer, pl_module, printed=True)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        try:
            self._write_table(trainer, pl_module, printed=False)
        except OSError as error:  # a full disk, say: what ends the run is to be heard, not this
            log.warning(f"mask_audit.txt could not be written: {one_line(error)}")

    def _write_table(self, trainer: pl.Trainer, pl_module: pl.LightningModule, printed: bool) -> None:
        totals = self.run.totals()
        if not trainer.is_global_zero or not totals["tokens"]:
            return
        shown: list[str | Table] = [*headlines(totals)]
        if totals["stopped"]:
            shown.append(audit_table(with_text(self.run.most_stopped(self.rows), pl_module)))
        with (Path(trainer.default_root_dir) / "mask_audit.txt").open("w", encoding="utf-8") as file:
            Console(file=file, width=120).print(*shown, sep="\n")
        if printed and totals["stopped"]:
            Console(highlight=False).print(*shown, sep="\n")

    def state_dict(self) -> dict[str, Any]:
        """Counts so far, of the token ids that were seen."""
        return self.run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.run = Tally.from_state(state_dict)


class Tally:
    """Sums for every token id [6, V] and over all tokens [7].

    They are float64, so that counts stay exact, and stay on the device, so that no step waits for them.
    """

    def __init__(self) -> None:
        self.by_token: Float[Tensor, "6 V"] = torch.zeros(len(BY_TOKEN), 0, dtype=torch.float64)
        self.total: Float[Tensor, " 7"] = torch.zeros(len(TOTALS), dtype=torch.float64)

    @torch.no_grad()
    def count(self, batch: TrainingBatch, output: HeadOutput) -> None:
        """Count the N tokens of one micro-batch; call ``make_room`` before, so that their ids have columns."""
        mu, pi = batch.rollout_logp.double().exp(), output.logp.double().exp()
        stopped = (~output.keep).double()
        positive, negative = (batch.advantage > 0).double(), (batch.advantage < 0).double()
        seen = torch.ones_like(mu)
        values = torch.stack([seen, stopped, stopped * mu, stopped * pi, stopped * positive, stopped * batch.position])
        self.by_token.index_add_(1, batch.targets, values)
        counted = [
            seen,
            stopped,
            stopped * positive,
            stopped * negative,
            stopped * (mu < RARE),
            negative,
            negative * ((pi - mu).abs() > MOVED),
        ]
        self.total += torch.stack([column.sum() for column in counted])

    def merge(self, other: Tally) -> None:
        """Add the sums of another tally."""
        self.make_room(other.by_token.shape[1], other.by_token.device)
        self.by_token[:, : other.by_token.shape[1]] += other.by_token
        self.total += other.total

    def reduce(self, over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Replace the sums of this rank by the sums over all ranks."""
        self.by_token, self.total = over_ranks(self.by_token), over_ranks(self.total)

    def make_room(self, vocabulary: int, device: torch.device) -> None:
        """Move the sums to ``device`` and give every id below ``vocabulary`` a column."""
        self.by_token, self.total = self.by_token.to(device), self.total.to(device)
        missing = vocabulary - self.by_token.shape[1]
        if missing > 0:
            self.by_token = torch.nn.functional.pad(self.by_token, (0, missing))

    def totals(self) -> dict[str, float | None]:
        """Counts over all tokens, and the shares made of them; None for a share of nothing."""
        counts = dict(zip(TOTALS, (int(count) for count in self.total.tolist()), strict=True))
        return {
            **counts,
            "stopped_share": _share(counts["stopped"], counts["tokens"]),
            "stopped_rare_share": _share(counts["stopped_rare"], counts["stopped"]),
            "negative_moved_share": _share(counts["negative_moved"], counts["negative"]),
        }

    def most_stopped(self, rows: int) -> list[Row]:
        """List at most ``rows`` ids that were stopped, the most often stopped first; of equals the smaller id."""
        stopped = self.by_token[1]
        # topk breaks ties as it likes: the smaller id is made the larger key
        keys = stopped * (len(stopped) + 1) + torch.arange(len(stopped), 0, -1, device=stopped.device)
        ids = keys.topk(min(rows, len(stopped))).indices
        found = []
        for token_id, column in zip(ids.tolist(), self.by_token[:, ids].t().tolist(), strict=True):
            sums = dict(zip(BY_TOKEN, column, strict=True))
            count = sums["stopped"]
            if count == 0:
                break
            means = {name: round(sums[name] / count, 6) for name in ("mu", "pi", "position")}
            positive = round(sums["positive"] / count, 6)
            found.append(
                {"id": token_id, "stopped": int(count), "seen": int(sums["seen"]), **means, "positive_share": positive}
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        """Sums of the ids that were seen, and no others: a vocabulary is long."""
        ids = self.by_token[0].nonzero().flatten()
        return {"ids": ids.cpu(), "by_token": self.by_token[:, ids].cpu(), "total": self.total.cpu()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Tally:
        """Make the tally whose ``state_dict`` this is."""
        tally = cls()
        ids: Tensor = state["ids"]
        if len(ids):
            tally.make_room(int(ids.max()) + 1, ids.device)
            tally.by_token[:, ids] = state["by_token"]
        tally.total = state["total"].clone()
        return tally


def with_text(rows: list[Row], module: pl.LightningModule) -> list[Row]:
    """Add to each row ``token``, the text of its token id."""
    assert isinstance(module, DPPOModule)
    tokenizer = module.data.tokenizer
    return [{"id": row["id"], "token": tokenizer.decode([row["id"]])} | row for row in rows]


def headlines(totals: dict[str, float | None]) -> list[str]:
    """Write the totals as the lines above the table."""
    moved = f"|pi - mu| > {MOVED}: {_percent(totals['negative_moved_share'])} of the tokens with A < 0"
    if not totals["stopped"]:
        return ["no token was stopped by the trust region", moved]
    share, rare = _percent(totals["stopped_share"]), _percent(totals["stopped_rare_share"])
    return [
        f"stopped by the trust region: {totals['stopped']} of {totals['tokens']} tokens ({share}), "
        f"{totals['stopped_positive']} with A > 0, {totals['stopped_negative']} with A < 0",
        f"mu < {RARE}: {rare} of the stopped tokens",
        moved,
    ]


def audit_table(rows: Iterable[Row]) -> Table:
    """Lay out the tokens that were stopped most often, one in each row."""
    table = Table()
    for name in ("token", "id", "stopped", "seen", "mean mu", "mean pi", "A > 0", "mean position"):
        table.add_column(name, justify="left" if name == "token" else "right")
    for row in rows:
        table.add_row(
            escape(json.dumps(row["token"], ensure_ascii=False)),
            str(row["id"]),
            str(row["stopped"]),
            str(row["seen"]),
            f"{row['mu']:.3g}",
            f"{row['pi']:.3g}",
            _percent(row["positive_share"]),
            f"{row['position']:.1f}",
        )
    return table


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{100 * share:.3g} %"
