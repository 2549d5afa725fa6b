"""ShardingStrategy: cuts policy and reference into shards once they are loaded; and FSDP2Strategy, which is one.

Beside it what an optimizer step needs to know of the strategy: the gradient's norm, whether it is finite, and how a
step is not taken.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D


class ShardingStrategy:
    """Mixin for a Lightning strategy, with the hooks that DPPOModule.configure_model calls."""

    def shard(self, policy: nn.Module) -> None:
        """Cut the policy that is trained into shards, where the strategy does not do so on its own.

        Args:
            policy: Policy that has the language model as ``model``, and is run by ``hidden_states`` and by its head.
        """

    def shard_frozen(self, reference: nn.Module) -> None:
        """Cut a policy that is only scored with, and that is no part of the trained module."""

    @contextmanager
    def scoring(self) -> Generator[None, None, None]:
        """Context for passes without gradient, outside of training's own forward and backward."""
        yield

    def gradient_is_finite(self, norm: float) -> bool:
        """Whether the gradient of the step that is about to be taken is finite; collective.

        Args:
            norm: The gradient's norm, as ``gradient_norm`` finds it.
        """
        return math.isfinite(norm)

    def gradient_of(self, parameter: nn.Parameter) -> Tensor | None:
        """What this rank may see of a parameter's gradient before the step, or None; collective."""
        return local_part(parameter.grad)

    def discard_step(self) -> None:
        """Let go of the step's gradient, and take no step.

        Raises:
            StepNotTaken: Leaves the optimizer, which has done nothing yet.
        """
        raise StepNotTaken

    @property
    def step_was_dropped(self) -> bool:
        """Whether the strategy did not take the last step, on its own account."""
        return False


class StepNotTaken(Exception):
    """Ends an optimizer's step before anything is changed; whoever asks for the step catches it."""


def as_sharding(strategy: Strategy) -> ShardingStrategy:
    """The strategy's own hooks; of one that keeps the model whole, the mixin's, which need nothing of it."""
    return strategy if isinstance(strategy, ShardingStrategy) else ShardingStrategy()


def local_part(tensor: Tensor | None) -> Tensor | None:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard(strategy: Strategy, policy: nn.Module) -> None:
    """Cut the trained policy into shards if the strategy is of that kind."""
    if isinstance(strategy, ShardingStrategy):
        strategy.shard(policy)


def shard_frozen(strategy: Strategy, reference: nn.Module) -> None:
    """Cut a reference into shards if the strategy is of that kind."""
    if isinstance(strategy, ShardingStrategy):
        strategy.shard_frozen(reference)


def scoring(strategy: Strategy) -> AbstractContextManager[None]:
    """Context for passes without gradient; it does nothing where the model is whole."""
    return strategy.scoring() if isinstance(strategy, ShardingStrategy) else nullcontext()


def gradient_norm(optimizer: torch.optim.Optimizer) -> float:
    """Norm of all gradients of an optimizer's parameters; collective where they are DTensors."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


@contextmanager
def standing_still(optimizer: torch.optim.Optimizer) -> Generator[None, None, None]:
    """A learning rate of 0, which every strategy's optimizer understands, for the block."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * 0  # of the same kind, a number or a tensor
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


class FSDP2Strategy(ShardingStrategy, ModelParallelStrategy):
    """Shards of parameters, gradients and optimizer state over all ranks; a decoder layer is gathered when it runs.

    Under "bf16-mixed" a layer is gathered in bfloat16, and its gradient is summed over ranks in float32. Autocast alone
    would gather float32, and keep a bfloat16 copy of every layer from the forward pass to the backward pass. What
    autocast leaves in float32 stays so: norms, embeddings, activations between layers.

    Lightning's default would cut the model over the devices of a node by tensor parallelism, which nothing here sets
    up, and the ranks would train apart from each other without a word.

    Args:
        save_distributed_checkpoint: Save a folder with one file per rank, instead of one file that rank 0 assembles.
        timeout_minutes: Longest time of one collective operation of training, in minutes; waiting for a rollout is not
            one.
    """

    def __init__(self, save_distributed_checkpoint: bool = True, timeout_minutes: float = 30.0) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            timeout=timedelta(minutes=timeout_minutes),
        )

    def setup_environment(self) -> None:
        # Private to Lightning: its constructor does not know the number of ranks, and by default it puts the number of
        # nodes here. Without this line it refuses the mesh, whose sizes do not multiply to the number of ranks.
        self._data_parallel_size = self.world_size
        super().setup_environment()

    def shard(self, policy: nn.Module) -> None:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        mesh = self.device_mesh["data_parallel"]
        model: Any = policy.model
        policy_of_layers = MixedPrecisionPolicy()
        if self.precision_plugin.precision == "bf16-mixed":
            # inputs are left alone: autocast rounds those of products, and what is between them stays float32
            policy_of_layers = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        # The only place where transformers names the class of a decoder layer. Without it nothing but the root is cut,
        # and the whole model is gathered at once.
        names = set(getattr(model, "_no_split_modules", None) or ())
        for layer in [module for module in model.modules() if type(module).__name__ in names]:
            exact = in_float32(layer) if policy_of_layers.param_dtype else []
            if exact:  # whole from first use to the backward pass, for they are small
                fully_shard(exact, mesh=mesh, reshard_after_forward=False)
            fully_shard(layer, mesh=mesh, mp_policy=policy_of_layers)
        # The root holds embedding, norm and projection: whole from the hidden states until the head has used them. In
        # float32: a weight update reads what is whole as it is, and the head sums the projection's gradient so.
        fully_shard(policy, mesh=mesh, reshard_after_forward=False)
        register_fsdp_forward_method(policy, "hidden_states")

    def shard_frozen(self, reference: nn.Module) -> None:
        self.shard(reference)


def in_float32(layer: nn.Module) -> list[nn.Module]:
    """Modules of a layer whose own parameters autocast leaves in float32: norms, and what has gates of its own.

    Such a module owns a vector and is neither a linear layer nor a convolution.
    """
    # torch exports no common base of its convolutions: without _ConvNd one with a bias would count as a norm
    products = (nn.Linear, Conv1D, nn.modules.conv._ConvNd)
    found = [
        module
        for module in layer.modules()
        if not isinstance(module, products) and any(p.ndim < 2 for p in module.parameters(recurse=False))
    ]
    inner = {id(module) for outer in found for module in outer.modules() if module is not outer}
    return [module for module in found if id(module) not in inner]
