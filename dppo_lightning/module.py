"""DPPOModule: the last two of the five verbs, train -> sync. The first three are in rollout/stream.py."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from dppo_lightning.advantage import AdvantageEstimator, GroupMean
from dppo_lightning.aggregation import Aggregation, sequence_weights
from dppo_lightning.batch import Group, Sequence, TrainingBatch, pack, split_by_tokens
from dppo_lightning.callbacks.base import RunCallback
from dppo_lightning.errors import ConfigError
from dppo_lightning.evaluation import heldout_metrics
from dppo_lightning.lora import LoRA, Unadapted
from dppo_lightning.metrics import StepMetrics, check_names
from dppo_lightning.objective import Objective, ReferenceKL, kl_estimate
from dppo_lightning.packing import Layout
from dppo_lightning.policy import Policy
from dppo_lightning.precision import check_precision
from dppo_lightning.rollout.parity import LIMITS, ParityProbe
from dppo_lightning.rollout.weight_sync import WeightSync
from dppo_lightning.scaling.controller import Work
from dppo_lightning.scaling.resume import count_batches_anew
from dppo_lightning.scaling.sharding import scoring, shard, shard_frozen
from dppo_lightning.scaling.strategies import check_strategy
from dppo_lightning.scaling.weights import gradient_norm
from dppo_lightning.scaling.zero import gradient_norm_of_step
from dppo_lightning.step_choice import choose_over_step, statistics
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
        advantage: From rewards to advantages; GroupMean when None.
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
        advantage: AdvantageEstimator | None = None,
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
        # in a list, so that it is no submodule: never trained, saved or sharded
        self._reference: list[Policy | Unadapted] = []
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
    def penalises_reward(self) -> bool:
        """Whether KL to the reference is subtracted from the reward."""
        return self.kl.coefficient > 0 and self.kl.where == "reward"

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
        if self.policy is not None:
            return
        with self.data.together():
            self._load()
        self.data.agree(self.layout, "layout of micro-batches")

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
            weights = data.controller.beside("weights", self.policy.weights_for(data.engine))
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
            data.stream.inbox, prompts, data.sampling, dtype, data.parity_tolerance, partial(self._score, "policy")
        )
        # with an adapter rank the engine answers nothing before its first update
        return WeightSync(probe, as_loaded=self._as_loaded and data.engine.adapter_rank is None)

    def annotate(self, sequences: list[Sequence]) -> None:
        """Before a rollout's first step: what is needed of the policy as it is now, and of the reference.

        For "recomputed_logp" and "full" together one pass; what is not needed is not computed.
        """
        if self.needs & {"recomputed_logp", "full"}:
            self._remember_rollout(sequences, self.needs)
        if self._reference and sequences and sequences[0].reference_logp is None:
            for sequence, logp in zip(sequences, self._score("reference", sequences), strict=True):
                sequence.reference_logp = logp

    def choose(self, batches: list[TrainingBatch]) -> list[TrainingBatch]:
        """Before an optimizer step, on every rank with its micro-batches: the same with what the region chose.

        A pass without gradient, so that the choice is one among all tokens of the step, under its first weights.
        """
        if "chosen" not in self.region.needs:
            return batches
        assert self.policy is not None
        started = time.perf_counter()
        with scoring(self.trainer.strategy), self.trainer.precision_plugin.forward_context():
            mine = [statistics(batch, self.policy.logp(batch.to(self.device))) for batch in batches]
        ranks = self.data.ranks
        assert ranks is not None
        step = ranks.everyone(mine)
        chosen = iter(choose_over_step(self.region, [tokens for theirs in step for tokens in theirs]))
        shares = [[next(chosen) for _ in theirs] for theirs in step]
        self._pending["time/choose"] = time.perf_counter() - started
        return [replace(batch, chosen=one) for batch, one in zip(batches, shares[ranks.rank], strict=True)]

    def reward_penalty(self, groups: list[Group]) -> list[np.ndarray]:
        """beta * sum over each completion's tokens of the estimated KL to the reference."""
        rows = [group.sequences() for group in groups]
        scored = iter(self._score("reference", [sequence for mine in rows for sequence in mine]))
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
        """Keep the policy as the first step on the rollout finds it: log-probs [T] ("recomputed_logp"); hidden states
        [T, H] and the projection [V, H] ("full").

        At ``max_staleness`` 0 it is the policy that sampled; above 0 it is not, and "full" is refused.
        """
        for sequence, (hidden, logp) in zip(sequences, self._everyone("remember", needs, sequences), strict=True):
            sequence.rollout_hidden = hidden
            sequence.recomputed_logp = logp

    def _score(self, which: Literal["policy", "reference"], sequences: list[Sequence]) -> list[np.ndarray]:
        """Log-probs [T] of each sequence's generated tokens, in the precision of training."""
        return self._everyone("score", which, sequences)

    def _everyone(self, work: str, how: Any, sequences: list[Sequence]) -> list[Any]:
        """On rank 0: have every rank do a no-gradient pass over its part of the sequences; a result for each of them.

        Every rank gets as many micro-batches, of the size of training's: a model in shards needs all ranks in each.
        """
        ranks = self.trainer.world_size
        each = self.data.steps_per_rollout * self.trainer.accumulate_grad_batches
        each = min(each, max(1, -(-len(sequences) // ranks)))
        parts = split_by_tokens(sequences, each * ranks, self.layout)
        shares = [(how, parts[rank * each : (rank + 1) * each]) for rank in range(ranks)]
        done = self.data.controller.everyone(work, shares)
        found: dict[int, Any] = {}
        for (_, mine), results in zip(shares, done, strict=True):
            found |= zip((id(sequence) for part in mine for sequence in part), results, strict=True)
        return [found[id(sequence)] for sequence in sequences]

    def _score_share(self, share: tuple[str, list[list[Sequence]]]) -> list[np.ndarray]:
        """On every rank: log-probs of each sequence of its parts."""
        which, parts = share
        assert self.policy is not None
        policy = self.policy if which == "policy" else self._reference[0]
        policy.to(self.device)
        found: list[np.ndarray] = []
        with scoring(self.trainer.strategy), self.trainer.precision_plugin.forward_context():
            for part, batch in self._packed(parts):
                pieces = policy.logp(batch).cpu().split([sequence.tokens for sequence in part])
                found += [piece.numpy() for piece in pieces]
        return found

    def _remember_share(
        self, share: tuple[frozenset[str], list[list[Sequence]]]
    ) -> list[tuple[Tensor | None, np.ndarray | None]]:
        """On every rank: hidden states and log-probs under the weights as they are now, each where it is needed."""
        needs, parts = share
        assert self.policy is not None
        head = self.policy.head
        found: list[tuple[Tensor | None, np.ndarray | None]] = []
        strategy = self.trainer.strategy
        with scoring(strategy), torch.no_grad(), self.trainer.precision_plugin.forward_context():
            if "full" in needs:
                head.remember_rollout()
            for part, batch in self._packed(parts):
                hidden = self.policy.hidden_states(batch)
                counts = [sequence.tokens for sequence in part]
                states: list[Any] = [None] * len(part)
                logps: list[Any] = [None] * len(part)
                if "full" in needs:
                    # in the products' dtype, to which the head would round them anyway
                    whole = hidden.to(head.product_dtype).cpu()
                    # copies: a view is sent to rank 0 with all that it is a view of
                    states = [piece.clone() for piece in whole.split(counts)]
                if "recomputed_logp" in needs:
                    logps = [piece.numpy() for piece in head(hidden, batch).cpu().split(counts)]
                found += zip(states, logps, strict=True)
        return found

    def _run_through_weights(self, share: None) -> None:
        """On the ranks beside rank 0, while it reads the weights: take part in gathering them."""
        assert self.policy is not None
        for _ in self.policy.weights_for(self.data.engine):
            pass

    @property
    def work(self) -> dict[str, Work]:
        """What rank 0 can ask of every rank."""
        return {"score": self._score_share, "remember": self._remember_share, "weights": self._run_through_weights}

    def _packed(self, parts: list[list[Sequence]]) -> Iterator[tuple[list[Sequence], TrainingBatch]]:
        for part in parts:
            yield part, pack(part, np.zeros(len(part)), self.layout).to(self.device)

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
