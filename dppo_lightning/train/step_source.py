"""StepSource: from the stream's rollouts to optimizer steps, also within a rollout that a checkpoint has."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl

from dppo_lightning.base.batch import TrainingBatch
from dppo_lightning.base.errors import EngineError
from dppo_lightning.base.records import Prompt
from dppo_lightning.generate.schedule import Selection
from dppo_lightning.generate.stream import RolloutStream
from dppo_lightning.scaling.ranks import Controller
from dppo_lightning.train.assembly import Learner, OpenRollout, StepPlan, empty_step, plan_steps
from dppo_lightning.train.hooks import StopWaiting, run_callbacks

log = logging.getLogger(__name__)


class StepSource:
    """Source of the micro-batches of every optimizer step; each rank has one.

    Args:
        trainer: Lightning's trainer of the run.
        controller: Controller of the run.
        learner: Module that is trained.
        selection: Which completions are trained on.
        stream: Gives rank 0's stream.

    Attributes:
        plan: Plan of the optimizer step that is being taken, for this rank.
        open: Rollout that the steps are taken on; on rank 0.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        controller: Controller,
        learner: Learner,
        selection: Selection,
        stream: Callable[[], RolloutStream],
    ) -> None:
        self.trainer = trainer
        self.controller = controller
        self.learner = learner
        self.selection = selection
        self.stream = stream
        self.plan: StepPlan | None = None
        self.open: OpenRollout | None = None
        self._warned_of_empty_step = False

    def micro_batches(self, step: int) -> Iterator[TrainingBatch]:
        """Give this rank's micro-batches, from optimizer step ``step`` to the last one of its rollout.

        Raises:
            EngineError: Rank 0 was told to stop waiting for the rollout, and no callback ended the run.
        """
        plans = self.controller.direct(partial(self._plan, step))
        if not plans:
            for callback in run_callbacks(self.trainer):
                callback.on_rollout_given_up(self.trainer, self.trainer.lightning_module)
            raise EngineError("a callback raised StopWaiting, and none ended the run: override on_rollout_given_up")
        for plan in plans:
            self.plan = plan
            yield from self.learner.choose(plan.batches)

    def _plan(self, step: int) -> list[list[StepPlan]]:
        """On rank 0: the plans of the steps from ``step`` to the last of its rollout, for each rank.

        Of a rollout that a checkpoint was written within, these are the steps that are left. Where rank 0 stops waiting
        for the rollout there is no step.
        """
        trainer = self.trainer
        if self.open is not None and self.open.has_left(step):
            return self._by_rank(self._lay_out(self.open)[step - self.open.window.start :])
        try:
            rollout = self.stream().next_rollout(step, self._progress)
        except StopWaiting:
            return [[] for _ in range(trainer.world_size)]
        sequences = [self.selection.trained(group) for group in rollout.groups]
        started = time.perf_counter()
        self.learner.annotate([sequence for mine in sequences for sequence in mine])
        annotate = time.perf_counter() - started
        self.open = OpenRollout(rollout.window, rollout.groups, sequences)
        plans = self._lay_out(self.open)
        for callback in run_callbacks(trainer):
            callback.on_rollout(trainer, trainer.lightning_module, rollout.groups)
        plans[0][0].metrics |= rollout.metrics | {"time/annotate": annotate}
        warning = empty_step(step, [plan for plan, *_ in plans])
        if warning is not None and not self._warned_of_empty_step:
            self._warned_of_empty_step = True
            log.warning(warning)
        return self._by_rank(plans)

    def _lay_out(self, rollout: OpenRollout) -> list[list[StepPlan]]:
        """All steps of a rollout, for each of them a plan for each rank."""
        return plan_steps(
            rollout.groups,
            rollout.sequences,
            first=rollout.window.start,
            steps=rollout.window.steps,
            weights=self.learner.weights,
            layout=self.learner.layout,
            ranks=self.trainer.world_size,
            micro_batches=self.trainer.accumulate_grad_batches,
        )

    def _by_rank(self, plans: list[list[StepPlan]]) -> list[list[StepPlan]]:
        return [[step_plans[rank] for step_plans in plans] for rank in range(self.trainer.world_size)]

    def _progress(self, done: int, total: int) -> None:
        for callback in run_callbacks(self.trainer):
            callback.on_generation_progress(self.trainer, done, total)

    def state_dict(self) -> dict[str, Any] | None:
        """Return the rollout that has steps left, or None between two rollouts; on rank 0."""
        if self.open is None or not self.open.has_left(self.learner.steps_taken):
            return None
        return self.open.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None, prompts: Mapping[str, Prompt]) -> None:
        """Take up a state.

        Args:
            state: State that ``state_dict`` returned.
            prompts: Training prompts by their ids.
        """
        self.open = None if state is None else OpenRollout.from_state(state, prompts, self.selection.trained)
