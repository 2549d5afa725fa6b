"""Made-up sequences to train on."""

from __future__ import annotations

import numpy as np

from dppo_lightning.base.records import Completion, Prompt, Sequence


def make_sequences(
    prompts: int, samples: int, prompt_length: int, lengths: tuple[int, int], words: int
) -> list[Sequence]:
    """Groups of random ids, completion lengths uniform in ``lengths``, advantages normal."""
    rng = np.random.default_rng(0)
    sequences = []
    for index in range(prompts):
        prompt = Prompt(str(index), tuple(rng.integers(5, words, prompt_length).tolist()), "")
        for _ in range(samples):
            length = int(rng.integers(lengths[0], lengths[1] + 1))
            completion = Completion(
                request_id="",
                token_ids=rng.integers(5, words, length),
                logp=np.full(length, -10.0, np.float32),
                finish_reason="stop",
                versions=np.zeros(length, np.int64),
            )
            sequences.append(Sequence.from_completion(prompt, completion, float(rng.normal())))
    return sequences
