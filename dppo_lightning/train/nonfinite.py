"""NumberGuard: no optimizer step is taken with a loss, a gradient or weights that are not finite.

The optimizer has done nothing when the guard is asked, so a step that is not taken leaves weights and optimizer state
as they are, to the bit. What is seen of micro-batches stays on the device: the guard reads one tensor of three flags a
step, after one reduction over the ranks, by which all of them decide alike. Under ZeRO the gradient is DeepSpeed's, and
whether it is finite is a second reduction, of DeepSpeed's own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from dppo_lightning.base.batch import TrainingBatch
from dppo_lightning.base.errors import ConfigError, NonFiniteError
from dppo_lightning.scaling.sharding import as_sharding
from dppo_lightning.scaling.zero import local_weight
from dppo_lightning.train.head import HeadOutput
from dppo_lightning.train.metrics import StepLog

log = logging.getLogger(__name__)

OnNonFinite = Literal["stop", "skip"]

FORMAT = 1
"""Number of the format of what is written of a step."""
IDS = ("input_ids", "predict_index", "targets", "sequence", "position", "version", "topk_ids")
NUMBERS = ("rollout_logp", "advantage", "weight", "recomputed_logp", "reference_logp", "rollout_topk_logp")
"""What of a micro-batch is written, with ``IDS``."""
NAMED = 3
"""Number of places that the message names."""


class Seen(NamedTuple):
    """What the forward pass found of a micro-batch: its loss [], and of its tokens log pi [N] and losses [N]."""

    loss: Tensor
    logp: Tensor
    token_loss: Tensor


class Stepping(Protocol):
    """What the guard asks of the module: DPPOModule.

    Attributes:
        trainer: Lightning's.
        data: The run's RolloutDataModule.
        policy: The policy that is trained.
        step_log: Knows the step's number.
    """

    trainer: Any
    policy: Any
    step_log: StepLog

    @property
    def data(self) -> Any: ...


class NumberGuard:
    """Refuses a step whose numbers are not finite, writes down what is needed to look, and ends the run or goes on.

    Every rank writes ``nonfinite/step-N/rank-R.pt`` in the run directory, for ``torch.load(weights_only=True)``:
    ``format``, ``step``, ``rank``; ``found``, what was not finite; ``micro_batches``, of each the token ids and
    statistics that it was trained with, ``logp``, ``token_loss`` and ``loss``; ``gradients`` and ``weights``, by
    parameter, the number of ``elements``, ``nan`` and ``inf`` among them, and ``norm`` and ``largest`` magnitude of the
    others, or None where this rank cannot see it.

    Args:
        on_nonfinite: "stop": end the run; "skip": go on with the next step.
        max_skipped: Most steps in a row that may be skipped, >= 1.

    Raises:
        ConfigError: A setting is out of range.
    """

    def __init__(self, on_nonfinite: OnNonFinite = "stop", max_skipped: int = 3) -> None:
        if on_nonfinite not in ("stop", "skip"):
            raise ConfigError(f'model.on_nonfinite must be "stop" or "skip", got {on_nonfinite!r}')
        if max_skipped < 1:
            raise ConfigError(f"model.max_skipped must be >= 1, got {max_skipped}")
        self.on_nonfinite = on_nonfinite
        self.max_skipped = max_skipped
        self.skipped = 0  # steps in a row
        self._seen: list[Seen] = []
        self._bad: list[Tensor] = []

    def clear(self) -> None:
        """Forget the step: it is over, or was broken off."""
        self._seen.clear()
        self._bad.clear()

    def watch(self, batch: TrainingBatch, output: HeadOutput) -> None:
        """Look at a micro-batch after its forward pass; nothing waits for the device."""
        self._seen.append(Seen(output.loss.detach(), output.logp, output.token_loss))
        finite = [output.loss.detach(), output.logp, batch.rollout_logp, batch.advantage]
        finite += [x for x in (batch.recomputed_logp, batch.reference_logp, output.entropy) if x is not None]
        self._bad += [~torch.isfinite(x).all() for x in finite]
        if batch.rollout_topk_logp is not None:  # -inf marks a slot that is not used
            self._bad.append((~(batch.rollout_topk_logp < float("inf"))).any())

    def allows(self, module: Stepping, norm: float) -> bool:
        """Whether the step may be taken; collective, and the same on every rank.

        Args:
            module: Its policy has the gradient of the whole step.
            norm: The gradient's norm.

        Raises:
            NonFiniteError: It may not, and the run ends, on a single rank.
            RankError: The same on several, with the same line on every rank.
        """
        strategy = module.trainer.strategy
        gradient_is_finite = as_sharding(strategy).gradient_is_finite(norm)
        loss = torch.stack(self._bad).any()
        mine = torch.stack([loss, loss.new_tensor(not gradient_is_finite), not_finite(trained(module).values())])
        bad = strategy.reduce(mine.float(), reduce_op="max").tolist()
        if any(bad):
            kinds = [kind for kind, flag in zip(("loss", "gradient", "weights"), bad, strict=True) if flag]
            self.refuse(module, kinds)
            return False
        self.skipped = 0
        self.clear()
        return True

    def refuse(self, module: Stepping, kinds: list[str]) -> None:
        """Write what was seen of a step that is not taken; collective.

        Args:
            module: Its policy has the step's gradient, where the strategy still has it.
            kinds: What is not finite, in a word each.

        Raises:
            NonFiniteError, RankError: See ``allows``.
        """
        ranks, step = module.data.controller.ranks, module.step_log.step
        folder = Path(module.trainer.default_root_dir) / "nonfinite" / f"step-{step}"
        found, written = self._write(module, folder, kinds)
        self.clear()
        everywhere = ranks.all_gather((found, written))
        places = list(dict.fromkeys(place for mine, _ in everywhere for place in mine))
        failed = next((reason for _, reason in everywhere if reason), "")
        named = ", ".join(places[:NAMED]) + (f" and {len(places) - NAMED} more" if len(places) > NAMED else "")
        where = f"what was seen could not be written: {failed}" if failed else f"what was seen is in {folder}"
        line = f"optimizer step {step} was not taken, {' and '.join(kinds)} not finite: {named or 'no tensor'}; {where}"
        self.skipped += 1
        if self.on_nonfinite == "skip" and self.skipped <= self.max_skipped:
            if module.trainer.is_global_zero:
                log.warning(line)
            return
        if self.on_nonfinite == "skip":
            line += f"; model.max_skipped allows {self.max_skipped} skipped step(s) in a row"
        else:
            line += "; lower the learning rate, or set model.on_nonfinite to skip"
        with ranks.together():
            raise NonFiniteError(line)

    def _write(self, module: Stepping, folder: Path, kinds: list[str]) -> tuple[list[str], str]:
        """Write this rank's file: the places that are not finite, and why it could not be written, if so."""
        strategy, rank = as_sharding(module.trainer.strategy), module.trainer.global_rank
        plan = module.data.plan
        assert plan is not None
        parameters = trained(module)
        gradients = {name: statistics_of(strategy.gradient_of(parameter)) for name, parameter in parameters.items()}
        weights = {name: statistics_of(local_weight(parameter)) for name, parameter in parameters.items()}
        found = [place for number, seen in enumerate(self._seen) if (place := fault(seen, number, rank))]
        for what, by_parameter in (("gradient", gradients), ("weight", weights)):
            found += [f"{what} {name}" for name, entry in by_parameter.items() if entry and entry["nan"] + entry["inf"]]
        record = {
            "format": FORMAT,
            "step": module.step_log.step,
            "rank": rank,
            "kinds": kinds,
            "found": found,
            "micro_batches": [traced(batch, seen) for batch, seen in zip(plan.batches, self._seen, strict=False)],
            "gradients": gradients,
            "weights": weights,
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(record, folder / f"rank-{rank}.pt")
        except (OSError, RuntimeError) as error:  # torch says RuntimeError of a disk that is full
            return found, " ".join(str(error).split())
        return found, ""


def trained(module: Stepping) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in module.policy.named_parameters() if parameter.requires_grad}


