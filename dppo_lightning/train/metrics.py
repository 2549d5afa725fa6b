"""Every logged name, defined once with its meaning; values of an optimizer step, its groups, an evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed
from torch import Tensor

from dppo_lightning.advantage import without_signal
from dppo_lightning.base.batch import TrainingBatch
from dppo_lightning.base.records import Group
from dppo_lightning.base.timeline import Span
from dppo_lightning.train.head import HeadOutput
from dppo_lightning.train.objective import kl_estimate

Kind = Literal["sum", "mean", "max"]

GLOSSARY: dict[str, str] = {
    "train/reward": "mean reward of the step's completions",
    "train/reward_std": "standard deviation of the step's rewards",
    "train/length": "mean completion length, in tokens",
    "train/truncated": "share of completions cut by max_new_tokens",
    "train/no_signal": "share of groups whose rewards are all equal, which teach nothing",
    "train/failed": "requests that the engine could not serve",
    "train/loss": "the step's loss, under the configured aggregation",
    "train/surrogate": "mean over tokens of what the region maximises: keep x min(ratio, C) x advantage (DPPO eq. 12)",
    "train/masked_share": "share of tokens that the region stopped",
    "train/masked_share_positive": "share of the tokens with advantage > 0 that the region stopped",
    "train/masked_share_negative": "share of the tokens with advantage < 0 that the region stopped",
    "train/moved_negative_share": "share of the tokens with advantage < 0 and mu - pi > 0.5 (DPPO section 5.3)",
    "train/mismatch_tv": "mean |pi - mu| of the sampled tokens: staleness and engine mismatch together",
    "train/mismatch_kl": "mean r - 1 - log r, an estimate of KL(mu || pi) that is never negative",
    "train/ratio_max": "largest importance ratio pi / mu in the step",
    "train/divergence": "mean of the region's own divergence",
    "train/divergence_max": "largest of the region's own divergence",
    "train/entropy": "mean entropy of the policy at the generated positions, in nats",
    "train/kl_reference": "mean estimated KL to the reference model",
    "train/staleness": "mean age of the step's tokens, in optimizer steps",
    "train/staleness_max": "age of the step's oldest token, in optimizer steps",
    "train/grad_norm": "norm of the gradient before clipping",
    "train/learning_rate": "learning rate of the step",
    "train/tokens": "generated tokens trained on in the step",
    "train/empty": "1 where the step had no token to train on: it leaves the weights as they are",
    "train/skipped": "1 where the step was not taken because loss, gradient or weights were not finite",
    "perf/padding_waste": "share of the forward pass's positions that are padding",
    "perf/packed": "1 where the step's sequences were packed in one row, 0 where they were padded rows",
    "perf/shared_prompt_share": "share of the sequences' ids that a prompt forwarded once for its completions spares",
    "perf/generated_tokens_per_s": "generated tokens per second of generation",
    "perf/trained_tokens_per_s": "generated tokens per second of training",
    "perf/flops_utilisation": "model FLOPs of the step per second of training, over the speed of a bare matrix product",
    "stream/ready": "groups that were complete when the trainer asked for the rollout",
    "stream/in_flight": "requests in flight when the rollout was taken",
    "stream/without_signal": "groups left out of the rollout because their rewards are all equal (resampling)",
    "stream/resampled": "groups generated in the place of such groups",
    "stream/aborted": "completions aborted because the rollout was complete without them (oversampling)",
    "stream/stale": "groups generated anew because they had become too old (late: drop)",
    "reward/failed_timeout": "completions of the rollout that the step begins which took longer than "
    "data.rewarding.timeout to score",
    "reward/failed_memory": "those that asked for more memory than data.rewarding.memory_mib",
    "reward/failed_died": "those that ended the process that scored them",
    "reward/failed_raised": "those that made the reward raise an error",
    "time/wait": "seconds that training stood still for the rollout that the step begins",
    "time/generate": "seconds from the rollout's first request to its last completion; training may go on meanwhile",
    "time/reward": "seconds of reward functions, of the rollout that the step begins; generation goes on meanwhile",
    "time/annotate": "seconds of no-gradient passes before a rollout's first step, 0 when nothing asks for them: "
    "recomputed log-probs, hidden states (full-vocabulary regions, diagnostics), reference log-probs",
    "time/choose": "seconds of the no-gradient pass before a step, for a region that chooses among all of its tokens",
    "time/train": "seconds of forward, backward and optimizer of the step",
    "time/sync": "seconds of the weight update and parity probe after the rollout's last step",
    "sync/parity_error": "largest |log-prob of the engine - log-prob of the trainer| over the probe's tokens",
    "sync/parity_mean": "mean of the same, which is what a sync is judged by",
    "sync/bytes": "bytes of weights sent to the engine",
    "heldout/reward": "mean held-out reward",
    "heldout/avg_at_k": "share of held-out completions that are solved (reward >= solved_at)",
    "heldout/pass_at_k": "share of held-out prompts with at least one solved completion among k",
    "heldout/length": "mean length of held-out completions, in tokens",
    "heldout/not_scored": "held-out completions that could not be scored, for the reasons of reward/failed_*",
}
"""Beside these: ``train/part/<name>`` and ``heldout/part/<name>``, the named parts of the reward;
``staleness/tokens/<age>`` and ``staleness/masked_share/<age>``, the number of the step's tokens of an age in optimizer
steps and the share of them that the region stopped; and
``diagnostics/<divergence>`` (binary_tv, topk_tv, full_tv, binary_kl, topk_kl, full_kl), means over the step's tokens of
divergences measured beside the region's own."""


