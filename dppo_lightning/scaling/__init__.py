"""Training over several ranks: sharding strategies, one controller over the ranks, whole weights from shards."""
