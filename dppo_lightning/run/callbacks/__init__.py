"""Callbacks that write, print and evaluate a run; any of them can be named in ``trainer.callbacks``."""

from dppo_lightning.run.callbacks.checkpoint import Checkpoint
from dppo_lightning.run.callbacks.curves import Curves
from dppo_lightning.run.callbacks.health import Health
from dppo_lightning.run.callbacks.heldout import HeldOutEvaluation
from dppo_lightning.run.callbacks.mask_audit import MaskAudit
from dppo_lightning.run.callbacks.profile import Profile
from dppo_lightning.run.callbacks.record import CompletionLog, RunRecord, TimelineLog
from dppo_lightning.run.callbacks.screen import RunProgressBar, StartTable, Summary
from dppo_lightning.run.callbacks.stop import StopOnSignal
from dppo_lightning.run.callbacks.utilisation import Utilisation

__all__ = [
    "Checkpoint",
    "CompletionLog",
    "Curves",
    "Health",
    "HeldOutEvaluation",
    "MaskAudit",
    "Profile",
    "RunProgressBar",
    "RunRecord",
    "StartTable",
    "StopOnSignal",
    "Summary",
    "TimelineLog",
    "Utilisation",
]
