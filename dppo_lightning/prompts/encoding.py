"""Encoding of raw examples as prompts, each rendered and tokenised exactly once."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from dppo_lightning.base.errors import ConfigError, DataError
from dppo_lightning.base.pretrained import context_length, load_tokenizer
from dppo_lightning.base.records import Prompt
from dppo_lightning.base.special_tokens import Ids, beginning, begun, endings, from_beginning, stop_tokens
from dppo_lightning.prompts.base import Example, PromptSets, PromptSource
from dppo_lightning.prompts.chat import AsText, ControlTokens, render

log = logging.getLogger(__name__)

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

    Messages are rendered by the tokenizer's chat template, which writes its own special tokens; those that a message
    holds are encoded as text. Plain text gets the tokens that the tokenizer puts before a text, unless it begins with
    them already. Nothing is put after a prompt.

    Args:
        examples: Examples to encode, at least one for training.
        tokenizer: The model's tokenizer.
        split: First part of each prompt's id; the second is the example's place, whether or not others are dropped.
        longest: Length above which a prompt is dropped, in tokens; None drops none.
        stops: Ids that end a completion, in addition to the tokenizer's own.

    Returns:
        Prompts in the order of their examples, and the number of dropped ones.

    Raises:
        DataError: There is nothing to train on, everything is too long, messages cannot be rendered, or a prompt is
            empty or ends with a token that ends a text.
    """
    if not examples:
        if split == "train":
            raise DataError("the training set is empty: give data.prompts at least one question")
        return [], 0
    ids = [f"{split}/{place}" for place in range(len(examples))]
    texts = [_text(example, tokenizer, name) for example, name in zip(examples, ids, strict=True)]
    begins = beginning(tokenizer, texts) if any(example.messages is None for example in examples) else ()
    if begins:
        texts = [from_beginning(text, tokenizer, begins) for text in texts]
    encoded = list(_tokenise(texts, tokenizer))
    for place, text, row in _chats_as_text(examples, tokenizer, ids, begins):
        texts[place], encoded[place] = text, row
    rows = [
        begun(row, begins if example.messages is None else (), tokenizer.bos_token_id)
        for row, example in zip(encoded, examples, strict=True)
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


@dataclass(frozen=True)
class EncodedPrompts:
    """A model's tokenizer and the prompts that it has encoded.

    Attributes:
        tokenizer: Tokenizer of the model.
        stops: Ids that end a completion, each with who names it.
        train: Training prompts.
        heldout: Held-out prompts.
        longest_sequence: Length of the longest prompt with its longest completion, in tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    stops: dict[int, str]
    train: list[Prompt]
    heldout: list[Prompt]
    longest_sequence: int


def load_prompts(
    source: PromptSource, model: str, max_new_tokens: int, max_prompt_tokens: int | None = None
) -> EncodedPrompts:
    """Load a source's examples and encode them for a model; the log names how many are dropped as too long.

    Args:
        source: Source of the examples.
        model: Hugging Face id or folder.
        max_new_tokens: Length of the longest completion, in tokens.
        max_prompt_tokens: Length above which prompts are dropped; None: as long as the model's context allows.

    Raises:
        ConfigError: The model has no tokenizer, or its context leaves no room for a prompt.
        DataError: As ``PromptSource.load`` and ``encode``.
    """
    tokenizer, context = load_tokenizer(model), context_length(model)
    if context is not None and max_new_tokens >= context:
        raise ConfigError(
            f"data.max_new_tokens={max_new_tokens} leaves no room for a prompt in a context of {context} tokens"
        )
    left = None if context is None else context - max_new_tokens
    longest = min((limit for limit in (max_prompt_tokens, left) if limit), default=None)
    stops = stop_tokens(model, tokenizer)
    sets = source.load()
    if not isinstance(sets, PromptSets):
        raise DataError(f"{type(source).__name__}.load returned a {type(sets).__name__}: return PromptSets")
    for example in (*sets.train, *sets.heldout):
        if not isinstance(example, Example):
            raise DataError(f"{type(source).__name__}.load gave a {type(example).__name__}: give Examples")
    train, dropped = encode(sets.train, tokenizer, "train", longest, stops)
    heldout, heldout_dropped = encode(sets.heldout, tokenizer, "heldout", longest, stops)
    if dropped or heldout_dropped:
        log.info(f"dropped prompts longer than {longest} tokens: {dropped} for training, {heldout_dropped} held out")
    widest = max(len(prompt.token_ids) for prompt in (*train, *heldout)) + max_new_tokens
    return EncodedPrompts(tokenizer, stops, train, heldout, widest if context is None else min(widest, context))


def _text(example: Example, tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    if (example.prompt is None) == (example.messages is None):
        raise DataError(f"prompt {name} must have either prompt or messages")
    return render(example.messages or (), tokenizer, name) if example.prompt is None else example.prompt


def _chats_as_text(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, names: Sequence[str], begins: Ids
) -> Iterator[tuple[int, str, Ids]]:
    """Place, text and ids of each chat whose messages hold control tokens of the template, which become text."""
    control = ControlTokens(tokenizer)
    if not (places := control.holders(examples)):
        return
    chats = {place: examples[place].messages or () for place in places}
    as_text = AsText(control, list(chats.values()))
    for place, messages in chats.items():
        marked = from_beginning(render(as_text.marked(messages), tokenizer, names[place]), tokenizer, begins)
        yield place, as_text.unmarked(marked), as_text.encode(marked, names[place])


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
