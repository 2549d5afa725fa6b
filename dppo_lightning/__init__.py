"""Reinforcement learning for language models with divergence-based trust regions (DPPO), on PyTorch Lightning."""
