"""RolloutDataModule: prompts, engine, rewards and the stream of rollouts, as Lightning's source of batches."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch

from dppo_lightning.advantage import AdvantageEstimator, GroupMean
from dppo_lightning.base.batch import TrainingBatch
from dppo_lightning.base.errors import ConfigError
from dppo_lightning.base.records import Group, Prompt
from dppo_lightning.base.timeline import Timeline
from dppo_lightning.generate.engine import EngineSpec, RolloutEngine, Sampling
from dppo_lightning.generate.schedule import Schedule, Selection, Streaming
from dppo_lightning.generate.stream import RolloutStream
from dppo_lightning.generate.vllm.embedded import VLLMEmbedded
from dppo_lightning.prompts import PromptSource
from dppo_lightning.prompts.encoding import load_prompts
from dppo_lightning.prompts.sampler import PromptSampler, Shuffled
from dppo_lightning.reward import RewardFunction
from dppo_lightning.reward.base import UnreadableAnswers, scorable
from dppo_lightning.reward.rewarding import Rewarding
from dppo_lightning.scaling.ranks import Controller, Ranks, fingerprint
from dppo_lightning.train.assembly import Learner, RolloutLoader, StepPlan, check_micro_batches
from dppo_lightning.train.hooks import HeldOutLoader
from dppo_lightning.train.step_source import StepSource

log = logging.getLogger(__name__)

RolloutDtype = Literal["float32", "bfloat16", "float16"]


class RolloutDataModule(pl.LightningDataModule):
    """Generates what the policy is trained on.

    Args:
        prompts: Where questions come from.
        reward: What scores the completions.
        engine: What generates them.
        advantage: From rewards to advantages; GroupMean when None.
        sampler: The order of the training prompts; Shuffled when None.
        prompts_per_step: Prompts of one optimizer step, >= 1.
        samples_per_prompt: Completions of each training prompt, >= 1 (>= 2 with a group baseline).
        steps_per_rollout: Optimizer steps taken on one rollout, >= 1; each completion is trained on once. Above 1 the
            later steps train on slightly stale completions, which is what the trust region is for.
        streaming: How far generation runs ahead of training.
        selection: Which completions are trained on.
        max_new_tokens: Longest completion, in tokens.
        max_prompt_tokens: Longer prompts are dropped and counted; None: as long as the model's context allows.
        temperature: Of training and held-out sampling; divides the logits.
        top_p: Refused below 1 in training.
        top_k: Refused above 0 in training.
        rollout_dtype: Of the engine's weights.
        parity_tolerance: Largest accepted log-prob difference of a single token after a weight update, in nats; None:
            by what engine and trainer differed by before the first update, see sync/weight_sync.py.
        evaluate_every_n_steps: Held-out evaluation before the first step, then every so many optimizer steps, and after
            the last.
        heldout_samples: Completions of each held-out prompt, the k of avg@k and pass@k.
        solved_at: A completion counts as solved when its reward is at least this.
        rewarding: Where and how the reward is called.
        unreadable_answers: Prompts that the reward cannot score, for want of an answer say: "refuse" any before the
            engine starts, or "drop" and count them.
        seed: Of prompt order and of every request.

    Raises:
        ConfigError: A number is out of range, or sampling is truncated in training.
    """

    def __init__(
        self,
        prompts: PromptSource,
        reward: RewardFunction,
        engine: RolloutEngine | None = None,
        advantage: AdvantageEstimator | None = None,
        sampler: PromptSampler | None = None,
        prompts_per_step: int = 8,
        samples_per_prompt: int = 8,
        steps_per_rollout: int = 1,
        streaming: Streaming = Streaming(),  # noqa: B008  # frozen
        selection: Selection = Selection(),  # noqa: B008  # frozen
        max_new_tokens: int = 256,
        max_prompt_tokens: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        rollout_dtype: RolloutDtype = "float32",
        parity_tolerance: float | None = None,
        evaluate_every_n_steps: int = 50,
        heldout_samples: int = 1,
        solved_at: float = 1.0,
        rewarding: Rewarding = Rewarding(),  # noqa: B008  # frozen
        unreadable_answers: UnreadableAnswers = "refuse",
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (
            ("prompts_per_step", prompts_per_step),
            ("samples_per_prompt", samples_per_prompt),
            ("steps_per_rollout", steps_per_rollout),
            ("evaluate_every_n_steps", evaluate_every_n_steps),
            ("heldout_samples", heldout_samples),
        ):
            if value < 1:
                raise ConfigError(f"data.{name} must be >= 1, got {value}")
        streaming.check(steps_per_rollout)
        selection.check(samples_per_prompt)
        self.sampling = Sampling(temperature, top_p, top_k, max_new_tokens)
        self.prompts = prompts
        self.reward = reward
        self.engine = VLLMEmbedded() if engine is None else engine
        self.advantage = GroupMean() if advantage is None else advantage
        self.sampler = Shuffled() if sampler is None else sampler
        self.prompts_per_step = prompts_per_step
        self.samples_per_prompt = samples_per_prompt
        self.steps_per_rollout = steps_per_rollout
        self.streaming = streaming
        self.selection = selection
        self.max_prompt_tokens = max_prompt_tokens
        self.rollout_dtype: RolloutDtype = rollout_dtype
        self.parity_tolerance = parity_tolerance
        self.evaluate_every_n_steps = evaluate_every_n_steps
        self.heldout_samples = heldout_samples
        self.solved_at = solved_at
        self.rewarding = rewarding
        self.unreadable_answers: UnreadableAnswers = unreadable_answers
        self.seed = seed
        self.timeline = Timeline()
        self.ranks: Ranks | None = None
        self.stream: RolloutStream | None = None  # on rank 0
        self.predict_split: Literal["train", "heldout"] = "heldout"
        self.train_prompts: list[Prompt] = []
        self.heldout_prompts: list[Prompt] = []
        self.left_out = 0  # prompts that the reward cannot score
        self.stops: dict[int, str] = {}  # ids that end a completion, each with who names it

    @property
    def learner(self) -> Learner:
        """The module that is trained."""
        return self.trainer.lightning_module  # type: ignore[union-attr,return-value]

    def setup(self, stage: str) -> None:
        """Load prompts, then the policy, then start the engine: what can be wrong without it is found before."""
        if self.ranks is not None:
            return
        self.ranks, self.timeline = Ranks(), Timeline()
        self.controller = Controller(self.ranks)
        assert self.trainer is not None
        self.steps = StepSource(
            self.trainer, self.controller, self.learner, self.selection, lambda: self.running_stream
        )
        if self.ranks.world_size > 1:
            self.ranks.agree(fingerprint(self._settings()), "configuration")
        with self.ranks.together():
            self._set_up(stage)
        self._load_policy()
        with self.ranks.together():
            if self.ranks.is_controller:
                self._start()

    def _settings(self) -> dict[str, Any]:
        """Plain values that every rank must have alike."""
        trainer = self.trainer
        assert trainer is not None
        plain = (str, int, float, bool, type(None), tuple, Streaming, Selection, Sampling, Rewarding)
        return {
            "trainer.max_steps": trainer.max_steps,
            "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches,
            "trainer.precision": trainer.precision,
            **self.learner.settings,
            **{f"data.{k}": v for k, v in vars(self).items() if k[0] != "_" and isinstance(v, plain)},
        }

    def _load_policy(self) -> None:
        """Where Lightning would do it next, as Lightning does it; an engine must not start within these contexts."""
        strategy, precision = self.trainer.strategy, self.trainer.precision_plugin  # type: ignore[union-attr]
        with strategy.tensor_init_context(), strategy.model_sharded_context(), precision.module_init_context():
            self.learner.configure_model()

    def _set_up(self, stage: str) -> None:
        trainer = self.trainer
        assert trainer is not None
        if stage == "fit":
            if trainer.max_steps < 1:
                raise ConfigError("set trainer.max_steps to the number of optimizer steps, at least 1")
            self.sampling.check_training()
            self.advantage.check(self.samples_per_prompt)
            self.learner.check_staleness(self.streaming.max_staleness)
            completions = self.prompts_per_step * self.samples_per_prompt
            check_micro_batches(completions, trainer.world_size, trainer.accumulate_grad_batches)
        self._load_prompts()
        self._check_answers(stage)

    @property
    def longest(self) -> int:
        """Length of the longest sequence of the run, in tokens."""
        return self.spec.max_model_len

    def _load_prompts(self) -> None:
        """Encode the prompts, and work out what the engine must be able to hold."""
        model, learner = self.learner.policy_name, self.learner
        encoded = load_prompts(self.prompts, model, self.sampling.max_new_tokens, self.max_prompt_tokens)
        self.tokenizer, self.stops = encoded.tokenizer, encoded.stops
        self.train_prompts, self.heldout_prompts = encoded.train, encoded.heldout
        stops = tuple(self.stops)
        self.spec = EngineSpec(model, self.rollout_dtype, encoded.longest_sequence, learner.topk, stops)

    def _check_answers(self, stage: str) -> None:
        """Leave out, or refuse, the prompts that are asked and cannot be scored."""
        before = len(self.train_prompts) + len(self.heldout_prompts)
        if stage == "fit" or (stage == "predict" and self.predict_split == "train"):
            self.train_prompts = scorable(self.train_prompts, self.reward, self.unreadable_answers, "train")
        if not (stage == "predict" and self.predict_split == "train"):
            self.heldout_prompts = scorable(self.heldout_prompts, self.reward, self.unreadable_answers, "heldout")
        self.left_out = before - len(self.train_prompts) - len(self.heldout_prompts)

    def _start(self) -> None:
        """On rank 0: the engine and the stream."""
        self.engine.start(self.spec)
        self.sampler.start(self.train_prompts, self.seed)
        self.stream = RolloutStream(
            engine=self.engine,
            sampler=self.sampler,
            tokenizer=self.tokenizer,
            reward=self.reward,
            advantage=self.advantage,
            sampling=replace(self.sampling, topk_logprobs=self.learner.topk),
            samples_per_prompt=self.samples_per_prompt,
            seed=self.seed,
            schedule=self.schedule,
            streaming=self.streaming,
            selection=self.selection,
            penalty=self.learner.penalty,
            solved_at=self.solved_at,
            rewarding=self.rewarding,
            timeline=self.timeline,
            stop_token_ids=self.spec.stop_token_ids,
        )

    @property
    def schedule(self) -> Schedule:
        """Which rollout belongs to which optimizer steps."""
        assert self.trainer is not None
        return Schedule(self.prompts_per_step, self.steps_per_rollout, self.trainer.max_steps)

    def train_dataloader(self) -> RolloutLoader:
        assert self.trainer is not None
        return RolloutLoader(self.trainer, self.steps.micro_batches)

    def pump(self) -> None:
        """On rank 0: let the stream look at what has arrived."""
        if self.stream is not None:
            self.stream.pump()

    @property
    def running_stream(self) -> RolloutStream:
        """Rank 0's stream, once the engine has been started."""
        assert self.stream is not None
        return self.stream

    @property
    def plan(self) -> StepPlan | None:
        """Plan of the optimizer step that is being taken, for this rank."""
        return self.steps.plan

    def evaluate(self, prompts: list[Prompt]) -> list[Group]:
        """On every rank: complete and reward held-out prompts; rank 0 does it."""
        return self.controller.direct(partial(self._sample_heldout, prompts))

    def _sample_heldout(self, prompts: list[Prompt]) -> list[list[Group]]:
        """On rank 0: the groups, for each rank."""
        with self.timeline.measure("evaluate", self.learner.steps_taken):
            groups = self.running_stream.sample(prompts, self.heldout_samples, self.sampling, "heldout")
        return [groups] * self.ranks.world_size  # type: ignore[union-attr]

    def val_dataloader(self) -> HeldOutLoader:
        return HeldOutLoader(self.heldout_prompts, self.evaluate)

    def test_dataloader(self) -> HeldOutLoader:
        return self.val_dataloader()

    def predict_dataloader(self) -> HeldOutLoader:
        prompts = self.heldout_prompts if self.predict_split == "heldout" else self.train_prompts
        return HeldOutLoader(prompts, self.evaluate)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch.to(device) if isinstance(batch, TrainingBatch) else batch.groups

    def settle(self) -> None:
        """On every rank: wait until the engine has finished, and the reward has scored, what was begun."""
        self.controller.direct(self._settle)

    def _settle(self) -> list[None]:
        self.running_stream.settle()
        return [None] * self.ranks.world_size  # type: ignore[union-attr]

    def state_dict(self) -> dict[str, Any]:
        if self.stream is None:
            return {}
        return {
            "step": self.learner.steps_taken,
            "stream": self.stream.state_dict(),
            "rollout": self.steps.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.stream is None or "stream" not in state_dict:
            return
        self.stream.load_state_dict(state_dict["stream"], state_dict["step"])
        self.steps.load_state_dict(state_dict["rollout"], {prompt.id: prompt for prompt in self.train_prompts})

    def close(self, error: BaseException | None = None) -> None:
        """Stop the engine, and leave the other ranks; with an error they are told of it."""
        self.engine.close()
        if self.stream is not None:
            self.stream.close()
        ranks, self.ranks, self.stream = self.ranks, None, None
        if ranks is not None:
            ranks.close(error)

    def teardown(self, stage: str) -> None:
        self.close()

    def on_exception(self, exception: BaseException) -> None:
        self.close(exception)
