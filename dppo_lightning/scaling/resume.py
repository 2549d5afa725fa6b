"""Going on with another number of micro-batches per optimizer step than the run that was saved."""

from __future__ import annotations

from typing import Any


def count_batches_anew(checkpoint: dict[str, Any], accumulate_grad_batches: int) -> None:
    """Change the batch counts of a Lightning checkpoint, in place, to those of the run that goes on.

    Lightning ends an optimizer step wherever the count of batches is a multiple of ``accumulate_grad_batches``. The
    count comes from the checkpoint, so after 3 steps of one micro-batch the first step of two would end after one.

    Args:
        checkpoint: As given to ``on_load_checkpoint``; saved at the end of an optimizer step.
        accumulate_grad_batches: Of the run that goes on.
    """
    loops = checkpoint.get("loops", {}).get("fit_loop")
    if loops is None:
        return
    counts = loops["epoch_loop.batch_progress"]["current"]
    shift = checkpoint["global_step"] * accumulate_grad_batches - counts["ready"]
    for name in counts:  # they differ by one where the checkpoint was written inside a hook
        counts[name] += shift
