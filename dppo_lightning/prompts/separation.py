"""What makes two examples the same question, so that none is both trained on and held out."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

from dppo_lightning.prompts.base import Example


def question_key(example: Example) -> Hashable:
    """Equal for examples that ask the same; surrounding white space does not count, nor does chat or plain text."""
    if example.messages is None:
        return (("user", (example.prompt or "").strip()),)
    return tuple((message["role"], message["content"].strip()) for message in example.messages)


def distinct_places(examples: Iterable[Example]) -> list[int]:
    """Places of the examples whose question has not occurred before them."""
    seen: dict[Hashable, int] = {}
    for place, example in enumerate(examples):
        seen.setdefault(question_key(example), place)
    return list(seen.values())


def without(examples: Sequence[Example], heldout: Iterable[Example]) -> list[Example]:
    """The examples whose question is not among the held-out ones, in order."""
    taken = {question_key(example) for example in heldout}
    return [example for example in examples if question_key(example) not in taken] if taken else list(examples)
