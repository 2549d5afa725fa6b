"""The exceptions of the package; the command line prints a DPPOError as one line and exits with code 2."""


class DPPOError(Exception):
    """Base class: one line that says what is wrong and what to change."""


class ConfigError(DPPOError, ValueError):
    """A setting is out of range, or two settings do not fit together."""


class DataError(DPPOError, ValueError):
    """A file or a row that the user supplied cannot be used; names the file and the line."""


class RewardError(DPPOError, RuntimeError):
    """A reward function returned something that is not one finite number per completion."""


class EngineError(DPPOError, RuntimeError):
    """The rollout engine could not be started, died, or refused a request."""


class SyncError(DPPOError, RuntimeError):
    """The engine's weights are not the policy's weights: wrong names, shapes, version or log-probs."""


class RankError(DPPOError, RuntimeError):
    """Something went wrong on one of several ranks; the same line on all of them names the rank and the cause."""


class Requeued(Exception):
    """The run is saved and its job is queued again: this process has nothing more to do, and nothing went wrong."""


def reason(error: BaseException) -> str:
    """What another library's error says, in one line: its first, its type where that tells more, and its cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A line that ends with a colon announces the next; a KeyError's message is a bare key.
    said = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    if not said or not isinstance(error, OSError | ValueError | RuntimeError | AssertionError):
        said = f"{type(error).__name__}: {said}" if said else type(error).__name__
    # Parsers' errors are often replaced by a vaguer one without naming them as its cause.
    cause = error.__cause__ or (error.__context__ if isinstance(error.__context__, ValueError) else None)
    if cause is None or (deeper := reason(cause)) in said:
        return said
    return f"{said.rstrip('.')} ({deeper})"
