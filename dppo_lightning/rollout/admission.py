"""Admission: the requests that no engine can serve, found before they are queued."""

from __future__ import annotations

from dppo_lightning.rollout.engine import EngineSpec, Request


def refusal(request: Request, spec: EngineSpec, vocabulary: int) -> str | None:
    """Why a request cannot be served, or None when it can.

    Args:
        request: What was asked for.
        spec: What the engine was started with.
        vocabulary: Number of token ids that the model knows.
    """
    length = len(request.prompt_token_ids)
    if length == 0:
        return "the prompt is empty"
    if length >= spec.max_model_len:
        return f"the prompt has {length} tokens and leaves no room to generate below max_model_len {spec.max_model_len}"
    for token in (min(request.prompt_token_ids), max(request.prompt_token_ids)):
        if not 0 <= token < vocabulary:
            return f"token id {token} is outside the vocabulary of {vocabulary}"
    most = min(spec.max_logprobs, vocabulary)
    if request.sampling.topk_logprobs > most:
        return f"{request.sampling.topk_logprobs} log-probs a position were asked for, at most {most} are available"
    return None
