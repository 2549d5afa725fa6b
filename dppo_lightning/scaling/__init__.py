"""Training over several ranks: sharding strategies, and one controller over the ranks."""

from dppo_lightning.scaling.sharding import FSDP2Strategy
from dppo_lightning.scaling.zero import ZeroStrategy

__all__ = ["FSDP2Strategy", "ZeroStrategy"]
