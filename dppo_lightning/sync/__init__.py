"""Verb 5: sends the policy's weights to the engine, and proves that they arrived."""
