"""Frozen parameters, and the precisions that train."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_runs import fit, sgd
from transformers import AutoModelForCausalLM

from dppo_lightning.errors import ConfigError
from dppo_lightning.module import DPPOModule
from dppo_lightning.policy import Policy
from dppo_lightning.precision import check_precision
from dppo_lightning.scaling.zero import ZeroStrategy


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


def test_mixed_precision_trains_float32_weights(tiny_policy_dir: str) -> None:
    run = fit(tiny_policy_dir, {"optimizer": sgd(1e-3)}, precision="bf16-mixed", max_steps=2)
    assert {weight.dtype for weight in run.weights.values()} == {torch.float32}
    moved = {n: (run.weights[n] - w).abs().max().item() for n, w in originals(tiny_policy_dir).items()}
    assert min(moved.values()) > 0
    # Smaller than half the distance between neighbours in bfloat16: without float32 weights it would be lost.
    assert min(moved.values()) < np.ldexp(1.0, -9) * max(w.abs().max() for w in run.weights.values()).item()


def test_half_precision_without_float32_weights_is_refused(tiny_policy_dir: str) -> None:
    with pytest.raises(ConfigError, match=r"bf16-true.*bf16-mixed") as caught:
        fit(tiny_policy_dir, precision="bf16-true")
    assert "\n" not in str(caught.value)


def test_zero_keeps_float32_weights_itself() -> None:
    class Trainer:
        precision = "bf16-true"
        strategy: Any = ZeroStrategy.__new__(ZeroStrategy)

        class state:
            fn = "fit"

    check_precision(Trainer())  # type: ignore[arg-type]
    Trainer.strategy = object()
    with pytest.raises(ConfigError):
        check_precision(Trainer())  # type: ignore[arg-type]


def test_a_module_takes_the_patterns(tiny_policy_dir: str) -> None:
    assert DPPOModule(tiny_policy_dir, frozen=["a", "b"]).frozen == ("a", "b")
