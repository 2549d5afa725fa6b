"""encode: raw examples to prompts, rendered and tokenised exactly once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dppo_lightning.batch import Prompt
from dppo_lightning.errors import DataError
from dppo_lightning.prompts.base import Example

# Texts tokenised in one call: enough to be fast, few enough that their offsets take no memory to speak of.
CHUNK = 1024


def encode(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    split: Literal["train", "heldout"],
    longest: int | None,
) -> tuple[list[Prompt], int]:
    """Render and tokenise examples.

    Messages are rendered by the tokenizer's chat template, which writes its own special tokens; plain text is
    tokenised as the tokenizer does by default.

    Args:
        examples: At least one for training.
        tokenizer: Of the model.
        split: First part of each prompt's id; the second is the example's place, whether or not others are dropped.
        longest: Longer prompts are dropped, in tokens; None: none is.

    Returns:
        The prompts in the order of their examples, and how many were dropped.

    Raises:
        DataError: Nothing to train on, everything is too long, messages that cannot be rendered, or an empty prompt.
    """
    if not examples:
        if split == "train":
            raise DataError("the training set is empty: give data.prompts at least one question")
        return [], 0
    ids = [f"{split}/{place}" for place in range(len(examples))]
    texts = [_render(example, tokenizer, name) for example, name in zip(examples, ids, strict=True)]
    rows = _tokenise(texts, [example.messages is None for example in examples], tokenizer)
    prompts = []
    for name, text, row, example in zip(ids, texts, rows, examples, strict=True):
        if not row:
            raise DataError(f"prompt {name} encodes to no tokens: the tokenizer knows nothing of {text[:60]!r}")
        if longest is None or len(row) <= longest:
            prompts.append(Prompt(name, row, text, example.answer, example.columns))
    if not prompts:
        shortest = min(len(row) for row in rows)
        raise DataError(
            f"every {split} prompt is too long: the shortest has {shortest} tokens, the limit is {longest}: raise "
            "data.max_prompt_tokens, lower data.max_new_tokens, or take a model with a longer context"
        )
    return prompts, len(examples) - len(prompts)


def _render(example: Example, tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    if (example.prompt is None) == (example.messages is None):
        raise DataError(f"prompt {name} must have either prompt or messages")
    if example.prompt is not None:
        return example.prompt
    if not tokenizer.chat_template:
        raise DataError(
            f"prompt {name} is a chat, and the model's tokenizer has no chat template: use plain prompts (without chat "
            "or messages), or a model with a chat template"
        )
    messages = [dict(message) for message in example.messages or ()]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"the model's chat template refuses prompt {name}: {error}") from error


def _tokenise(texts: list[str], plain: list[bool], tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    rows: list[tuple[int, ...]] = [()] * len(texts)
    for special in (True, False):
        places = [place for place, is_plain in enumerate(plain) if is_plain is special]
        for start in range(0, len(places), CHUNK):
            chunk = places[start : start + CHUNK]
            encoded = tokenizer(
                [texts[place] for place in chunk],
                add_special_tokens=special,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            for place, row in zip(chunk, encoded["input_ids"], strict=True):
                rows[place] = tuple(row)
    return rows
