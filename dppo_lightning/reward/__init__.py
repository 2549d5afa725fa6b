"""Rewards for completions, each named by its ``class_path``, and the contract for writing one."""

from dppo_lightning.reward.base import RewardFunction, Sample, Score
from dppo_lightning.reward.code import CodeReward
from dppo_lightning.reward.function import PythonReward
from dppo_lightning.reward.gym import ReasoningGymReward
from dppo_lightning.reward.math import MathReward
from dppo_lightning.reward.rewarding import Rewarding
from dppo_lightning.reward.text import ExactMatch, RegexMatch
from dppo_lightning.reward.weighted import WeightedSum

__all__ = [
    "CodeReward",
    "ExactMatch",
    "MathReward",
    "PythonReward",
    "ReasoningGymReward",
    "RegexMatch",
    "RewardFunction",
    "Rewarding",
    "Sample",
    "Score",
    "WeightedSum",
]
