"""Sources of questions give raw examples, ``encode`` tokenises them, the sampler orders them."""

from dppo_lightning.prompts.base import Example, PromptSets, PromptSource
from dppo_lightning.prompts.encoding import encode
from dppo_lightning.prompts.files import JsonlPrompts, ParquetPrompts
from dppo_lightning.prompts.gym import ReasoningGymPrompts
from dppo_lightning.prompts.huggingface import HuggingFacePrompts
from dppo_lightning.prompts.humaneval import HumanEvalPrompts
from dppo_lightning.prompts.sampler import PassRateCurriculum, PromptSampler, Shuffled

__all__ = [
    "Example",
    "HuggingFacePrompts",
    "HumanEvalPrompts",
    "JsonlPrompts",
    "ParquetPrompts",
    "PassRateCurriculum",
    "PromptSampler",
    "PromptSets",
    "PromptSource",
    "ReasoningGymPrompts",
    "Shuffled",
    "encode",
]
