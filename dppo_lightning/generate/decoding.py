"""Decoder: one batch of completions, token by token, with a Hugging Face model and a key-value cache."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from dppo_lightning.base.records import Completion, FinishReason
from dppo_lightning.generate.engine import EngineSpec, Request, Sampling


@dataclass
class Row:
    """One request and what has been generated for it."""

    request: Request
    generator: torch.Generator | None = None
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    topk_ids: list[list[int]] = field(default_factory=list)
    topk_logp: list[list[float]] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def completion(self) -> Completion:
        """Make a record of what was generated."""
        assert self.finish_reason is not None
        shape = (len(self.tokens), self.request.sampling.topk_logprobs)
        return Completion(
            request_id=self.request.id,
            token_ids=np.array(self.tokens, np.int64),
            logp=np.array(self.logp, np.float32),
            finish_reason=self.finish_reason,
            versions=np.array(self.versions, np.int64),
            topk_ids=np.array(self.topk_ids, np.int64).reshape(shape) if shape[1] else None,
            topk_logp=np.array(self.topk_logp, np.float32).reshape(shape) if shape[1] else None,
        )


class Decoder:
    """Generator of up to B rows at a time. Rows are padded on the left, and leave the batch when they finish.

    Args:
        model: Model in evaluation mode.
        spec: Facts of the run: stop ids and the length limit.
    """

    def __init__(self, model: PreTrainedModel, spec: EngineSpec) -> None:
        self.model = model
        self.spec = spec
        self.rows: list[Row] = []
        self._cache: DynamicCache | None = None
        self._mask: Int[Tensor, "B L"] = torch.empty(0, 0, dtype=torch.int64)

    def begin(self, requests: Sequence[Request]) -> None:
        """Take the next batch; the last one has finished."""
        device = self.model.device
        self.rows = [Row(request, torch.Generator(device).manual_seed(request.seed)) for request in requests]
        self._cache = None

    def forget_cache(self) -> None:
        """Recompute keys and values at the next step, as after a weight update."""
        self._cache = None

    def remove(self, ids: Collection[str]) -> list[Row]:
        """Take rows out of the batch and return them."""
        removed = [row for row in self.rows if row.request.id in ids]
        self._keep([row.request.id not in ids for row in self.rows])
        return removed

    @torch.inference_mode()
    def step(self, version: int) -> list[Row]:
        """Generate one token for every row, stamped with ``version``; returns the rows that finished with it."""
        logits = self._prefill() if self._cache is None else self._decode()
        logp = sampling_logp(logits.float(), [row.request.sampling for row in self.rows])
        tokens = self._draw(logp)
        chosen = logp.gather(1, tokens[:, None])[:, 0].tolist()
        for row, token, value in zip(self.rows, tokens.tolist(), chosen, strict=True):
            row.tokens.append(token)
            row.logp.append(value)
            row.versions.append(version)
            row.finish_reason = self._finish_reason(row)
        self._record_topk(logp)
        finished = [row for row in self.rows if row.finish_reason is not None]
        self._keep([row.finish_reason is None for row in self.rows])
        return finished

    def _prefill(self) -> Float[Tensor, "B V"]:
        """Compute the logits after everything that each row holds; a prompt that requests share is computed once."""
        texts = [(*row.request.prompt_token_ids, *row.tokens) for row in self.rows]
        index = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        width = max(len(text) for text in index)
        ids = torch.tensor([(0,) * (width - len(text)) + text for text in index], device=self.model.device)
        padding = torch.tensor([width - len(text) for text in index], device=self.model.device)
        mask = (torch.arange(width, device=self.model.device) >= padding[:, None]).long()
        self._cache = DynamicCache(config=self.model.config)
        logits = self._forward(ids, mask, (mask.cumsum(1) - 1).clamp(min=0))
        spread = torch.tensor([index[text] for text in texts], device=self.model.device)
        self._cache.batch_select_indices(spread)
        self._mask = mask[spread]
        return logits[spread]

    def _decode(self) -> Float[Tensor, "B V"]:
        """Compute the logits after the last token of each row."""
        ids = torch.tensor([[row.tokens[-1]] for row in self.rows], device=self.model.device)
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        return self._forward(ids, self._mask, self._mask.sum(1, keepdim=True) - 1)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Float[Tensor, "B V"]:
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def _draw(self, logp: Float[Tensor, "B V"]) -> Int[Tensor, " B"]:
        """Draw a token of each row, by Gumbel-max with the row's own noise.

        The largest of log p - log E, with E exponential, is a draw from p. Unlike a search in the cumulative
        distribution it keeps its answer under rounding of p, which depends on the batch.
        """
        scores = logp.clone()
        for score, row in zip(scores, self.rows, strict=True):
            if row.request.sampling.temperature > 0:
                score -= torch.empty_like(score).exponential_(generator=row.generator).log_()
        return scores.argmax(dim=1)

    def _record_topk(self, logp: Float[Tensor, "B V"]) -> None:
        most = max(row.request.sampling.topk_logprobs for row in self.rows)
        if most == 0:
            return
        values, ids = logp.topk(most, dim=1)
        for row, row_values, row_ids in zip(self.rows, values.tolist(), ids.tolist(), strict=True):
            wanted = row.request.sampling.topk_logprobs
            row.topk_logp.append(row_values[:wanted])
            row.topk_ids.append(row_ids[:wanted])

    def _finish_reason(self, row: Row) -> FinishReason | None:
        if row.tokens[-1] in self.spec.stop_token_ids:
            return "stop"
        left = self.spec.max_model_len - len(row.request.prompt_token_ids)
        return "length" if len(row.tokens) >= min(left, row.request.sampling.max_new_tokens) else None

    def _keep(self, keep: list[bool]) -> None:
        """Drop rows from the batch and from the cache."""
        if all(keep):
            return
        self.rows = [row for row, stays in zip(self.rows, keep, strict=True) if stays]
        if self._cache is not None:
            places = torch.tensor([i for i, stays in enumerate(keep) if stays], device=self.model.device)
            with torch.inference_mode():
                self._cache.batch_select_indices(places.long())
                self._mask = self._mask[places.long()]


def sampling_logp(logits: Float[Tensor, "B V"], samplings: Sequence[Sampling]) -> Float[Tensor, "B V"]:
    """Compute the log-probs of the distributions that tokens are drawn from; tokens that truncation removes are -inf.

    Greedy rows (temperature 0) are at temperature 1 and never truncated.
    """
    temperatures = [sampling.temperature or 1.0 for sampling in samplings]
    logits = logits / torch.tensor(temperatures, dtype=torch.float32, device=logits.device)[:, None]
    for row, sampling in enumerate(samplings):
        if sampling.temperature > 0 and (sampling.top_k > 0 or sampling.top_p < 1):
            logits[row] = logits[row].masked_fill(~_kept(logits[row], sampling), -torch.inf)
    return logits.log_softmax(dim=1)


def _kept(logits: Float[Tensor, " V"], sampling: Sampling) -> Bool[Tensor, " V"]:
    """Mark the ``top_k`` most likely tokens, and of those the fewest whose probabilities reach ``top_p``."""
    ordered, order = logits.sort(descending=True, stable=True)
    if 0 < sampling.top_k < len(ordered):
        ordered[sampling.top_k :] = -torch.inf
    probability = ordered.softmax(0)
    kept = (probability > 0) & (probability.cumsum(0) - probability < sampling.top_p)
    return torch.zeros_like(kept).scatter(0, order, kept)
