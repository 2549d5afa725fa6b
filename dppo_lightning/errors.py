"""The exceptions for what a user can cause; the command line prints each as one line and exits with code 2."""


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
