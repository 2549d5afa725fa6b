"""Verb 4: from a rollout to optimizer steps."""
