"""DPPOModule: the last two of the five verbs, train -> sync. The first three are in rollout/stream.py."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from dppo_lightning.aggregation import Aggregation, sequence_weights
from dppo_lightning.batch import TrainingBatch
from dppo_lightning.callbacks.base import RunCallback
from dppo_lightning.errors import ConfigError
from dppo_lightning.lora import LoRA
from dppo_lightning.metrics import StepMetrics, check_names, heldout_metrics
from dppo_lightning.objective import Objective, ReferenceKL
from dppo_lightning.packing import Layout
from dppo_lightning.policy import Policy, Unadapted
from dppo_lightning.precision import check_precision
from dppo_lightning.records import Group, Sequence
from dppo_lightning.rollout.parity import LIMITS, ParityProbe
from dppo_lightning.rollout.weight_sync import WeightSync
from dppo_lightning.scaling.resume import count_batches_anew
from dppo_lightning.scaling.sharding import gradient_norm, shard, shard_frozen
from dppo_lightning.scaling.strategies import check_strategy
from dppo_lightning.scaling.zero import gradient_norm_of_step
from dppo_lightning.scoring import Scorer
from dppo_lightning.timeline import Span
from dppo_lightning.trust_region import BinaryTV, TrustRegion
from dppo_lightning.trust_region.diagnostics import diagnostic_divergences

if TYPE_CHECKING:
    from dppo_lightning.head import HeadOutput
    from dppo_lightning.rollout.datamodule import RolloutDataModule


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0)


def _constant(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)


class DPPOModule(pl.LightningModule):
    """The policy, the reference model, the loss and the optimizer.

    Args:
        policy: Hugging Face id or folder of the causal language model to train.
        trust_region: How far the policy may move from the one that generated the data; BinaryTV(0.15) when None.
        aggregation: How token losses become one number, see aggregation.py.
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

    Raises:
        ConfigError: A setting is out of range.
    """

    def __init__(
        self,
        policy: str,
        trust_region: TrustRegion | None = None,
        aggregation: Aggregation = "seq-mean-token-sum",
        constant_length: int | None = None,
        optimizer: OptimizerCallable = _adamw,
        lr_scheduler: LRSchedulerCallable = _constant,
        kl: ReferenceKL = ReferenceKL(),  # noqa: B008  # frozen
        entropy_coefficient: float = 0.0,
        lora: LoRA | None = None,
        frozen: list[str] | None = None,
        gradient_checkpointing: bool = False,
        shared_prompts: bool = True,
        logits_mib: int = 64,
        divergence_diagnostics: bool = False,
    ) -> None:
        super().__init__()
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
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
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
        self._as_loaded = True  # the policy has the weights of its folder
        self._steps_of_weights = 0  # outside of training: optimizer steps that the weights in memory have seen
        self._step = 0  # that the present micro-batch belongs to
        self._lightnings_count = 0
        self._train_started = self._train_seconds = 0.0
        self._pending: dict[str, float] = {}

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
        return self.region.needs.union(*(region.needs for region in self.diagnostics.values()))

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
        """See aggregation.py: [B] tokens of a step's sequences to the share of one of each one's tokens in the loss."""
        return sequence_weights(self.aggregation, counts, self.constant_length)

    def check_staleness(self, ahead: int) -> None:
        """Refuse to compare whole distributions with that of a token's sampling where several weights sampled.

        Args:
            ahead: Largest age of a token at a rollout's first step, in optimizer steps.

        Raises:
            ConfigError: The region or the diagnostics need "full", and ``ahead`` is above 0.
        """
        if not ahead or "full" not in self.needs:
            return
        kept = "the whole vocabulary's distribution is kept for the weights at a rollout's first step alone"
        if "full" in self.region.needs:
            raise ConfigError(
                f"{type(self.region).__name__} needs the weights that sampled each token, and {kept}: set "
                f"data.streaming.max_staleness to 0, got {ahead}, or use a Top-K region, whose log-probs the engine "
                "records"
            )
        raise ConfigError(
            f"model.divergence_diagnostics needs the weights that sampled each token, and {kept}: set it to false, or "
            f"data.streaming.max_staleness to 0, got {ahead}"
        )

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
            with self.data.together():
                self._load()
            self.data.agree(self.layout, "layout of micro-batches")
        if self._scorer is None or self._scorer.controller is not self.data.controller:
            self._connect_ranks()

    def _load(self) -> None:
        settings: dict[str, Any] = {
            "temperature": self.data.sampling.temperature or 1.0,
            "logits_mib": self.logits_mib,
            "shared_prompts": self.shared_prompts,
            "longest": self.data.longest,
        }
        # what trains is kept in evaluation mode, but for what recomputes activations, and Lightning warns of that
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
        policy = Policy(
            self.policy_name,
            gradient_checkpointing=self.gradient_checkpointing,
            lora=self.lora,
            frozen=self.frozen,
            seed=self.data.seed,
            **settings,
        )
        shard(self.trainer.strategy, policy)
        if self.kl.coefficient > 0 and self.lora is not None:
            self._reference = [Unadapted(policy)]
        elif self.kl.coefficient > 0:
            reference = Policy(self.policy_name, **settings)
            self._reference = [reference.requires_grad_(False).eval()]
            shard_frozen(self.trainer.strategy, reference)
        self.policy = policy

    def _connect_ranks(self) -> None:
        """Make what rank 0 can ask of every rank; a data module that is set up again has another controller."""
        assert self.policy is not None
        self._scorer = Scorer(
            self.policy,
            self._reference[0] if self._reference else None,
            self.trainer.strategy,
            self.data.controller,
            self.data.steps_per_rollout * self.trainer.accumulate_grad_batches,
        )
        self._gather_task = self.data.controller.task(self._run_through_weights)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._as_loaded = False
        count_batches_anew(checkpoint, self.trainer.accumulate_grad_batches)
        self._steps_of_weights = checkpoint["global_step"]

    def configure_optimizers(self) -> Any:
        assert self.policy is not None
        optimizer = self.make_optimizer([p for p in self.policy.parameters() if p.requires_grad])
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_lr_scheduler(optimizer), "interval": "step"},
        }

    def on_train_start(self) -> None:
        self.step_metrics, self._pending, self._train_seconds = StepMetrics(), {}, 0.0  # of a step that broke off
        self.ensure_synced()

    def on_train_batch_start(self, batch: TrainingBatch, batch_idx: int) -> None:
        self._step = self.trainer.global_step
        self._train_started = time.perf_counter()
        self.data.pump()

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> Tensor:
        """One micro-batch of an optimizer step.

        The aggregation's weights already count the whole step over all ranks, so Lightning's division by the number of
        micro-batches is undone, and the strategy's mean over the ranks is made their sum.
        """
        assert self.policy is not None
        hidden = self.policy.hidden_states(batch)
        output: HeadOutput = self.policy.head(hidden, batch, self.objective, self.diagnostics)
        self.step_metrics.update(batch, output, self.trainer.global_step)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunCallback):
                callback.on_tokens(self.trainer, self, batch, output)
        return output.loss * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._as_loaded = False
        self._pending["train/grad_norm"] = gradient_norm(optimizer)
        self._pending["train/learning_rate"] = optimizer.param_groups[0]["lr"]

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """As Lightning's; a step without a token to train on leaves the weights where they are.

        Otherwise momentum and weight decay would move them by a gradient that is zero because there was nothing.
        """
        plan = self.data.plan
        assert plan is not None
        with standing_still(optimizer) if plan.empty else nullcontext():
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def on_train_batch_end(self, outputs: Any, batch: TrainingBatch, batch_idx: int) -> None:
        """After the step's last micro-batch: log, and give the engine the new weights when the rollout is used up."""
        ended = time.perf_counter()
        self._train_seconds += ended - self._train_started
        self.data.timeline.add(Span("train", self._train_started, ended, self._step))
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches:
            return
        self._steps_of_weights = self.trainer.global_step
        plan = self.data.plan
        assert plan is not None
        norm = gradient_norm_of_step(self.trainer)
        if norm is not None:
            self._pending["train/grad_norm"] = norm
        values = self.step_metrics.compute_and_reset() | self._pending | plan.metrics
        values["time/train"] = self._train_seconds
        values["perf/trained_tokens_per_s"] = values["train/tokens"] / self._train_seconds
        if plan.ends_rollout:
            values |= self.ensure_synced()
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunCallback):
                callback.on_step_values(self.trainer, self, values)
        self.log_step(values)
        self._train_seconds = 0.0
        self._pending.clear()

    def log_step(self, values: dict[str, float]) -> None:
        """Log an optimizer step's values; the few that a person watches go to the progress bar too."""
        bar = {
            "reward": "train/reward",
            "length": "train/length",
            "masked": "train/masked_share",
            "mismatch": "train/mismatch_tv",
            "tokens/s": "perf/trained_tokens_per_s",
        }
        self.log_dict(dict(check_names(values)), logger=False, batch_size=1)
        if self.trainer.global_step % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            for logger in self.trainer.loggers:  # self.log would repeat what an earlier step had and this one has not
                logger.log_metrics(values, step=self._step)
        self.log_dict({k: values[v] for k, v in bar.items() if v in values}, prog_bar=True, logger=False, batch_size=1)

    def ensure_synced(self) -> dict[str, float]:
        """Give the engine the policy's weights, unless it has them, and check that it uses them.

        Whether it has them is not remembered here: an engine that was started anew holds those of its model folder.

        Returns:
            Metrics of the last sync.

        Raises:
            SyncError: The engine does not hold the policy's weights afterwards.
        """
        return self.data.controller.direct(self._bring_up_to_date)

    def _bring_up_to_date(self) -> list[dict[str, float]]:
        """On rank 0: a sync, where the engine has other weights; metrics of the last one, for each rank."""
        data, version = self.data, self.steps_taken
        assert self.policy is not None
        stream = data.stream
        assert stream is not None
        if stream.sync is None:
            stream.sync = self._make_sync()
        if not stream.sync.in_force(version):
            named = self.policy.weights_for(data.engine.adapter_rank)
            weights = data.controller.beside(self._gather_task, named)
            with data.timeline.measure("sync", version), stream.updating(version):
                stream.sync.push(weights, version)
        report = stream.sync.report
        assert report is not None
        metrics = {
            "time/sync": report.seconds,
            "sync/bytes": float(report.bytes),
            "sync/parity_error": report.parity.largest,
            "sync/parity_mean": report.parity.mean,
        }
        return [metrics] * self.trainer.world_size

    def _make_sync(self) -> WeightSync:
        data = self.data
        coarse = "bfloat16" if "bf16" in str(self.trainer.precision) else "float32"
        dtype = max(data.rollout_dtype, coarse, key=lambda name: LIMITS[name].first)
        prompts = data.heldout_prompts or data.train_prompts
        assert data.stream is not None
        probe = ParityProbe(
            data.stream.inbox, prompts, data.sampling, dtype, data.parity_tolerance, self.scorer.policy_logp
        )
        # with an adapter rank the engine answers nothing before its first update
        return WeightSync(probe, as_loaded=self._as_loaded and data.engine.adapter_rank is None)

    def annotate(self, sequences: list[Sequence]) -> None:
        """Before a rollout's first step: what is needed of the policy as it is now, and of the reference.

        For "recomputed_logp" and "full" together one pass; what is not needed is not computed. At ``max_staleness`` 0
        that policy is the one that sampled; above 0 it is not, and "full" is refused.
        """
        remembered = self.needs & {"recomputed_logp", "full"}
        if remembered:
            self.scorer.remember(sequences, remembered)
        if self._reference and sequences and sequences[0].reference_logp is None:
            for sequence, logp in zip(sequences, self.scorer.reference_logp(sequences), strict=True):
                sequence.reference_logp = logp

    def choose(self, batches: list[TrainingBatch]) -> list[TrainingBatch]:
        """Before an optimizer step, on every rank with its micro-batches: the same with what the region chose.

        A pass without gradient, so that the choice is one among all tokens of the step, under its first weights.
        """
        if "chosen" not in self.region.needs:
            return batches
        started = time.perf_counter()
        chosen = self.scorer.choose(self.region, batches)
        self._pending["time/choose"] = time.perf_counter() - started
        return [replace(batch, chosen=one) for batch, one in zip(batches, chosen, strict=True)]

    def _run_through_weights(self, share: None) -> None:
        """On the ranks beside rank 0, while it reads the weights: take part in gathering them."""
        assert self.policy is not None
        for _ in self.policy.weights_for(self.data.engine.adapter_rank):
            pass

    def on_validation_start(self) -> None:
        self._validation_started = time.perf_counter()
        self._begin_evaluation()

    def on_validation_end(self) -> None:
        """A held-out evaluation runs before on_train_batch_end of the step that it follows: it is no training time."""
        self._end_evaluation()
        self._train_started += time.perf_counter() - self._validation_started

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
        values = heldout_metrics(groups, self.data.solved_at)
        self.log_dict(dict(check_names(values)), batch_size=1)
        if self.trainer.sanity_checking:
            return
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunCallback):
                callback.on_heldout(self.trainer, self, groups)

    def test_step(self, groups: list[Group], batch_idx: int) -> None:
        self.validation_step(groups, batch_idx)


@contextmanager
def standing_still(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """A learning rate of 0, which every strategy's optimizer understands, for the block."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * 0  # of the same kind, a number or a tensor
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