def check_names(values: Mapping[str, float]) -> Mapping[str, float]:
    """Return ``values``; KeyError for a name that the glossary does not know, so that no metric goes undocumented."""
    for name in values:
        if name not in GLOSSARY and not name.startswith(("train/part/", "heldout/part/", "diagnostics/", "staleness/")):
            raise KeyError(f"metric {name!r} is not in metrics.GLOSSARY: add it there with its meaning")
    return values


@dataclass(frozen=True)
class _Total:
    """Statistic of the values so far.

    What is not a number stays so: torchmetrics drops it, and a loss of NaN would read 0.

    Attributes:
        kind: What becomes of it.
        value: [] float64: the sum, weighted for a mean, or the largest.
        weight: [] float64: of a mean, what its sum is divided by.
    """

    kind: Kind
    value: Tensor
    weight: Tensor

    @classmethod
    def of(cls, kind: Kind, values: Tensor, weight: float) -> _Total:
        """Make the total of at least one value; each has the weight."""
        value = values.amax() if kind == "max" else values.sum() * (weight if kind == "mean" else 1.0)
        return cls(kind, value, torch.full_like(value, values.numel() * weight))

    def plus(self, other: _Total) -> _Total:
        value = torch.maximum(self.value, other.value) if self.kind == "max" else self.value + other.value
        return _Total(self.kind, value, self.weight + other.weight)

    def result(self) -> float:
        return float(self.value / self.weight if self.kind == "mean" else self.value)


class StepMetrics:
    """Statistics of an optimizer step's tokens, summed over its micro-batches."""

    def __init__(self) -> None:
        self._totals: dict[str, _Total] = {}

    @torch.no_grad()
    def update(self, batch: TrainingBatch, output: HeadOutput) -> None:
        """Add one micro-batch."""
        self._add("train/loss", "sum", output.loss)
        self._add("train/tokens", "sum", batch.tokens)
        rows = batch.input_ids.numel()
        self._add("perf/padding_waste", "mean", 1 - batch.real_tokens / rows, rows)
        if batch.tokens == 0:
            return
        ids = batch.real_tokens + batch.saved_tokens
        self._add("perf/shared_prompt_share", "mean", batch.saved_tokens / ids, ids)
        self._add("perf/packed", "mean", float(batch.segments is not None), rows)
        shift = output.logp.exp() - batch.rollout_logp.exp()
        stopped = (~output.keep).float()
        negative = batch.advantage < 0
        self._add("train/surrogate", "mean", -output.surrogate_loss)
        self._add("train/masked_share", "mean", stopped)
        self._add("train/masked_share_positive", "mean", stopped[batch.advantage > 0])
        self._add("train/masked_share_negative", "mean", stopped[negative])
        self._add("train/moved_negative_share", "mean", negative & (shift < -0.5))
        self._add("train/mismatch_tv", "mean", shift.abs())
        self._add("train/mismatch_kl", "mean", kl_estimate(batch.rollout_logp, output.logp, "k3"))
        self._add("train/ratio_max", "max", (output.logp - batch.rollout_logp).exp())
        if output.entropy is not None:
            self._add("train/entropy", "mean", output.entropy)
        age = batch.age
        self._add("train/staleness", "mean", age)
        self._add("train/staleness_max", "max", age)
        for number in age.unique().tolist():
            mine = stopped[age == number]
            self._add(f"staleness/tokens/{number}", "sum", len(mine))
            self._add(f"staleness/masked_share/{number}", "mean", mine)
        if output.divergence is not None:
            self._add("train/divergence", "mean", output.divergence)
            self._add("train/divergence_max", "max", output.divergence)
        if output.kl is not None:
            self._add("train/kl_reference", "mean", output.kl)
        for name, divergence in output.diagnostics.items():
            self._add(f"diagnostics/{name}", "mean", divergence)

    def _add(self, name: str, kind: Kind, values: Tensor | float, weight: float = 1.0) -> None:
        values = torch.as_tensor(values, dtype=torch.float64)
        if values.numel() == 0:
            return
        more = _Total.of(kind, values, weight)
        self._totals[name] = self._totals[name].plus(more) if name in self._totals else more

    def compute_and_reset(self) -> dict[str, float]:
        """Return the step's values over all ranks, collective; a statistic of no token at all is left out."""
        values = {name: total.result() for name, total in _over_ranks(self._totals).items()}
        self._totals.clear()
        return values


