"""16 bits: the updates of one process, float32 where it matters, and no layer held that need not be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Olmo2Config, Olmo2ForCausalLM

from dppo_lightning.base.batch import pack
from dppo_lightning.base.records import Sequence
from dppo_lightning.scaling.sharding import in_float32
from dppo_lightning.train.policy import Policy
from tests.helpers.models import save_character_tokenizer
from tests.helpers.rank_pool import RankPool
from tests.helpers.runs import QUIET
from tests.helpers.training import STRATEGIES, EngineLess, Recorded, Trained, record, strategy_of, train

Steps = list[list[Sequence]]
ZERO = [name for name in STRATEGIES if name.startswith("zero")]


@pytest.fixture(scope="module")
def rounded_dir(tiny_policy_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny policy with weights that are bfloat16 numbers, as published models' are."""
    folder = str(tmp_path_factory.mktemp("models") / "rounded")
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_dir, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    model.save_pretrained(folder)
    save_character_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def bf16_steps(rounded_dir: str) -> Steps:
    return record(rounded_dir)


def float32_weights(module: Any) -> dict[str, Tensor]:
    """Whole weights as the optimizer has them, on every rank: under ZeRO its float32 copies."""
    named = dict(module.policy.model.named_parameters())
    if not any(hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id") for parameter in named.values()):
        return {name: tensor.clone() for name, tensor in module.policy.named_weights()}
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(parameter).clone() for name, parameter in named.items()}


def update(run: Trained, policy_dir: str) -> Tensor:
    """What training has added to the weights, in one vector."""
    before = AutoModelForCausalLM.from_pretrained(policy_dir, dtype=torch.float32).named_parameters()
    return torch.cat([(run.found[name] - parameter.detach()).flatten() for name, parameter in before])


