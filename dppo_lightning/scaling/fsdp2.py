"""FSDP2Strategy: PyTorch's own fully sharded data parallelism, over all ranks, on GPUs and on CPU ranks."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from transformers.pytorch_utils import Conv1D

from dppo_lightning.scaling.sharding import ShardingStrategy


class FSDP2Strategy(ShardingStrategy, ModelParallelStrategy):
    """Parameters, gradients and optimizer state in shards over all ranks; each decoder layer is gathered when it runs.

    Under "bf16-mixed" a layer is gathered in bfloat16, and its gradient is summed over ranks in float32. Autocast alone
    would gather float32, and keep a bfloat16 copy of every layer from the forward pass to the backward pass. What
    autocast leaves in float32 stays so: norms, embeddings, activations between layers.

    Lightning's default would cut the model over the devices of a node by tensor parallelism, which nothing here sets
    up, and the ranks would train apart from each other without a word.

    Args:
        save_distributed_checkpoint: A folder with one file per rank, instead of one file that rank 0 assembles.
        timeout_minutes: Of one collective operation of training; waiting for a rollout is not one.
    """

    def __init__(self, save_distributed_checkpoint: bool = True, timeout_minutes: float = 30.0) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            timeout=timedelta(minutes=timeout_minutes),
        )

    def setup_environment(self) -> None:
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
    """The modules of a layer whose own parameters autocast leaves in float32: norms, and what has gates of its own.

    Such a module owns a vector and is neither a linear layer nor a convolution.
    """
    products = (nn.Linear, Conv1D, nn.modules.conv._ConvNd)
    found = [
        module
        for module in layer.modules()
        if not isinstance(module, products) and any(p.ndim < 2 for p in module.parameters(recurse=False))
    ]
    inner = {id(module) for outer in found for module in outer.modules() if module is not outer}
    return [module for module in found if id(module) not in inner]
