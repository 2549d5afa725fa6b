"""Frozen parameters."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.train.module import DPPOModule
from dppo_lightning.train.policy import Policy
from tests.helpers.runs import fit, sgd


def originals(folder: str) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())


def test_frozen_parameters_stay_and_the_others_train(tiny_policy_dir: str) -> None:
    frozen = ["model.embed_tokens.*", "model.layers.0.*"]
    run = fit(tiny_policy_dir, {"frozen": frozen, "optimizer": sgd(0.5)}, max_steps=2)
    before = originals(tiny_policy_dir)
    same = {name for name in before if torch.equal(run.weights[name], before[name])}
    assert same == {n for n in before if n.startswith(("model.embed_tokens.", "model.layers.0."))}
    assert set(run.record.gradients[0]) == before.keys() - same
    (optimizer,) = run.module.trainer.optimizers
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(before) - len(same)
    assert max(run.metrics.of("sync/parity_error")) < 1e-4


def test_a_frozen_layer_gives_the_others_the_gradients_that_they_had(tiny_policy_dir: str) -> None:
    whole, part = (fit(tiny_policy_dir, {"frozen": frozen}) for frozen in ([], ["model.embed_tokens.weight"]))
    for name, gradient in part.record.gradients[0].items():
        torch.testing.assert_close(gradient, whole.record.gradients[0][name])


def test_any_name_of_a_tied_parameter_freezes_it(tiny_model_dir: str) -> None:
    policy = Policy(tiny_model_dir, frozen=["lm_head.*"])
    assert not policy.model.get_input_embeddings().weight.requires_grad
    assert not policy.head.weight.requires_grad


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (["model.embed_token.*"], ["'model.embed_token.*'", "model.embed_tokens.weight"]),
        (["*.norm.weight", "lm_haed.weight"], ["'lm_haed.weight'", "lm_head.weight"]),
        (["*"], ["nothing to train"]),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_refused(patterns: list[str], words: list[str], tiny_model_dir: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Policy(tiny_model_dir, frozen=patterns)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_a_module_takes_the_patterns(tiny_policy_dir: str) -> None:
    assert DPPOModule(tiny_policy_dir, frozen=["a", "b"]).frozen == ("a", "b")