def distance(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@pytest.fixture(scope="module")
def expected(rounded_dir: str, bf16_steps: Steps) -> Trained:
    """Of one process and one micro-batch a step."""
    return train(rounded_dir, bf16_steps, "one", precision="bf16-mixed", probe=float32_weights)


def test_a_missing_or_doubled_sequence_would_be_seen(expected: Trained, rounded_dir: str, bf16_steps: Steps) -> None:
    """By twice the tolerance below, and a micro-batch is no less than a sequence."""
    wanted = update(expected, rounded_dir)
    for other in ([step[:-1] or step for step in bf16_steps], [[*step, step[-1]] for step in bf16_steps]):
        run = train(rounded_dir, other, "one", precision="bf16-mixed", probe=float32_weights)
        assert distance(update(run, rounded_dir), wanted) > 2 * TOLERANCE


TOLERANCE = 0.07
"""Of the distance between two updates, relative to one of them."""


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_two_ranks_in_16_bits_update_as_one_process_does(
    strategy: str, accumulate: int, expected: Trained, two_ranks: RankPool, rounded_dir: str, bf16_steps: Steps
) -> None:
    run, _ = two_ranks.run(
        train, rounded_dir, bf16_steps, strategy, "sgd", accumulate, precision="bf16-mixed", probe=float32_weights
    )
    assert distance(update(run, rounded_dir), update(expected, rounded_dir)) < TOLERANCE
    torch.testing.assert_close(run.of("train/loss"), expected.of("train/loss"), rtol=0.05, atol=0.05)
    assert torch.equal(run.of("train/tokens"), expected.of("train/tokens"))


def small_after_large(policy_dir: str) -> Steps:
    """One step: a sequence of advantage 1,024 and 63 more of advantage 1: each is lost if it is added in bfloat16.

    They are the same sequence, so all gradients are multiples of one, by powers of two and therefore exact.
    """
    numbers = np.random.default_rng(0)
    ids, places, blank = numbers.integers(0, 96, 12), np.arange(4, 12), np.zeros(8, np.float32)
    sequence = Sequence(ids, places, blank, np.zeros(8, np.int64), 1.0)
    policy = Policy(policy_dir)
    logp = policy.logp(pack([sequence], np.ones(1), policy.layout)).numpy()
    return [[Sequence(ids, places, logp, np.zeros(8, np.int64), 1024.0 if not i else 1.0) for i in range(64)]]


def data_types(module: Any) -> tuple[Any, dict[str, Tensor]]:
    return module.trainer.strategy.deepspeed_engine.get_data_types(), float32_weights(module)


@pytest.mark.parametrize("strategy", ZERO)
def test_zero_sums_many_small_gradients_in_float32(strategy: str, two_ranks: RankPool, rounded_dir: str) -> None:
    steps = small_after_large(rounded_dir)
    settings: dict[str, Any] = {"precision": "bf16-mixed", "max_steps": 1, "probe": data_types}
    every, _ = two_ranks.run(train, rounded_dir, steps, strategy, "sgd", 32, **settings)
    large, _ = two_ranks.run(train, rounded_dir, [steps[0][:1]], strategy, "sgd", 1, **settings)
    for run in (every, large):
        types, run.found = run.found
        assert types == (torch.bfloat16, torch.float32)
    ratio = 64 * update(every, rounded_dir).norm() / update(large, rounded_dir).norm()  # of means over 64 and over 1
    assert ratio == pytest.approx((1024 + 63) / 1024, abs=0.003)


class Silent(EngineLess):
    """Can be validated without an engine."""

    def validation_step(self, groups: Any, batch_idx: int) -> None:
        pass


class OneBatch(Recorded):
    def val_dataloader(self) -> list[int]:
        return [0]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch if batch == 0 else batch.to(device)


class Buffers(pl.Callback):
    """The floating-point buffers of the policy, and the dtypes of its parameters, once a strategy has set it up."""

    found: tuple[dict[str, Tensor], set[torch.dtype]] | None = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.look(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.look(pl_module)

    def look(self, module: Any) -> None:
        buffers = {n: b.clone() for n, b in module.policy.named_buffers() if b.is_floating_point()}
        self.found = buffers, {parameter.dtype for parameter in module.policy.parameters()}


def cast_by(policy_dir: str, steps: Steps, strategy: str, precision: str, do: str) -> Any:
    """What a strategy and a precision make of a model, in ``fit`` or in ``validate``."""
    world = 1 if strategy == "one" else torch.distributed.get_world_size()
    buffers = Buffers()
    settings = QUIET | {"devices": world, "strategy": strategy_of(strategy), "max_steps": 1, "precision": precision}
    trainer = pl.Trainer(**settings, use_distributed_sampler=False, callbacks=[buffers])
    getattr(trainer, do)(Silent(policy_dir), datamodule=OneBatch(steps))
    return buffers.found


def assert_only_parameters_are_cast(found: Any, policy_dir: str) -> None:
    buffers, dtypes = found
    assert dtypes == {torch.bfloat16}
    wanted = {name: buffer for name, buffer in Policy(policy_dir).named_buffers() if buffer.is_floating_point()}
    assert any(name.endswith("inv_freq") for name in wanted)
    assert buffers.keys() == wanted.keys()
    for name, buffer in wanted.items():
        assert buffer.dtype == torch.float32
        assert torch.equal(buffers[name], buffer), name
        assert not torch.equal(buffer, buffer.bfloat16().float()) or "inv_freq" not in name


def test_one_device_in_true_16_bits_keeps_buffers(tiny_policy_dir: str, steps: Steps) -> None:
    found = cast_by(tiny_policy_dir, steps, "one", "bf16-true", "validate")
    assert_only_parameters_are_cast(found, tiny_policy_dir)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_in_true_16_bits_keep_buffers(
    strategy: str, two_ranks: RankPool, tiny_policy_dir: str, steps: Steps
) -> None:
    do = "fit" if strategy in ZERO else "validate"  # others refuse to train so
    for found in two_ranks.run(cast_by, tiny_policy_dir, steps, strategy, "bf16-true", do):
        assert_only_parameters_are_cast(found, tiny_policy_dir)


@pytest.fixture(scope="module")
def wide_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama whose layers are large and whose activations for a few tokens are small."""
    folder = str(tmp_path_factory.mktemp("models") / "wide")
    config = LlamaConfig(
        vocab_size=96, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    save_character_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def fresh_ranks() -> Iterator[RankPool]:
    """Ranks that have not run ZeRO-3, which puts its own in the place of torch's linear function for good."""
    pool = RankPool(2)
    yield pool
    pool.stop()


class Held:
    """Bytes that autograd holds of a forward pass once it has ended, and the elements of the decoder's layers."""

    def __call__(self, module: Any) -> tuple[int, int]:
        policy = module.policy
        alive: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            alive.append(tensor)
            return tensor

        batch = pack([module.data.steps[2][0]], np.ones(1), policy.layout)
        with (
            module.trainer.precision_plugin.forward_context(),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            hidden = policy.hidden_states(batch)
        held = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}.values())
        hidden.sum().backward()
        return held, sum(p.numel() for p in policy.model.model.layers.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fsdp2_holds_no_copy_of_a_layer_until_the_backward_pass(
    checkpointing: bool, fresh_ranks: RankPool, wide_dir: str
) -> None:
    steps = record(wide_dir)
    runs = fresh_ranks.run(
        train, wide_dir, steps, "fsdp2", precision="bf16-mixed", gradient_checkpointing=checkpointing, probe=Held()
    )
    for run in runs:
        held, elements = run.found
        assert held < 0.25 * 2 * elements  # a copy in 16 bits is 2 bytes an element


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fsdp2_with_norms_behind_a_layers_products(checkpointing: bool, two_ranks: RankPool, tmp_path: Path) -> None:
    """Norms are a group of their own in a layer, and here a norm is what runs last in it."""
    config = Olmo2Config(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=None, pad_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Olmo2ForCausalLM(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    model.save_pretrained(tmp_path)
    save_character_tokenizer(tmp_path)
    folder = str(tmp_path)
    steps = record(folder)
    settings: dict[str, Any] = {"precision": "bf16-mixed", "gradient_checkpointing": checkpointing}
    one = train(folder, steps, "one", **settings, probe=float32_weights)
    run, _ = two_ranks.run(train, folder, steps, "fsdp2", "sgd", 2, **settings, probe=float32_weights)
    assert distance(update(run, folder), update(one, folder)) < TOLERANCE


def test_norms_stay_in_float32_and_products_do_not(tiny_policy_dir: str) -> None:
    layer: nn.Module = next(iter(Policy(tiny_policy_dir).model.model.layers))  # type: ignore[union-attr]
    names = {id(module): name for name, module in layer.named_modules()}
    assert {names[id(module)] for module in in_float32(layer)} == {"input_layernorm", "post_attention_layernorm"}
