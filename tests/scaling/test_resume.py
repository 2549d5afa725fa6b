"""A checkpoint that a run with another number of micro-batches goes on from."""

from __future__ import annotations

import pytest

from dppo_lightning.scaling.resume import recount_batches


@pytest.mark.parametrize("now", [1, 2, 5])
@pytest.mark.parametrize("before", [1, 3])
def test_batches_are_counted_as_if_every_step_had_had_as_many(before: int, now: int) -> None:
    counts = {"ready": 7 * before, "started": 7 * before, "processed": 7 * before, "completed": 7 * before - 1}
    checkpoint = {"global_step": 7, "loops": {"fit_loop": {"epoch_loop.batch_progress": {"current": counts}}}}
    recount_batches(checkpoint, accumulate_grad_batches=now)
    assert counts == {"ready": 7 * now, "started": 7 * now, "processed": 7 * now, "completed": 7 * now - 1}


def test_a_checkpoint_of_weights_alone_has_no_counts() -> None:
    checkpoint = {"global_step": 7}
    recount_batches(checkpoint, accumulate_grad_batches=2)
    assert checkpoint == {"global_step": 7}
