"""An engine that is started anew gets the policy's weights, whatever was done with the module before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from dppo_lightning.base.records import Group
from dppo_lightning.generate.engine import RolloutEngine
from dppo_lightning.generate.transformers_engine import TransformersEngine
from dppo_lightning.generate.vllm.embedded import VLLMEmbedded
from dppo_lightning.run.callbacks.record import TimelineLog, read_timeline
from dppo_lightning.train.hooks import RunCallback
from tests.helpers.log_probs import log_probs
from tests.helpers.rewards import share
from tests.helpers.runs import QUIET, Letters, Memory, Record, build, sgd

Weights = dict[str, Tensor]


class Evaluations(RunCallback):
    """The groups of every held-out evaluation."""

    def __init__(self) -> None:
        self.groups: list[list[Group]] = []

    def on_heldout(self, trainer: pl.Trainer, pl_module: pl.LightningModule, groups: list[Group]) -> None:
        self.groups.append(groups)


class Session:
    """One module and one data module, with which a user does one thing after another."""

    def __init__(self, policy: str, engine: RolloutEngine | None = None) -> None:
        self.policy = policy
        data = {"prompts": Letters(6, heldout=3), "heldout_samples": 4, "engine": engine or TransformersEngine()}
        self.module, self.data = build(policy, {"optimizer": sgd(2.0)}, data)

    def trainer(self, *callbacks: pl.Callback, steps: int = 2, **settings: Any) -> pl.Trainer:
        return pl.Trainer(**QUIET | {"max_steps": steps, "logger": Memory()} | settings, callbacks=list(callbacks))

    def fit(self, trainer: pl.Trainer | None = None) -> Record:
        """Two steps; every rollout is sampled with the weights that the first step on it found."""
        record = Record()
        trainer = trainer or self.trainer()
        trainer.callbacks.append(record)
        trainer.fit(self.module, datamodule=self.data)
        trainer.callbacks.remove(record)
        for groups, weights in zip(record.rollouts, record.weights, strict=True):
            self.check_sampled_with(groups, weights)
        return record

    def validate(self, weights: Weights, trainer: pl.Trainer | None = None, ckpt_path: str | None = None) -> float:
        """The held-out reward, which must be that of completions sampled with ``weights``."""
        seen = Evaluations()
        trainer = trainer or self.trainer()
        trainer.callbacks.append(seen)
        (values,) = trainer.validate(self.module, datamodule=self.data, ckpt_path=ckpt_path, verbose=False)
        trainer.callbacks.remove(seen)
        (groups,) = seen.groups
        self.check_sampled_with(groups, weights)
        rewards = [[share(text, self.data.reward.characters) for text in group.texts] for group in groups]
        assert values["heldout/reward"] == pytest.approx(np.mean(rewards))
        return values["heldout/reward"]

    def weights(self) -> Weights:
        """A copy of the policy's weights."""
        return {name: weight.clone() for name, weight in self.module.policy.named_weights()}

    def check_sampled_with(self, groups: list[Group], weights: Weights) -> None:
        model = AutoModelForCausalLM.from_pretrained(self.policy, dtype=torch.float32)
        model.load_state_dict(weights, strict=False)
        for group in groups:
            for completion in group.completions:
                with torch.no_grad():
                    scored = log_probs(model, group.prompt.token_ids, completion.token_ids)
                np.testing.assert_allclose(completion.logp, scored, atol=1e-4)


def different(a: Weights, b: Weights) -> bool:
    """Whether two policies differ by so much that no sampled log-prob could pass for the other's."""
    return max(float((a[name] - b[name]).abs().max()) for name in a) > 0.01


@pytest.fixture
def session(tiny_policy_dir: str) -> Session:
    return Session(tiny_policy_dir)


@pytest.fixture
def checkpoints(tiny_policy_dir: str, tmp_path: Path) -> list[tuple[str, Weights]]:
    """Checkpoints after one and two steps, with their weights."""
    kept: list[tuple[str, Weights]] = []
    for steps in (1, 2):
        run = Session(tiny_policy_dir)
        trainer = run.trainer(steps=steps)
        trainer.fit(run.module, datamodule=run.data)
        path = str(tmp_path / f"{steps}.ckpt")
        trainer.save_checkpoint(path)
        kept.append((path, run.weights()))
    assert different(kept[0][1], kept[1][1])
    return kept


@pytest.mark.parametrize("same_trainer", [True, False])
def test_validation_after_a_fit_scores_the_trained_policy(same_trainer: bool, session: Session) -> None:
    trainer = session.trainer()
    record = session.fit(trainer)
    trained = session.weights()
    assert different(trained, record.weights[0])
    session.validate(trained, trainer if same_trainer else session.trainer())


@pytest.mark.slow
def test_validation_after_a_fit_scores_the_trained_policy_of_a_real_engine(tiny_policy_dir: str) -> None:
    session = Session(tiny_policy_dir, VLLMEmbedded())
    record = session.fit()
    trained = session.weights()
    assert different(trained, record.weights[0])
    session.validate(trained)


def test_validations_of_two_checkpoints_score_the_two(session: Session, checkpoints: list[tuple[str, Weights]]) -> None:
    trainer = session.trainer()
    rewards = [session.validate(weights, trainer, path) for path, weights in [*checkpoints, checkpoints[0]]]
    assert rewards[0] == rewards[2]


def test_a_fit_after_validation_of_a_checkpoint_samples_with_its_weights(
    session: Session, checkpoints: list[tuple[str, Weights]]
) -> None:
    """No checkpoint is given to the fit, so it trains what is in memory."""
    path, weights = checkpoints[1]
    session.validate(weights, ckpt_path=path)
    record = session.fit()
    assert all(torch.equal(record.weights[0][name], weights[name]) for name in record.weights[0])


def test_the_time_line_of_a_fit_holds_nothing_of_a_validation_before_it(session: Session, tmp_path: Path) -> None:
    trainer = session.trainer(TimelineLog(), default_root_dir=tmp_path)
    session.trainer().validate(session.module, datamodule=session.data, verbose=False)
    session.fit(trainer)
    spans = [e for e in read_timeline(tmp_path / "timeline.json") if e["name"] == "evaluate"]
    assert [span["args"]["step"] for span in spans] == [2]


def test_a_second_fit_samples_with_what_the_first_has_trained(session: Session) -> None:
    first = session.fit()
    trained = session.weights()
    second = session.fit()
    assert different(trained, first.weights[0])
    assert all(torch.equal(second.weights[0][name], trained[name]) for name in second.weights[0])
    session.validate(session.weights())


def test_prediction_after_a_fit_is_of_the_trained_policy(session: Session) -> None:
    session.fit()
    trained = session.weights()
    taken: list[list[Group]] = []
    original = session.data.evaluate
    session.data.evaluate = lambda prompts: (taken.append(original(prompts)), taken[-1])[1]
    (records,) = session.trainer().predict(session.module, datamodule=session.data)
    assert len(records) == 12
    session.check_sampled_with(taken[0], trained)


def test_a_fit_that_breaks_off_leaves_nothing_for_the_next(session: Session) -> None:
    class Broken(pl.Callback):
        def on_before_optimizer_step(self, *args: Any) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        session.fit(session.trainer(Broken()))
    trainer = session.trainer()
    record = session.fit(trainer)
    tokens = [sum(len(c) for g in groups for c in g.completions) for groups in record.rollouts]
    assert trainer.logger.of("train/tokens") == tokens
