"""Helpers of the engines' tests: a started engine, the model that it should behave like, and independent scoring."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from dppo_lightning.base.records import Completion
from dppo_lightning.generate.engine import EngineSpec, Failed, Request, RolloutEngine, Sampling

PROMPT = (7, 8, 9, 10, 11)
LONG = 400  # tokens of a completion that must not finish before a short one has


class Case:
    """An engine at weight version 0, and the model that it should behave like.

    Args:
        engine: Engine that was started with ``spec``.
        spec: Settings of the engine.
        model: A float32 transformers model with the weights of ``spec.model``.
    """

    def __init__(self, engine: RolloutEngine, spec: EngineSpec, model: PreTrainedModel) -> None:
        self.engine = engine
        self.spec = spec
        self.model = model

    def wait(self, count: int) -> dict[str, Completion | Failed]:
        """Poll until ``count`` results are there."""
        results: dict[str, Completion | Failed] = {}
        while len(results) < count:
            for result in self.engine.poll(timeout=10):
                assert result.request_id not in results
                results[result.request_id] = result
        return results

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Completions in the order of their requests."""
        self.engine.submit(requests)
        results = self.wait(len(requests))
        completions = [results[request.id] for request in requests]
        assert all(isinstance(completion, Completion) for completion in completions), completions
        return completions

    def begin_long(self) -> dict[str, Completion | Failed]:
        """Submit LONGS and a short one, and return when the short one has finished, with what finished before it.

        Those of LONGS that met no stop id have some tokens then, and are far from their end. On a machine with other
        work the engine may be done with all of them before this process runs again: then they are submitted again.
        """
        for _ in range(10):
            self.engine.submit([*LONGS, ask("short", max_new_tokens=8)])
            results = self.wait(1)
            while "short" not in results:
                results |= self.wait(1)
            if len(results) < len(LONGS) - 2:
                del results["short"]
                return results
            self.wait(len(LONGS) + 1 - len(results))
        raise AssertionError("the engine had finished every time before it was looked at")


def ask(name: str = "a", prompt: Sequence[int] = PROMPT, seed: int = 1, **sampling: float) -> Request:
    """Make a request; ``sampling`` are arguments of Sampling."""
    return Request(name, tuple(prompt), Sampling(**{"max_new_tokens": 16} | sampling), seed)  # type: ignore[arg-type]


LONGS = [ask(f"long/{i}", seed=i, max_new_tokens=LONG) for i in range(24)]


def forward_logp(
    model: PreTrainedModel, prompt: Sequence[int], completion: Completion, temperature: float = 1.0
) -> torch.Tensor:
    """[T, V] log-probs at the completion's positions, from one forward pass without cache."""
    ids = torch.tensor([[*prompt, *completion.token_ids.tolist()]])
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double()
    return (logits / temperature).log_softmax(-1)


def error(
    model: PreTrainedModel,
    completion: Completion,
    prompt: Sequence[int] = PROMPT,
    temperature: float = 1.0,
    where: np.ndarray | slice = slice(None),
) -> float:
    """Largest difference between the engine's log-probs and the model's."""
    full = forward_logp(model, prompt, completion, temperature)
    expected = full.gather(1, torch.from_numpy(completion.token_ids)[:, None])[:, 0].numpy()
    return float(np.abs(expected - completion.logp)[where].max())


def changed(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Copy a model and give the copy clearly different weights."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return other


def weights(model: PreTrainedModel) -> Iterable[tuple[str, torch.Tensor]]:
    """Give weights as a sharded trainer does: one at a time, each gone when the next one comes."""
    for name, parameter in model.named_parameters():
        gathered = parameter.detach().clone()
        yield name, gathered
        gathered.fill_(torch.nan)
