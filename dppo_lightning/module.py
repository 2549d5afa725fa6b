"""DPPOModule: the last two of the five verbs, train -> sync. The first three are in rollout/stream.py."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from dppo_lightning.advantage import AdvantageEstimator, GroupMean
from dppo_lightning.aggregation import Aggregation, sequence_weights
from dppo_lightning.batch import Group, Sequence, TrainingBatch, pack, split_by_tokens
from dppo_lightning.callbacks.base import RunCallback
from dppo_lightning.evaluation import heldout_metrics
from dppo_lightning.metrics import StepMetrics, check_names
from dppo_lightning.objective import Objective, ReferenceKL, kl_estimate
from dppo_lightning.packing import Layout
from dppo_lightning.policy import Policy
from dppo_lightning.rollout.weight_sync import TOLERANCE, WeightSync
from dppo_lightning.scaling.resume import count_batches_anew
from dppo_lightning.scaling.sharding import shard, shard_frozen
from dppo_lightning.scaling.weights import gradient_norm
from dppo_lightning.scaling.zero import gradient_norm_of_step
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
        advantage: From rewards to advantages; GroupMean when None.
        aggregation: How token losses become one number, see aggregation.py.
        constant_length: Divisor of the aggregation "seq-sum-constant", in tokens.
        optimizer: From parameters to an optimizer.
        lr_scheduler: From the optimizer to a schedule that is stepped after every optimizer step.
        kl: Pull towards the reference model, which is the policy before training.
        entropy_coefficient: Weight of an entropy bonus, >= 0.
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
        advantage: AdvantageEstimator | None = None,
        aggregation: Aggregation = "seq-mean-token-sum",
        constant_length: int | None = None,
        optimizer: OptimizerCallable = _adamw,
        lr_scheduler: LRSchedulerCallable = _constant,
        kl: ReferenceKL = ReferenceKL(),  # noqa: B008  # frozen
        entropy_coefficient: float = 0.0,
        gradient_checkpointing: bool = False,
        shared_prompts: bool = True,
        logits_mib: int = 64,
        divergence_diagnostics: bool = False,
    ) -> None:
        super().__init__()
        sequence_weights(aggregation, np.ones(1), constant_length)  # a wrong pair fails here, not in the first step
        self.policy_name = policy
        self.advantage = GroupMean() if advantage is None else advantage
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
        self._reference: list[Policy] = []  # in a list, so that it is no submodule: never trained, saved or sharded
        self._sync: WeightSync | None = None
        self._sync_metrics: dict[str, float] = {}
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
    def topk(self) -> int:
        """How many top log-probs the region and the diagnostics ask of the engine."""
        return max(region.k if "topk" in region.needs else 0 for region in (self.region, *self.diagnostics.values()))

    @property
    def layout(self) -> Layout:
        """How micro-batches are laid out for the policy."""
        assert self.policy is not None
        return self.policy.layout

    @property
    def penalises_reward(self) -> bool:
        """Whether KL to the reference is subtracted from the reward."""
        return self.kl.coefficient > 0 and self.kl.where == "reward"

    def configure_model(self) -> None:
        """Load the policy, and the reference when KL asks for one."""
        if self.policy is not None:
            return
        temperature = self.data.sampling.temperature or 1.0
        shared = self.shared_prompts
        self.policy = Policy(self.policy_name, temperature, self.logits_mib, self.gradient_checkpointing, shared)
        shard(self.trainer.strategy, self.policy)
        if self.kl.coefficient > 0:
            reference = Policy(self.policy_name, temperature, self.logits_mib, shared_prompts=shared)
            self._reference = [reference.requires_grad_(False).eval()]
            shard_frozen(self.trainer.strategy, reference)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        count_batches_anew(checkpoint, self.trainer.accumulate_grad_batches)

    def configure_optimizers(self) -> Any:
        assert self.policy is not None
        optimizer = self.make_optimizer(self.policy.parameters())
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_lr_scheduler(optimizer), "interval": "step"},
        }

    def on_train_start(self) -> None:
        self.ensure_synced()

    def on_train_batch_start(self, batch: TrainingBatch, batch_idx: int) -> None:
        self._train_started = time.perf_counter()

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
        self._pending["train/grad_norm"] = gradient_norm(optimizer)
        self._pending["train/learning_rate"] = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(self, outputs: Any, batch: TrainingBatch, batch_idx: int) -> None:
        """After the step's last micro-batch: log, and give the engine the new weights when the rollout is used up."""
        self._train_seconds += time.perf_counter() - self._train_started
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches:
            return
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
                logger.log_metrics(values, step=self.trainer.global_step - 1)
        self.log_dict({k: values[v] for k, v in bar.items() if v in values}, prog_bar=True, logger=False, batch_size=1)

    def ensure_synced(self) -> dict[str, float]:
        """Give the engine the policy's weights, unless it has them, and check that it uses them.

        Returns:
            Metrics of the last sync.

        Raises:
            SyncError: The engine does not hold the policy's weights afterwards.
        """
        assert self.policy is not None
        if self._sync is None:
            self._sync = self._make_sync()
        if self._sync.version != self.trainer.global_step:
            report = self._sync.push(self.policy.named_weights(), self.trainer.global_step)
            self._sync_metrics = {
                "time/sync": report.seconds,
                "sync/bytes": report.bytes,
                "sync/parity_error": report.parity_error,
            }
        return self._sync_metrics

    def _make_sync(self) -> WeightSync:
        data = self.data
        tolerance = data.parity_tolerance
        if tolerance is None:
            coarse = "bfloat16" if "bf16" in str(self.trainer.precision) else "float32"
            tolerance = max(TOLERANCE[data.rollout_dtype], TOLERANCE[coarse])
        probe = (data.heldout_prompts or data.train_prompts)[0]
        return WeightSync(data.engine, probe, data.sampling, tolerance, self._logp_of_one)

    def _logp_of_one(self, sequence: Sequence) -> np.ndarray:
        assert self.policy is not None
        return self._score(self.policy, [sequence])[0]

    def annotate(self, sequences: list[Sequence]) -> None:
        """Before a rollout's first step: what is needed of rollout time and of the reference.

        For "recomputed_logp" and "full" together one pass; what is not needed is not computed.
        """
        needs = self.region.needs.union(*(region.needs for region in self.diagnostics.values()))
        if needs & {"recomputed_logp", "full"}:
            self._remember_rollout(sequences, needs)
        if self._reference and sequences and sequences[0].reference_logp is None:
            for sequence, logp in zip(sequences, self._score(self._reference[0], sequences), strict=True):
                sequence.reference_logp = logp

    def reward_penalty(self, groups: list[Group]) -> list[np.ndarray]:
        """beta * sum over each completion's tokens of the estimated KL to the reference."""
        rows = [group.sequences() for group in groups]
        scored = iter(self._score(self._reference[0], [sequence for mine in rows for sequence in mine]))
        costs = []
        for group, mine in zip(groups, rows, strict=True):
            group.reference_logp = [next(scored) for _ in mine]  # for the metrics of training, too
            totals = iter(
                float(kl_estimate(torch.from_numpy(row.rollout_logp), torch.from_numpy(logp), self.kl.kind).sum())
                for row, logp in zip(mine, group.reference_logp, strict=True)
            )
            costs.append(np.array([next(totals) if len(completion) else 0.0 for completion in group.completions]))
        return [self.kl.coefficient * cost for cost in costs]

    def _remember_rollout(self, sequences: list[Sequence], needs: frozenset[str]) -> None:
        """Keep the policy of rollout time: log-probs [T]; for "full" hidden states [T, H] and the projection [V, H]."""
        assert self.policy is not None
        head = self.policy.head
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            if "full" in needs:
                head.remember_rollout()
            for part, batch in self._score_batches(sequences):
                hidden = self.policy.hidden_states(batch)
                counts = [sequence.tokens for sequence in part]
                if "full" in needs:
                    # in the products' dtype, to which the head would round them anyway
                    for sequence, states in zip(part, hidden.to(head.product_dtype).cpu().split(counts), strict=True):
                        sequence.rollout_hidden = states
                if "recomputed_logp" in needs:
                    for sequence, logp in zip(part, head(hidden, batch).cpu().split(counts), strict=True):
                        sequence.recomputed_logp = logp.numpy()

    def _score(self, policy: Policy, sequences: list[Sequence]) -> list[np.ndarray]:
        """Log-probs [T] of each sequence's generated tokens, in the precision of training."""
        policy.to(self.device)
        found: dict[int, np.ndarray] = {}
        with self.trainer.precision_plugin.forward_context():
            for part, batch in self._score_batches(sequences):
                pieces = policy.logp(batch).cpu().split([sequence.tokens for sequence in part])
                found |= {id(sequence): piece.numpy() for sequence, piece in zip(part, pieces, strict=True)}
        return [found[id(sequence)] for sequence in sequences]

    def _score_batches(self, sequences: list[Sequence]) -> Iterator[tuple[list[Sequence], TrainingBatch]]:
        """The sequences as micro-batches of the size of training's."""
        parts = self.data.steps_per_rollout * self.trainer.accumulate_grad_batches
        for part in split_by_tokens(sequences, min(parts, max(len(sequences), 1)), self.layout):
            if part:
                yield part, pack(part, np.zeros(len(part)), self.layout).to(self.device)

    def on_validation_start(self) -> None:
        self._validation_started = time.perf_counter()
        self.ensure_synced()

    def on_validation_end(self) -> None:
        """A held-out evaluation runs before on_train_batch_end of the step that it follows: it is no training time."""
        self._train_started += time.perf_counter() - self._validation_started

    def on_predict_start(self) -> None:
        self.ensure_synced()

    def predict_step(self, groups: list[Group], batch_idx: int) -> list[dict[str, Any]]:
        """Records of the completions, which the loader has generated."""
        return [record for group in groups for record in group.records()]

    def on_test_start(self) -> None:
        self.ensure_synced()

    def validation_step(self, groups: list[Group], batch_idx: int) -> None:
        """Log rewards and solve rates of one held-out evaluation."""
        values = heldout_metrics(groups, self.data.solved_at)
        self.log_dict(dict(check_names(values)), batch_size=1)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunCallback):
                callback.on_heldout(self.trainer, self, groups)

    def test_step(self, groups: list[Group], batch_idx: int) -> None:
        self.validation_step(groups, batch_idx)
