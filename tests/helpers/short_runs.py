"""What every run of the command line does for long, and alike: in tests a moment of it, or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest

from dppo_lightning.run.callbacks.utilisation import product_speed


@contextmanager
def shortened(curves: bool = False) -> Iterator[None]:
    """Measure the processor's speed for a hundredth of a second, and draw curves only where a test asks for them.

    The two are more than half the time of a run of a tiny model.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dppo_lightning.run.callbacks.utilisation.product_speed", partial(product_speed, seconds=0.01))
        if not curves:
            patch.setattr("dppo_lightning.run.callbacks.curves.draw_curves", lambda *_, **__: None)
        yield
