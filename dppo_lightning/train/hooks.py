"""Where others join in: RunCallback sees rollouts and tokens, EvaluationHooks are what a module does in evaluations."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl

from dppo_lightning.base.batch import TrainingBatch
from dppo_lightning.base.records import Group, Prompt
from dppo_lightning.train.head import HeadOutput
from dppo_lightning.train.metrics import StepLog, check_names, heldout_metrics


class RunCallback(pl.Callback):
    """Override what you need, Lightning's own hooks included."""

    def on_generation_progress(self, trainer: pl.Trainer, done: int, total: int) -> None:
        """Called on rank 0 now and then while a rollout is generated: completions finished, and asked for.

        Raises:
            StopWaiting: The rollout is not to be waited for.
        """

    def on_rollout(self, trainer: pl.Trainer, pl_module: pl.LightningModule, groups: list[Group]) -> None:
        """Called with every training rollout before its first optimizer step; groups have advantages and their step."""

    def on_tokens(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: TrainingBatch, output: HeadOutput
    ) -> None:
        """Called with every micro-batch, after its forward pass: N tokens and what the head found of them.

        It runs in the training loop: work on the tensors, without a loop over tokens.
        """

    def on_step_values(self, trainer: pl.Trainer, pl_module: pl.LightningModule, values: dict[str, float]) -> None:
        """Called when an optimizer step is over, with what is about to be logged of it: add what you have to say.

        A name must be in metrics.GLOSSARY.
        """

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when an optimizer step is over: evaluated, logged, and the engine has its weights.

        Between two steps the run has no loose ends, so this is the place to save it, on every rank.
        """

    def on_rollout_given_up(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called on every rank when rank 0 stopped waiting for a rollout, see ``StopWaiting``; no step has begun."""

    def on_heldout(self, trainer: pl.Trainer, pl_module: pl.LightningModule, groups: list[Group]) -> None:
        """Called with the rewarded completions of every held-out evaluation."""


class StopWaiting(Exception):
    """Raised by ``on_generation_progress``: the run ends, and does not wait for the rollout that is generated."""


def ends_step(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether micro-batch ``batch_idx`` is the last one of its optimizer step, as seen in ``on_train_batch_end``."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def run_callbacks(trainer: pl.Trainer) -> list[RunCallback]:
    """The trainer's callbacks that see rollouts and tokens, in order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, RunCallback)]  # type: ignore[attr-defined]


class Evaluated:
    """Groups on their way through Lightning: no list and no dataclass, so that nothing looks for tensors in them.

    What makes 16 bits of a batch's tensors ("bf16-true") stops at the frozen records that groups hold.
    """

    def __init__(self, groups: list[Group]) -> None:
        self.groups = groups


class HeldOutLoader:
    """Yields the groups of one evaluation, generated and rewarded, as one batch.

    Every evaluation of a run uses the same seeds, so two evaluations differ by the policy alone.

    Args:
        prompts: Prompts to complete; without any the loader is empty.
        evaluate: Completes and rewards them, on every rank.
    """

    def __init__(self, prompts: list[Prompt], evaluate: Callable[[list[Prompt]], list[Group]]) -> None:
        self.prompts = prompts
        self.evaluate = evaluate

    def __len__(self) -> int:
        return min(len(self.prompts), 1)

    def __iter__(self) -> Iterator[Evaluated]:
        if self.prompts:
            yield Evaluated(self.evaluate(self.prompts))


class EvaluationHooks(pl.LightningModule):
    """What DPPOModule does in ``validate``, ``test`` and ``predict``, and in the evaluations of ``fit``.

    Attributes:
        step_log: Times the present optimizer step, to which an evaluation does not belong.
    """

    step_log: StepLog

    def __init__(self) -> None:
        super().__init__()
        self._validation_started = 0.0
        self._lightnings_count = 0

    @property
    def steps_taken(self) -> int:
        """Optimizer steps of the run that made the present weights; what an evaluation counts as its step."""
        raise NotImplementedError

    def ensure_synced(self) -> dict[str, float]:
        """Give the engine the present weights; metrics of the last sync."""
        raise NotImplementedError

    def on_validation_start(self) -> None:
        self._validation_started = time.perf_counter()
        self._begin_evaluation()

    def on_validation_end(self) -> None:
        """A held-out evaluation runs before on_train_batch_end of the step that it follows: it is no training time."""
        self._end_evaluation()
        self.step_log.leave_out(time.perf_counter() - self._validation_started)

    def on_predict_start(self) -> None:
        self.ensure_synced()

    def predict_step(self, groups: list[Group], batch_idx: int) -> list[dict[str, Any]]:
        """Records of the completions, which the loader has generated."""
        return [record for group in groups for record in group.records()]

    def on_test_start(self) -> None:
        self._begin_evaluation()

    def on_test_end(self) -> None:
        self._end_evaluation()

    def _begin_evaluation(self) -> None:
        """Lightning logs it at a count of its own, which is one behind within a step and 0 outside of ``fit``."""
        loop = self.trainer.fit_loop.epoch_loop
        self._lightnings_count, loop._batches_that_stepped = loop._batches_that_stepped, self.steps_taken
        self.ensure_synced()

    def _end_evaluation(self) -> None:
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self._lightnings_count

    def validation_step(self, groups: list[Group], batch_idx: int) -> None:
        """Log rewards and solve rates of one held-out evaluation."""
        values = heldout_metrics(groups, self.trainer.datamodule.solved_at)  # type: ignore[attr-defined]
        self.log_dict(dict(check_names(values)), batch_size=1)
        if self.trainer.sanity_checking:
            return
        for callback in run_callbacks(self.trainer):
            callback.on_heldout(self.trainer, self, groups)

    def test_step(self, groups: list[Group], batch_idx: int) -> None:
        self.validation_step(groups, batch_idx)
