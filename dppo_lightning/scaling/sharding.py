"""What a strategy that cuts a model into shards does with the policy and the reference once they are loaded."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from lightning.pytorch.strategies import Strategy

if TYPE_CHECKING:
    from dppo_lightning.policy import Policy


class ShardingStrategy:
    """Mixed into a Lightning strategy: the hooks of DPPOModule.configure_model."""

    def shard(self, policy: Policy) -> None:
        """Cut the policy that is trained into shards, where the strategy does not do so on its own."""

    def shard_frozen(self, reference: Policy) -> None:
        """Cut a policy that is only scored with, and that is no part of the trained module."""

    @contextmanager
    def scoring(self) -> Generator[None, None, None]:
        """Around passes without gradient, outside of training's own forward and backward."""
        yield


def shard(strategy: Strategy, policy: Policy) -> None:
    """Cut the trained policy into shards if the strategy is of that kind."""
    if isinstance(strategy, ShardingStrategy):
        strategy.shard(policy)


def shard_frozen(strategy: Strategy, reference: Policy) -> None:
    """Cut a reference into shards if the strategy is of that kind."""
    if isinstance(strategy, ShardingStrategy):
        strategy.shard_frozen(reference)


def scoring(strategy: Strategy) -> AbstractContextManager[None]:
    """Around passes without gradient; nothing to do where the model is whole."""
    return strategy.scoring() if isinstance(strategy, ShardingStrategy) else nullcontext()