def not_finite(parameters: Iterable[torch.nn.Parameter]) -> Tensor:
    """[] bool, whether what this rank holds of the parameters has a number that is not finite."""
    parts = [part.detach() for p in parameters if (part := local_weight(p)) is not None and part.numel()]
    # the largest magnitude, not a sum of squares: those of large numbers overflow
    return ~torch.isfinite(torch.nn.utils.get_total_norm(parts, norm_type=float("inf")))


def statistics_of(tensor: Tensor | None) -> dict[str, float] | None:
    """Counts and sizes of a tensor's numbers; None of no tensor."""
    if tensor is None:
        return None
    values = tensor.detach().float()
    finite = values[torch.isfinite(values)]
    return {
        "elements": values.numel(),
        "nan": int(values.isnan().sum()),
        "inf": int(values.isinf().sum()),
        "norm": float(finite.norm()) if finite.numel() else 0.0,
        "largest": float(finite.abs().max()) if finite.numel() else 0.0,
    }


def fault(seen: Seen, number: int, rank: int) -> str:
    """What is not finite of micro-batch ``number``, or nothing."""
    bad = int((~torch.isfinite(seen.logp)).sum())
    if bad:
        return f"{bad} of {len(seen.logp)} log-probs of micro-batch {number} on rank {rank}"
    losses = int((~torch.isfinite(seen.token_loss)).sum())
    if losses:
        return f"the loss of {losses} of {len(seen.token_loss)} tokens of micro-batch {number} on rank {rank}"
    return "" if torch.isfinite(seen.loss) else f"the loss of micro-batch {number} on rank {rank}"


def traced(batch: TrainingBatch, seen: Seen) -> dict[str, Tensor]:
    """Copies on the CPU of what a micro-batch was trained with, and of what was found."""
    given = {name: getattr(batch, name) for name in IDS + NUMBERS} | seen._asdict()
    return {name: value.detach().cpu().clone() for name, value in given.items() if value is not None}
