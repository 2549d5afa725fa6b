"""DPPOModule: the last two of the five verbs, train -> sync. The first three are in generate/stream.py.

From here to a region's formula: ``training_step`` -> ``Policy.hidden_states`` -> ``PolicyHead`` (head.py, in chunks) ->
``Objective`` (objective.py, adds KL and entropy) -> ``TrustRegion.forward`` (trust_region/base.py) -> ``divergence``
(trust_region/divergence.py, topk.py). What a step trains on was laid out before, by ``plan_steps`` (assembly.py).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from dppo_lightning.base.batch import TrainingBatch
from dppo_lightning.base.errors import ConfigError
from dppo_lightning.base.packing import Layout
from dppo_lightning.base.records import Group, Sequence
from dppo_lightning.scaling.resume import recount_batches
from dppo_lightning.scaling.strategies import check_strategy
from dppo_lightning.scaling.zero import gradient_norm_of_step
from dppo_lightning.sync.weight_sync import ParityProbe, WeightPush, WeightSync, coarser_dtype
from dppo_lightning.train.datamodule import RolloutDataModule
from dppo_lightning.train.head import HeadOutput
from dppo_lightning.train.hooks import ends_step, run_callbacks
from dppo_lightning.train.lora import LoRA
from dppo_lightning.train.metrics import StepMetrics, log_step
from dppo_lightning.train.nonfinite import NumberGuard, OnNonFinite
from dppo_lightning.train.objective import Aggregation, Objective, ReferenceKL, check_staleness, sequence_weights
from dppo_lightning.train.optimization import StepHooks, adamw, constant
from dppo_lightning.train.policy import Policy, Unadapted, check_precision, load_models
from dppo_lightning.train.scoring import Scorer
from dppo_lightning.trust_region import BinaryTV, TrustRegion
from dppo_lightning.trust_region.base import joint_needs
from dppo_lightning.trust_region.topk import diagnostic_divergences


class DPPOModule(StepHooks):
    """The policy, the reference model, the loss and the optimizer.

    Args:
        policy: Hugging Face id or folder of the causal language model to train.
        trust_region: How far the policy may move from the one that generated the data; BinaryTV(0.15) when None.
        aggregation: How token losses become one number, see ``objective.sequence_weights``.
        constant_length: Divisor of the aggregation "seq-sum-constant", in tokens.
        optimizer: From parameters to an optimizer.
        lr_scheduler: From the optimizer to a schedule that is stepped after every optimizer step.
        kl: Pull towards the reference model, which is the policy before training.
        entropy_coefficient: Weight of an entropy bonus, >= 0.
        lora: Train adapters on the policy, which is not trained itself; the reference is the policy without them.
        frozen: Name patterns of parameters that are not trained, e.g. ``model.embed_tokens.*``.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        shared_prompts: Train sequences packed in one row without padding, each prompt forwarded once for all of its
            completions, where the model's attention allows it (see attention.py); else one padded row a sequence.
        logits_mib: Memory of one chunk of logits in the head, in MiB.
        divergence_diagnostics: Log binary, Top-K and whole-vocabulary divergences side by side (diagnostics/...),
            whatever the trust region. Costs a no-gradient pass per rollout, a copy of the output projection and one
            more product with it per step.
        on_nonfinite: What becomes of the run when a loss, a gradient or weights are not finite: the optimizer step is
            not taken, and the run ends ("stop"), or goes on with the next step ("skip"), see train/nonfinite.py.
        max_skipped: Most steps in a row that may be skipped, >= 1; one more ends the run.

    Raises:
        ConfigError: A setting is out of range.
    """

    def __init__(
        self,
        policy: str,
        trust_region: TrustRegion | None = None,
        aggregation: Aggregation = "seq-mean-token-sum",
        constant_length: int | None = None,
        optimizer: OptimizerCallable = adamw,
        lr_scheduler: LRSchedulerCallable = constant,
        kl: ReferenceKL = ReferenceKL(),  # noqa: B008  # frozen
        entropy_coefficient: float = 0.0,
        lora: LoRA | None = None,
        frozen: list[str] | None = None,
        gradient_checkpointing: bool = False,
        shared_prompts: bool = True,
        logits_mib: int = 64,
        divergence_diagnostics: bool = False,
        on_nonfinite: OnNonFinite = "stop",
        max_skipped: int = 3,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, NumberGuard(on_nonfinite, max_skipped))
        sequence_weights(aggregation, np.ones(1), constant_length)  # a wrong pair fails here, not in the first step
        if lora is not None and frozen:
            raise ConfigError(
                "model.lora trains adapters alone, so model.frozen has nothing to freeze: drop one of them"
            )
        self.policy_name = policy
        self.lora = lora
        self.frozen = tuple(frozen or ())
        self.aggregation: Aggregation = aggregation
        self.constant_length = constant_length
        self.kl = kl
        self.gradient_checkpointing = gradient_checkpointing
        self.shared_prompts = shared_prompts
        self.logits_mib = logits_mib
        self.objective = Objective(trust_region or BinaryTV(), kl, entropy_coefficient)
        self.diagnostics = diagnostic_divergences(self.region) if divergence_diagnostics else {}
        self.step_metrics = StepMetrics()
        self.policy: Policy | None = None
        # in a list, so that it is no submodule: never trained, saved or sharded
        self._reference: list[Policy | Unadapted] = []
        self._scorer: Scorer | None = None
        self.weight_push: WeightPush | None = None
        self._steps_of_weights = 0  # outside of training: optimizer steps that the weights in memory have seen

    @property
    def data(self) -> RolloutDataModule:
        """The rollout data module of the run."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @property
    def region(self) -> TrustRegion:
        return self.objective.region

    @property
    def steps_taken(self) -> int:
        """Optimizer steps of the run that made the present weights; what an evaluation counts as its step."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            return self.trainer.global_step
        return self._steps_of_weights

    @property
    def needs(self) -> frozenset[str]:
        """What the region and the diagnostics read, see TrustRegion."""
        return joint_needs(self.region, *self.diagnostics.values())

    @property
    def topk(self) -> int:
        """How many top log-probs the region and the diagnostics ask of the engine."""
        return max(region.k if "topk" in region.needs else 0 for region in (self.region, *self.diagnostics.values()))

    @property
    def layout(self) -> Layout:
        """How micro-batches are laid out for the policy."""
        assert self.policy is not None
        return self.policy.layout

    @property
    def penalty(self) -> Callable[[list[Group]], list[np.ndarray]] | None:
        """KL to the reference that is subtracted from the rewards, where it is, see ``Scorer.penalty``."""
        in_reward = self.kl.coefficient > 0 and self.kl.where == "reward"
        return partial(self.scorer.penalty, kl=self.kl) if in_reward else None

    @property
    def settings(self) -> dict[str, Any]:
        """Plain values that every rank must have alike."""
        return {
            "model.policy": self.policy_name,
            "model.trust_region": self.region.describe(),
            "model.aggregation": self.aggregation,
        }

    @property
    def scorer(self) -> Scorer:
        """Passes without gradient; made with the policy."""
        assert self._scorer is not None
        return self._scorer

    def weights(self, counts: np.ndarray) -> np.ndarray:
        """The aggregation, see ``TokenWeights``."""
        return sequence_weights(self.aggregation, counts, self.constant_length)

    def check_staleness(self, ahead: int) -> None:
        """Refuse settings that would compare distributions of different weights, see ``objective.check_staleness``."""
        check_staleness(self.region, self.needs, ahead)

    def configure_callbacks(self) -> list[pl.Callback]:
        """None. It is Lightning's first hook: before ranks meet, a model is loaded, or an engine is started.

        Raises:
            ConfigError: The trainer has a strategy or a precision that trains wrongly.
        """
        check_strategy(self.trainer.strategy)
        check_precision(self.trainer)
        return []

    def configure_model(self) -> None:
        """Load and check the policy, and the reference when KL asks for one; the data module does it, in ``setup``.

        Raises:
            ConfigError: A model cannot be used, on a single rank; on several each ends with the same RankError.
        """
        if self.policy is None:
            ranks = self.data.controller.ranks
            with ranks.together():
                self._load()
            ranks.agree(self.layout, "layout of micro-batches")
        if self._scorer is None or self._scorer.controller is not self.data.controller:
            self._connect_ranks()

    def _load(self) -> None:
        # what trains is kept in evaluation mode, but for what recomputes activations, and Lightning warns of that
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
        policy, reference = load_models(
            self.policy_name,
            self.trainer.strategy,
            with_reference=self.kl.coefficient > 0,
            lora=self.lora,
            frozen=self.frozen,
            gradient_checkpointing=self.gradient_checkpointing,
            seed=self.data.seed,
            temperature=self.data.sampling.temperature or 1.0,
            logits_mib=self.logits_mib,
            shared_prompts=self.shared_prompts,
            longest=self.data.longest,
        )
        self._reference = [] if reference is None else [reference]
        self.policy = policy

    def _connect_ranks(self) -> None:
        """Make what rank 0 can ask of every rank; a data module that is set up again has another controller."""
        policy, data = self.policy, self.data
        assert policy is not None
        self._scorer = Scorer(
            policy,
            self._reference[0] if self._reference else None,
            self.trainer.strategy,
            data.controller,
            data.steps_per_rollout * self.trainer.accumulate_grad_batches,
        )
        self.weight_push = WeightPush(
            data.controller,
            weights=lambda: policy.weights_for(data.engine.adapter_rank),
            stream=lambda: data.running_stream,
            make_sync=self._make_sync,
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._as_loaded = False
        recount_batches(checkpoint, self.trainer.accumulate_grad_batches)
        self._steps_of_weights = checkpoint["global_step"]

    def on_train_start(self) -> None:
        self.step_metrics = StepMetrics()  # a step may have been broken off
        self.step_log.clear()
        self.guard.clear()
        self.ensure_synced()

    def on_train_batch_start(self, batch: TrainingBatch, batch_idx: int) -> None:
        self.step_log.start_micro_batch(self.trainer.global_step)
        self.data.pump()

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> Tensor:
        """One micro-batch of an optimizer step.

        The aggregation's weights already count the whole step over all ranks, so Lightning's division by the number of
        micro-batches is undone, and the strategy's mean over the ranks is made their sum.
        """
        assert self.policy is not None
        hidden = self.policy.hidden_states(batch)
        output: HeadOutput = self.policy.head(hidden, batch, self.objective, self.diagnostics)
        self.step_metrics.update(batch, output)
        self.guard.watch(batch, output)
        for callback in run_callbacks(self.trainer):
            callback.on_tokens(self.trainer, self, batch, output)
        return output.loss * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def on_train_batch_end(self, outputs: Any, batch: TrainingBatch, batch_idx: int) -> None:
        """After the step's last micro-batch: log, and give the engine the new weights when the rollout is used up."""
        self.data.timeline.add(self.step_log.end_micro_batch())
        if not ends_step(self.trainer, batch_idx):
            return
        self._steps_of_weights = self.trainer.global_step
        plan = self.data.plan
        assert plan is not None
        if (norm := gradient_norm_of_step(self.trainer)) is not None:
            self.step_log.values["train/grad_norm"] = norm
        values = self.step_metrics.compute_and_reset() | self.step_log.values | plan.metrics
        values["time/train"] = self.step_log.seconds
        values["perf/trained_tokens_per_s"] = values["train/tokens"] / self.step_log.seconds
        if plan.ends_rollout:
            values |= self.ensure_synced()
        for callback in run_callbacks(self.trainer):
            callback.on_step_values(self.trainer, self, values)
        log_step(self, values, self.step_log.step)
        self.step_log.clear()
        for callback in run_callbacks(self.trainer):
            callback.on_step_end(self.trainer, self)

    def ensure_synced(self) -> dict[str, float]:
        """Give the engine the policy's weights, unless it has them, and check it, see ``WeightPush``."""
        assert self.weight_push is not None
        return self.weight_push.ensure_in_force(self.steps_taken)

    def _make_sync(self) -> WeightSync:
        data = self.data
        dtype = coarser_dtype(data.rollout_dtype, self.trainer.precision)
        prompts = data.heldout_prompts or data.train_prompts
        probe = ParityProbe(
            data.running_stream.inbox, prompts, data.sampling, dtype, data.parity_tolerance, self.scorer.policy_logp
        )
        # with an adapter rank the engine answers nothing before its first update
        return WeightSync(probe, as_loaded=self._as_loaded and data.engine.adapter_rank is None)

    def annotate(self, sequences: list[Sequence]) -> None:
        """Fill in, before a rollout's first step, what is needed of policy and reference, see ``Scorer.annotate``."""
        self.scorer.annotate(sequences, self.needs)

    def choose(self, batches: list[TrainingBatch]) -> list[TrainingBatch]:
        """Before an optimizer step, on every rank with its micro-batches: the same with what the region chose.

        A pass without gradient, so that the choice is one among all tokens of the step, under its first weights.
        """
        if "chosen" not in self.region.needs:
            return batches
        started = time.perf_counter()
        batches = self.scorer.with_choice(self.region, batches)
        self.step_log.values["time/choose"] = time.perf_counter() - started
        return batches
