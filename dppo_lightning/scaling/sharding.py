"""What a strategy that cuts a model into shards does with the policy and the reference once they are loaded."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from lightning.pytorch.strategies import Strategy
from torch import nn
from torch.distributed.tensor import DTensor


class ShardingStrategy:
    """Mixed into a Lightning strategy: the hooks of DPPOModule.configure_model."""

    def shard(self, policy: nn.Module) -> None:
        """Cut the policy that is trained into shards, where the strategy does not do so on its own.

        Args:
            policy: Has the language model as ``model``, and is run by ``hidden_states`` and by its head.
        """

    def shard_frozen(self, reference: nn.Module) -> None:
        """Cut a policy that is only scored with, and that is no part of the trained module."""

    @contextmanager
    def scoring(self) -> Generator[None, None, None]:
        """Around passes without gradient, outside of training's own forward and backward."""
        yield


def shard(strategy: Strategy, policy: nn.Module) -> None:
    """Cut the trained policy into shards if the strategy is of that kind."""
    if isinstance(strategy, ShardingStrategy):
        strategy.shard(policy)


def shard_frozen(strategy: Strategy, reference: nn.Module) -> None:
    """Cut a reference into shards if the strategy is of that kind."""
    if isinstance(strategy, ShardingStrategy):
        strategy.shard_frozen(reference)


def scoring(strategy: Strategy) -> AbstractContextManager[None]:
    """Around passes without gradient; nothing to do where the model is whole."""
    return strategy.scoring() if isinstance(strategy, ShardingStrategy) else nullcontext()


def gradient_norm(optimizer: torch.optim.Optimizer) -> float:
    """Norm of all gradients of an optimizer's parameters; collective where they are DTensors."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
