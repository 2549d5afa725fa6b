"""Records of a run as plain values and tensors, for a checkpoint that is loaded without running code; and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dppo_lightning.base.records import Completion, Failure, Group, Prompt


def save_completion(completion: Completion) -> dict[str, Any]:
    """Return a completion's state."""
    return {name: as_plain(value) for name, value in vars(completion).items()}


def load_completion(state: Mapping[str, Any]) -> Completion:
    """Make the completion that ``save_completion`` was given."""
    return Completion(**{name: from_plain(value) for name, value in state.items()})


def save_group(group: Group) -> dict[str, Any]:
    """Return a group's state; of the prompt only its id."""
    apart: dict[str, Any] = {
        "prompt": group.prompt.id,
        "completions": [save_completion(completion) for completion in group.completions],
        "failures": [None if failure is None else tuple(failure) for failure in group.failures],
    }
    return {name: as_plain(value) for name, value in vars(group).items() if name not in apart} | apart


def load_group(state: Mapping[str, Any], prompts: Mapping[str, Prompt]) -> Group:
    """Make the group that ``save_group`` was given.

    Args:
        state: Its state.
        prompts: Training prompts by their ids, among them the group's.
    """
    apart: dict[str, Any] = {
        "prompt": prompts[state["prompt"]],
        "completions": [load_completion(completion) for completion in state["completions"]],
        "failures": [None if failure is None else Failure(*failure) for failure in state["failures"]],
    }
    rest = {name: from_plain(value) for name, value in state.items() if name not in apart}
    return Group(**rest, **apart)


def as_plain(value: Any) -> Any:
    """Turn arrays, also those in lists and dicts, into tensors."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, list):
        return [as_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: as_plain(item) for name, item in value.items()}
    return value


def from_plain(value: Any) -> Any:
    """Undo ``as_plain``."""
    if isinstance(value, Tensor):
        return value.numpy()
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: from_plain(item) for name, item in value.items()}
    return value
