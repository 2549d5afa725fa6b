"""Reinforcement learning for language models with divergence-based trust regions (DPPO), on PyTorch Lightning.

    generate  ->  reward  ->  advantage  ->  train  ->  sync

The names in ``__init__.pyi`` are loaded when they are used: importing the package costs nothing.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
