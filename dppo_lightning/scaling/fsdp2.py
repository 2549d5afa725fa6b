"""FSDP2Strategy: PyTorch's own fully sharded data parallelism, over all ranks, on GPUs and on CPU ranks."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from lightning.pytorch.strategies import ModelParallelStrategy

from dppo_lightning.scaling.sharding import ShardingStrategy

if TYPE_CHECKING:
    from dppo_lightning.policy import Policy


class FSDP2Strategy(ShardingStrategy, ModelParallelStrategy):
    """Parameters, gradients and optimizer state in shards over all ranks; each decoder layer is gathered when it runs.

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

    def shard(self, policy: Policy) -> None:
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        mesh = self.device_mesh["data_parallel"]
        layers = set(getattr(policy.model, "_no_split_modules", None) or ())
        for module in policy.model.modules():
            if type(module).__name__ in layers:
                fully_shard(module, mesh=mesh)
        # the root holds embedding, norm and projection: whole from the hidden states until the head has used them
        fully_shard(policy, mesh=mesh, reshard_after_forward=False)
        register_fsdp_forward_method(policy, "hidden_states")

    def shard_frozen(self, reference: Policy) -> None:
        self.shard(reference)
