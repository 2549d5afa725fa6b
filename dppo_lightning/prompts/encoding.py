"""encode: raw examples to prompts, rendered and tokenised exactly once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dppo_lightning.errors import DataError
from dppo_lightning.prompts.base import Example
from dppo_lightning.records import Prompt
from dppo_lightning.special_tokens import beginning, begun, endings, from_beginning

# Texts tokenised in one call: enough to be fast, few enough that their offsets take no memory to speak of.
CHUNK = 1024


def encode(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    split: Literal["train", "heldout"],
    longest: int | None,
    stops: Iterable[int] = (),
) -> tuple[list[Prompt], int]:
    """Render and tokenise examples.

    Messages are rendered by the tokenizer's chat template, which writes its own special tokens; plain text gets what
    the tokenizer puts before a text, unless it begins with it already. Nothing is put after a prompt.

    Args:
        examples: At least one for training.
        tokenizer: Of the model.
        split: First part of each prompt's id; the second is the example's place, whether or not others are dropped.
        longest: Longer prompts are dropped, in tokens; None: none is.
        stops: Ids that end a completion, beside the tokenizer's own.

    Returns:
        The prompts in the order of their examples, and how many were dropped.

    Raises:
        DataError: Nothing to train on, everything is too long, messages that cannot be rendered, or a prompt that is
            empty or ends with what ends a text.
    """
    if not examples:
        if split == "train":
            raise DataError("the training set is empty: give data.prompts at least one question")
        return [], 0
    ids = [f"{split}/{place}" for place in range(len(examples))]
    texts = [_render(example, tokenizer, name) for example, name in zip(examples, ids, strict=True)]
    begins = beginning(tokenizer, texts) if any(example.messages is None for example in examples) else ()
    if begins:
        texts = [from_beginning(text, tokenizer, begins) for text in texts]
    rows = [
        begun(row, begins if example.messages is None else (), tokenizer.bos_token_id)
        for row, example in zip(_tokenise(texts, tokenizer), examples, strict=True)
    ]
    ends = endings(tokenizer, stops)
    prompts = []
    for name, text, row, example in zip(ids, texts, rows, examples, strict=True):
        if not row:
            raise DataError(f"prompt {name} encodes to no tokens: the tokenizer knows nothing of {text[:60]!r}")
        if row[-1] in ends and row not in (begins, (tokenizer.bos_token_id,)):  # one id may both begin and end
            raise DataError(
                f"prompt {name} ends with {tokenizer.decode([row[-1]])!r}, which ends a text, so nothing is left to "
                f"answer: remove it from {text[-40:]!r}, or from the chat template where add_generation_prompt is set"
            )
        if longest is None or len(row) <= longest:
            prompts.append(Prompt(name, row, text, example.answer, example.columns, example.where))
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


def _tokenise(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, ...]]:
    for start in range(0, len(texts), CHUNK):
        encoded = tokenizer(
            texts[start : start + CHUNK],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        yield from map(tuple, encoded["input_ids"])