def _over_ranks(totals: dict[str, _Total]) -> dict[str, _Total]:
    """Join every rank's totals; a rank without a token lacks some."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return totals
    ranks: list[dict[str, _Total]] = [{} for _ in range(torch.distributed.get_world_size())]
    mine = {name: _Total(total.kind, total.value.cpu(), total.weight.cpu()) for name, total in totals.items()}
    torch.distributed.all_gather_object(ranks, mine)
    joined = ranks[0]
    for theirs in ranks[1:]:
        for name, total in theirs.items():
            joined[name] = joined[name].plus(total) if name in joined else total
    return joined


def group_metrics(groups: list[Group]) -> dict[str, float]:
    """Compute ``train/...``: rewards and lengths of the groups that an optimizer step trains on; no group, no value."""
    if not groups:
        return {}
    rewards = np.concatenate([np.asarray(group.rewards) for group in groups])
    completions = [completion for group in groups for completion in group.completions]
    return {
        "train/reward": float(rewards.mean()),
        "train/reward_std": float(rewards.std()),
        "train/length": float(np.mean([len(completion) for completion in completions])),
        "train/truncated": float(np.mean([completion.finish_reason == "length" for completion in completions])),
        "train/no_signal": float(np.mean([without_signal(np.asarray(group.rewards)) for group in groups])),
        **_reward_parts(groups, "train"),
    }


def heldout_metrics(groups: list[Group], solved_at: float) -> dict[str, float]:
    """Compute means over held-out prompts.

    Args:
        groups: Rewarded groups, one for each held-out prompt, k completions each.
        solved_at: Reward from which on a completion counts as solved.

    Returns:
        ``heldout/reward``; ``heldout/avg_at_k``: mean share solved; ``heldout/pass_at_k``: share of prompts with at
        least one solved; ``heldout/length``: in tokens; ``heldout/not_scored``: number of failures;
            ``heldout/part/<name>``: means of the reward's parts.
    """
    solved = [np.asarray(group.rewards) >= solved_at for group in groups]
    return {
        "heldout/reward": float(np.mean([np.mean(np.asarray(group.rewards)) for group in groups])),
        "heldout/avg_at_k": float(np.mean([mine.mean() for mine in solved])),
        "heldout/pass_at_k": float(np.mean([mine.any() for mine in solved])),
        "heldout/length": float(np.mean([len(c) for group in groups for c in group.completions])),
        "heldout/not_scored": float(sum(f is not None for group in groups for f in group.failures)),
        **_reward_parts(groups, "heldout"),
    }


def _reward_parts(groups: list[Group], prefix: str) -> dict[str, float]:
    """Mean of each named part of the reward over the completions for which it was reported."""
    names = dict.fromkeys(name for group in groups for name in group.reward_parts)
    parts = {name: np.concatenate([g.reward_parts[name] for g in groups if name in g.reward_parts]) for name in names}
    return {f"{prefix}/part/{name}": float(np.nanmean(values)) for name, values in parts.items()}


class StepLog:
    """Time, and values that come up on the way, of the optimizer step that is being taken.

    Attributes:
        step: Number of the optimizer step that the present micro-batch belongs to.
        values: Values of the step so far; logged and emptied at its end.
        seconds: Seconds of its micro-batches so far, without what ``leave_out`` took away.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.step = 0
        self.values: dict[str, float] = {}
        self.seconds = 0.0
        self._started = 0.0

    def start_micro_batch(self, step: int) -> None:
        """Begin to count the time of a micro-batch of ``step``."""
        self.step, self._started = step, self.clock()

    def end_micro_batch(self) -> Span:
        """Stop counting, and return the span of the micro-batch."""
        ended = self.clock()
        self.seconds += ended - self._started
        return Span("train", self._started, ended, self.step)

    def leave_out(self, seconds: float) -> None:
        """Take from the present micro-batch the seconds of something that ran within it."""
        self._started += seconds

    def clear(self) -> None:
        """Forget the step: it is over, or was broken off."""
        self.values, self.seconds = {}, 0.0


ON_THE_BAR = {
    "reward": "train/reward",
    "length": "train/length",
    "masked": "train/masked_share",
    "mismatch": "train/mismatch_tv",
    "tokens/s": "perf/trained_tokens_per_s",
}
"""Metrics that a person watches: name on the progress bar -> metric."""


def log_step(module: pl.LightningModule, values: dict[str, float], step: int) -> None:
    """Log the values of optimizer step ``step``; the few that a person watches go to the progress bar too."""
    trainer: Any = module.trainer
    # what a checkpoint may monitor; ``module.log`` takes half a millisecond for each of some forty values
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in check_names(values).items()})
    if trainer.global_step % trainer.log_every_n_steps == 0:
        for logger in trainer.loggers:  # module.log would repeat what an earlier step had and this one has not
            logger.log_metrics(values, step=step)
    shown = {name: values[metric] for name, metric in ON_THE_BAR.items() if metric in values}
    module.log_dict(shown, prog_bar=True, logger=False, batch_size=1)
