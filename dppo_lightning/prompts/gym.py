"""ReasoningGymPrompts: generated questions with exact scorers."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from dppo_lightning.base.errors import ConfigError, DataError, one_line, require
from dppo_lightning.prompts.base import (
    PLACE,
    Example,
    Framing,
    PromptSets,
    PromptSource,
    distinct_places,
    question_key,
    without,
)

log = logging.getLogger(__name__)


class ReasoningGymPrompts(PromptSource):
    """Questions of one reasoning-gym task, drawn from the seed; held-out questions are never trained on.

    ``columns`` of each example holds "task" and "entry", the task's own record of the question, for its scorer.

    Args:
        task: Name of a task of reasoning-gym, such as "chain_sum".
        train: Number of training questions to draw, >= 1. Those that are held out are removed; repeated ones stay.
            Most tasks draw thousands in a second, a few puzzles only some.
        heldout: Number of different held-out questions, >= 0; they do not depend on ``train``.
        seed: Seed of all questions, >= 0; different seeds draw independently.
        parameters: Parameters of the task, such as {"max_terms": 3}.
        template: Text around the question, with ``{question}`` in it.
        chat: Give the text as the user's message of a chat.
        system: System message of that chat.
        lowercase: Lower-case question and answer, for character models with a small alphabet.

    Raises:
        ConfigError: A number is out of range, or two settings do not fit together.
    """

    def __init__(
        self,
        task: str,
        train: int = 10_000,
        heldout: int = 200,
        seed: int = 0,
        parameters: dict[str, Any] | None = None,
        template: str = PLACE,
        chat: bool = False,
        system: str | None = None,
        lowercase: bool = False,
    ) -> None:
        for name, value, least in (("train", train, 1), ("heldout", heldout, 0), ("seed", seed, 0)):
            if value < least:
                raise ConfigError(f"{name} must be >= {least}, got {value}")
        self.task = task
        self.train = train
        self.heldout = heldout
        self.seed = seed
        self.parameters = dict(parameters or {})
        self.framing = Framing(template, chat, system)
        self.lowercase = lowercase

    def load(self) -> PromptSets:
        check_task(self.task, self.parameters)
        # The library seeds item i with seed + i, so neighbouring seeds give almost the same questions: draw far ones.
        train_seed, heldout_seed = (int(state) >> 1 for state in np.random.SeedSequence(self.seed).generate_state(2))
        with _global_rngs_restored():
            heldout = self._draw_heldout(heldout_seed)
            drawn = list(self._generate(self.train, train_seed))
        train = without(drawn, heldout)
        if not train:
            raise DataError(
                f"task {self.task!r}: all {self.train} training questions are held out: lower heldout, or widen the "
                "task's parameters"
            )
        log.info(
            f"{self.task}: {len(train)} training questions ({len(distinct_places(train))} different), "
            f"{len(heldout)} held out; {len(drawn) - len(train)} removed from training because they are held out"
        )
        return PromptSets(train, heldout)

    def _draw_heldout(self, seed: int) -> list[Example]:
        if self.heldout == 0:
            return []
        draws = 20 * self.heldout + 100
        found: dict[Any, Example] = {}
        for example in self._generate(draws, seed):
            found.setdefault(question_key(example), example)
            if len(found) == self.heldout:
                return list(found.values())
        raise DataError(
            f"task {self.task!r} gave {len(found)} different questions in {draws} draws, fewer than "
            f"heldout={self.heldout}: lower heldout, or widen the task's parameters"
        )

    def _generate(self, size: int, seed: int) -> Iterator[Example]:
        # A few tasks draw from the global generators.
        random.seed(seed)
        np.random.seed(seed)
        try:
            table = require("reasoning_gym").create_dataset(self.task, size=size, seed=seed, **self.parameters)
        except (TypeError, ValueError, AssertionError, AttributeError, LookupError, OSError) as error:
            raise ConfigError(f"task {self.task!r} refuses its parameters: {one_line(error)}") from error
        for place in range(size):
            try:
                entry = table[place]
            except Exception as error:  # a generator may raise anything
                raise DataError(f"task {self.task!r} cannot make question {place}: {one_line(error)}") from error
            yield self._example(entry)

    def _example(self, entry: dict[str, Any]) -> Example:
        """Make the example of an entry.

        The entry is kept as it is: some scorers compare its tuples, so it must not pass through JSON.
        """
        if self.lowercase:
            answer = entry["answer"]
            entry = entry | {
                "question": entry["question"].lower(),
                "answer": answer.lower() if isinstance(answer, str) else answer,
            }
        return self.framing.example(entry["question"], entry["answer"], {"task": self.task, "entry": entry})


def check_task(task: str, parameters: dict[str, Any]) -> None:
    """Check the names of a task and of its parameters.

    Raises:
        ConfigError: reasoning-gym is not installed, or has no such task, or the task has no such parameter.
    """
    known: dict[str, tuple[type, type]] = require("reasoning_gym.factory").DATASETS
    if task == "composite":
        raise ConfigError("task 'composite' has no scorer of its own: name one of the tasks that it is made of")
    if task not in known:
        near = difflib.get_close_matches(task, known, n=5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(sorted(known))}"
        raise ConfigError(f"reasoning-gym has no task {task!r}: {hint}")
    fields = [field.name for field in dataclasses.fields(known[task][1]) if field.name not in ("seed", "size")]
    for name in parameters:
        if name in ("seed", "size"):
            raise ConfigError(f"parameters must not hold {name!r}: set train, heldout and seed of the prompts instead")
        if name not in fields:
            raise ConfigError(f"task {task!r} has no parameter {name!r}: it has {', '.join(fields) or 'none'}")


@contextmanager
def _global_rngs_restored() -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
