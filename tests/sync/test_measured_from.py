"""Which weights a region measures from: mu is what sampled the token, "recomputed" the policy that training found."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from dppo_lightning.base.batch import TrainingBatch
from dppo_lightning.base.errors import ConfigError
from dppo_lightning.generate.schedule import Streaming
from dppo_lightning.generate.scripted import ScriptedEngine
from dppo_lightning.train.head import HeadOutput
from dppo_lightning.train.hooks import RunCallback
from dppo_lightning.trust_region import BinaryTV, Combined, FullKL, FullTV, PPOClip, TopKTV, TrustRegion
from dppo_lightning.trust_region.topk import total_variation
from tests.helpers.runs import Run, fit, sgd


class OwnRegion(BinaryTV):
    """A user's region over the whole vocabulary."""

    needs = frozenset({"full"})


class Tokens(RunCallback):
    """By optimizer step, what the head was given of each token and found."""

    def __init__(self) -> None:
        self.seen: dict[int, list[tuple[TrainingBatch, HeadOutput]]] = defaultdict(list)

    def on_tokens(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: TrainingBatch, output: HeadOutput
    ) -> None:
        self.seen[trainer.global_step].append((batch, output))


def tables(policy: str, weights: dict[str, Tensor], run: Run, step: int) -> tuple[Tensor, Tensor]:
    """Of a step's generated tokens, sorted by prompt: log-probs at every id [N, V] under given weights, and ids [N]."""
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    model.load_state_dict(weights, strict=False)
    rows, ids = [], []
    for group in (group for groups in run.record.rollouts for group in groups if group.step == step):
        for completion in group.completions:
            row = torch.tensor([[*group.prompt.token_ids, *completion.token_ids.tolist()]])
            with torch.no_grad():
                rows.append(model(row).logits[0, len(group.prompt.token_ids) - 1 : -1].log_softmax(-1))
            ids.append(row[0, len(group.prompt.token_ids) :])
    return torch.cat(rows), torch.cat(ids)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ({"trust_region": FullTV()}, "FullTV needs .* set data.streaming.max_staleness to 0, got 2, or use a Top-K"),
        ({"trust_region": FullKL()}, "FullKL needs"),
        ({"trust_region": Combined([FullTV(), BinaryTV()])}, "Combined needs"),
        ({"trust_region": Combined([BinaryTV(), Combined([BinaryTV(), FullKL()])])}, "Combined needs"),
        ({"trust_region": OwnRegion()}, "OwnRegion needs"),
        ({"divergence_diagnostics": True}, "divergence_diagnostics needs .* set it to false, or data.streaming"),
    ],
)
@pytest.mark.parametrize("late", ["wait", "drop"])
def test_the_whole_vocabulary_is_refused_where_older_weights_may_sample(
    module: dict[str, Any], late: Any, reason: str, tiny_policy_dir: str
) -> None:
    class Unstartable(ScriptedEngine):
        def start(self, spec: object) -> None:
            raise AssertionError("started")

    with pytest.raises(ConfigError, match=reason):
        fit(tiny_policy_dir, module, {"engine": Unstartable(), "streaming": Streaming(2, late)})


@pytest.mark.parametrize("region", [BinaryTV(), TopKTV(), PPOClip(anchor="recomputed")], ids=lambda r: type(r).__name__)
def test_what_the_engine_records_is_right_at_any_staleness(region: TrustRegion, tiny_policy_dir: str) -> None:
    run = fit(tiny_policy_dir, {"trust_region": region}, {"streaming": Streaming(1)}, max_steps=2)
    assert run.metrics.of("train/staleness_max") == [0, 1]


def test_on_policy_full_divergences_are_from_the_weights_that_sampled(tiny_policy_dir: str) -> None:
    """Three steps on one rollout: mu is that of its first step for all of them, and binary <= Top-K <= full."""
    tokens = Tokens()
    run = fit(
        tiny_policy_dir,
        {"trust_region": FullTV(10.0), "divergence_diagnostics": True, "optimizer": sgd(1.0)},
        {"steps_per_rollout": 3},
        [tokens],
        max_steps=4,
    )
    moved = []
    for step, sampled_by in enumerate([0, 0, 0, 3]):
        ((_, output),) = tokens.seen[step]
        found = output.diagnostics
        assert (found["binary_tv"] <= found["topk_tv"] + 1e-5).all()
        assert (found["topk_tv"] <= found["full_tv"] + 1e-5).all()
        assert (found["binary_kl"] <= found["topk_kl"] + 1e-5).all()
        assert (found["topk_kl"] <= found["full_kl"] + 1e-5).all()
        mu, _ = tables(tiny_policy_dir, run.record.weights[sampled_by], run, step)
        pi, _ = tables(tiny_policy_dir, run.record.weights[step], run, step)
        expected = total_variation(pi, mu)
        torch.testing.assert_close(output.divergence.sort().values, expected.sort().values, rtol=1e-3, atol=1e-4)
        moved.append(float(expected.mean()))
    assert min(moved[1:3]) > 0.01
    assert max(moved[0], moved[3]) < 1e-5


def test_recomputed_is_the_policy_that_training_on_the_rollout_began_with(tiny_policy_dir: str) -> None:
    """Not the weights that sampled the token: they are a step older from the second rollout on."""
    tokens = Tokens()
    run = fit(
        tiny_policy_dir,
        {"trust_region": PPOClip(anchor="recomputed"), "optimizer": sgd(1.0)},
        {"streaming": Streaming(2), "steps_per_rollout": 2},
        [tokens],
        max_steps=6,
    )
    for step in range(6):
        ((batch, _),) = tokens.seen[step]
        began = step - step % 2
        table, ids = tables(tiny_policy_dir, run.record.weights[began], run, step)
        expected = table.gather(1, ids[:, None])[:, 0].sort().values
        assert batch.recomputed_logp is not None
        torch.testing.assert_close(batch.recomputed_logp.sort().values, expected, rtol=1e-4, atol=1e-4)
        stale = (batch.version < began).numpy()
        apart = np.abs(batch.recomputed_logp.numpy() - batch.rollout_logp.numpy())
        assert not stale.any() or apart[stale].mean() > 0.01
        assert stale.all() or apart[~stale].max() < 1e-4
        assert stale.any() == (step >= 2)
