"""Attention over sequences that lie one after another in a single row, without padding and with shared prompts.

A row of T tokens is cut into segments: the whole of a sequence, or, where several sequences begin alike, the part that
they share (once) and what each adds to it. Every token sees its own segment up to itself and, if the segment continues
a shared one, all of that. Linear layers then run on T tokens and nothing else; only here are segments of like length
padded to one block, which costs memory traffic but no projection.

Against a dense T x T mask this does the work of the segments alone. No kernel of torch does it on the CPU; on GPUs a
variable-length flash attention would also leave out the copies of the shared keys, and has not been tried.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dppo_lightning.base.packing import Block, SegmentLayout

NAME = "dppo_segments"

UNUSED = (1, 1, 1, 1)
"""Shape of the attention mask that goes with segments, which say all of it. With none, transformers would look at the
positions, find several sequences in the row, and build a mask of [T, T]."""


def supports_segments(model: PreTrainedModel) -> bool:
    """Tell whether the model's attention can be replaced by ours: every layer attends to all that came before.

    Sliding windows, attention softcaps and sinks, recurrent layers, and attention that does not go through
    transformers' interface say no.
    """
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return (
        bool(model._supports_attention_backend)
        and not getattr(model, "_is_stateful", False)
        and layers == {"full_attention"}
        and window is None
        and getattr(config, "attn_logit_softcapping", None) is None
        and not any(name.endswith("sinks") for name, _ in model.named_parameters())
    )


def segment_attention(
    module: nn.Module,
    query: Float[Tensor, "1 heads T d"],
    key: Float[Tensor, "1 kv_heads T d"],
    value: Float[Tensor, "1 kv_heads T d"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: SegmentLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers; without ``segments`` it is transformers' own "sdpa".

    Returns:
        [1, T, heads, d], and no attention weights.

    Raises:
        NotImplementedError: The layer asks for what is not known here, or has kept the segments back: the mask that
            goes with them, ``UNUSED``, would let every token see every other.
    """
    if segments is None:
        if attention_mask is not None and attention_mask.shape == UNUSED and query.shape[2] > 1:
            raise NotImplementedError("its layers do not hand on what tells its attention which sequence is whose")
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    unknown = [name for name in ("sliding_window", "softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if unknown or dropout:
        raise NotImplementedError(f"attention over segments knows no {', '.join(unknown) or 'dropout'}")
    tokens, heads = query.shape[2], query.shape[1]
    memory = torch.cat([_rows(key), _rows(value)], dim=1)
    sizes = _Sizes(heads, key.shape[1], query.shape[3], value.shape[3])
    outputs = [_attend(_rows(query), memory, block, sizes, scaling) for block in segments.blocks]
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return functional.embedding(segments.place, joined).view(1, tokens, heads, sizes.value), None


@dataclass(frozen=True)
class _Sizes:
    heads: int
    kv_heads: int
    key: int
    value: int


def _attend(
    queries: Float[Tensor, "T hd"], memory: Float[Tensor, "T kd"], block: Block, sizes: _Sizes, scaling: float | None
) -> Float[Tensor, "bQ hd"]:
    """Attend within one block.

    ``embedding`` is the gather whose gradient, a sum over repeated rows, is quick on every device.
    """
    index = block.own if block.context is None else torch.cat([block.context, block.own], dim=1)
    b, own = block.own.shape
    kv_heads, share = sizes.kv_heads, sizes.heads // sizes.kv_heads
    q = functional.embedding(block.own, queries).view(b, own, kv_heads, share, sizes.key).permute(0, 2, 3, 1, 4)
    k, v = functional.embedding(index, memory).split([kv_heads * sizes.key, kv_heads * sizes.value], dim=-1)
    k = k.unflatten(-1, (kv_heads, sizes.key)).transpose(1, 2)
    v = v.unflatten(-1, (kv_heads, sizes.value)).transpose(1, 2)
    if block.mask is None:
        q = q.reshape(b, sizes.heads, own, sizes.key)
        k, v = (x.repeat_interleave(share, dim=1) for x in (k, v))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        return out.transpose(1, 2).reshape(b * own, -1)
    # Heads that share keys are laid out as more queries of one head, so no key is repeated for them.
    q = q.reshape(b, kv_heads, share * own, sizes.key)
    mask = block.mask.repeat(1, 1, share, 1)
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    return out.view(b, kv_heads, share, own, sizes.value).permute(0, 3, 1, 2, 4).reshape(b * own, -1)


def _rows(x: Float[Tensor, "1 h T d"]) -> Float[Tensor, "T hd"]:
    return x[0].transpose(0, 1).flatten(1)


AttentionInterface.register(NAME, segment_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
