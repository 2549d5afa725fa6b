"""Rotary frequencies that would follow the longest sequence of a call are settled once, as the engine settles them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def settle_frequencies(config: Any, longest: int | None) -> None:
    """Make a model's rotary frequencies independent of what it is called with, in place, before it is built.

    With "longrope" transformers takes the long factors when the longest sequence of a call is longer than those of
    pretraining, so a short sequence's log-probs would depend on its neighbours. vLLM takes the long factors whenever a
    sequence may become so long, and so it is here. With "dynamic" transformers stretches the frequencies beyond the
    model's context, where no sequence of a run goes; vLLM never does.

    Args:
        config: Of the text model.
        longest: Length of the longest sequence, in tokens; None: the model's context.
    """
    context = getattr(config, "max_position_embeddings", None)
    for rope in _rope_parameters(config):
        kind = rope.get("rope_type")
        if kind == "longrope":
            pretrained = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
            taken, left = ("long", "short") if (longest or context) > pretrained else ("short", "long")
            for name in ("factor", "mscale"):
                if f"{taken}_{name}" in rope:
                    rope[f"{left}_{name}"] = rope[f"{taken}_{name}"]
        elif kind == "dynamic" and not rope.get("alpha"):  # with alpha the frequencies have been stretched already
            rope["rope_type"] = "default"


def _rope_parameters(config: Any) -> Iterator[dict[str, Any]]:
    """One for the model, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        yield parameters
    else:
        yield from (entry for entry in parameters.values() if isinstance(entry, dict))
