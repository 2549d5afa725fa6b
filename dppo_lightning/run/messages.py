"""What the terminal shows of a command: our own messages and errors, without secrets; little of other libraries."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import format_exception
from types import TracebackType

import transformers

from dppo_lightning.base.errors import DPPOError
from dppo_lightning.base.secrets import hide


def silence_other_libraries() -> None:
    """Leave the screen to our own messages, the start table, the progress bar and the summary."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    transformers.utils.logging.disable_progress_bar()
    # accelerate imports DeepSpeed where it is installed, and DeepSpeed then prints this line in every run
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


@contextmanager
def own_messages() -> Iterator[None]:
    """Show the messages of this library on the screen."""
    own, handler = logging.getLogger("dppo_lightning"), logging.StreamHandler(sys.stdout)
    own.setLevel(logging.INFO)
    handler.addFilter(without_secrets)
    own.addHandler(handler)
    try:
        yield
    finally:
        own.removeHandler(handler)


def without_secrets(record: logging.LogRecord) -> bool:
    """Take secrets out of a message that is logged, in place."""
    record.msg, record.args = hide(record.getMessage()), None
    return True


def print_error(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print a traceback without secrets; for ``sys.excepthook``."""
    print(hide("".join(format_exception(kind, error, traceback))), end="", file=sys.stderr)


def find_mistake(error: BaseException | None) -> DPPOError | None:
    """Find the DPPOError in a chain of causes; jsonargparse wraps the errors of constructors in errors of its own."""
    while error is not None and not isinstance(error, DPPOError):
        error = error.__cause__
    return error
