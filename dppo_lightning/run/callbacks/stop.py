"""SavedStop: ends a run early, saved; and StopOnSignal, which does so on Ctrl-C and SIGTERM."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from dppo_lightning.base.errors import Stopped
from dppo_lightning.run.callbacks.checkpoint import Checkpoint, data_of
from dppo_lightning.train.hooks import RunCallback, StopWaiting


class SavedStop(RunCallback):
    """Base of what ends a run, saved: between two optimizer steps, or instead of waiting for a rollout.

    Subclasses write ``requested`` and ``leave``.
    """

    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        raise NotImplementedError

    def leave(self, trainer: pl.Trainer, saved: Path) -> None:
        """End the run, on every rank: raise Stopped.

        Args:
            trainer: Trainer of the run.
            saved: Checkpoint of the run as it is now.
        """
        raise NotImplementedError

    def on_generation_progress(self, trainer: pl.Trainer, done: int, total: int) -> None:
        if self.requested():
            raise StopWaiting

    def on_rollout_given_up(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_if_requested(trainer)

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step < trainer.max_steps:  # else it ends in any case
            self._stop_if_requested(trainer)

    def _stop_if_requested(self, trainer: pl.Trainer) -> None:
        # the signal reaches the ranks at different times
        if trainer.strategy.reduce_boolean_decision(self.requested(), all=False):
            callbacks = trainer.callbacks  # type: ignore[attr-defined]
            checkpoint = next(callback for callback in callbacks if isinstance(callback, Checkpoint))
            self.leave(trainer, checkpoint.save(trainer, settle=False))


class StopOnSignal(SavedStop):
    """On Ctrl-C (SIGINT) or SIGTERM: finish the optimizer step, save, say how to go on, and end.

    A second signal ends the run at once. SIGINT stays ignored where it was, as in a background job of a script. The
    exit code is 128 plus the number of the signal: 130 or 143.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._training = False
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Notice the signals from now on; call in the main thread."""
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if handler is not signal.SIG_IGN and handler != self._on_signal:
                self._before.setdefault(number, handler)
                signal.signal(number, self._on_signal)

    def forget(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _on_signal(self, number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        if not self._training:
            raise Stopped(f"{name}: ended before training began, nothing was saved", 128 + number)
        if self.received is not None:
            raise Stopped(f"{name} again: ended at once, without the step that was running", 128 + number)
        self.received = number
        print(f"\n{name}: the run is saved after this step; a second signal ends it at once", flush=True)

    def requested(self) -> bool:
        return self.received is not None

    def leave(self, trainer: pl.Trainer, saved: Path) -> None:
        ranks = data_of(trainer).ranks
        assert ranks is not None
        numbers = [number for number in ranks.all_gather(self.received) if number is not None]
        self._training = False
        raise Stopped(
            f"saved after step {trainer.global_step} in {saved}; go on with: "
            f"dppo fit --resume {trainer.default_root_dir}",
            128 + numbers[0],
            on_every_rank=True,
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning has put a handler of its own before ours for SIGTERM. It would end the run in the middle of what
        # follows the step, and it calls collectives in the handler, where the ranks are not at the same place.
        for number in self._before:
            signal.signal(number, self._on_signal)
        self._training = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._training = False

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._training = False
