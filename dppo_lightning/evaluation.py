"""What held-out completions say: mean reward, avg@k and pass@k."""

from __future__ import annotations

import numpy as np

from dppo_lightning.batch import Group


def heldout_metrics(groups: list[Group], solved_at: float) -> dict[str, float]:
    """Means over held-out prompts.

    Args:
        groups: Rewarded; one for each held-out prompt, k completions each.
        solved_at: A completion is solved when its reward is at least this.

    Returns:
        ``heldout/reward``; ``heldout/avg_at_k``: mean share solved; ``heldout/pass_at_k``: share of prompts with at
        least one solved; ``heldout/length``: in tokens; ``heldout/part/<name>``: means of the reward's parts.
    """
    solved = [np.asarray(group.rewards) >= solved_at for group in groups]
    names = dict.fromkeys(name for group in groups for name in group.reward_parts)
    return {
        "heldout/reward": float(np.mean([np.mean(np.asarray(group.rewards)) for group in groups])),
        "heldout/avg_at_k": float(np.mean([mine.mean() for mine in solved])),
        "heldout/pass_at_k": float(np.mean([mine.any() for mine in solved])),
        "heldout/length": float(np.mean([len(c) for group in groups for c in group.completions])),
        **{
            f"heldout/part/{name}": float(
                np.nanmean(np.concatenate([g.reward_parts[name] for g in groups if name in g.reward_parts]))
            )
            for name in names
        },
    }
