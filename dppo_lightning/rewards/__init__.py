"""What completions are worth: rewards that can be named by ``class_path``, and the contract for writing one."""

from dppo_lightning.rewards.base import RewardFunction, Sample, Score
from dppo_lightning.rewards.function import PythonReward
from dppo_lightning.rewards.gym import ReasoningGymReward
from dppo_lightning.rewards.math import MathReward
from dppo_lightning.rewards.text import ExactMatch, RegexMatch
from dppo_lightning.rewards.weighted import WeightedSum

__all__ = [
    "ExactMatch",
    "MathReward",
    "PythonReward",
    "ReasoningGymReward",
    "RegexMatch",
    "RewardFunction",
    "Sample",
    "Score",
    "WeightedSum",
]
