"""Tokens that begin a text, end one, or are left out of a completion's text: decided here and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

from dppo_lightning.base.errors import ConfigError, one_line
from dppo_lightning.base.pretrained import load_config

Ids = tuple[int, ...]


def beginning(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Ids:
    """Ids that the tokenizer puts before a plain text; those that it puts after one would end the prompt: never added.

    Args:
        tokenizer: The model's tokenizer.
        texts: Texts to try where the tokenizer knows neither a letter nor a digit.

    Raises:
        ConfigError: The text's own tokens change with the special tokens, so the two cannot be separated.
    """
    for text in ("a", "0", *texts):
        bare = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if bare:
            whole = tokenizer(text, verbose=False)["input_ids"]
            for place in range(len(whole) - len(bare) + 1):
                if whole[place : place + len(bare)] == bare:
                    return tuple(whole[:place])
            raise ConfigError(
                f"the model's tokenizer makes {whole[:8]} of {text[:20]!r} with special tokens and {bare[:8]} without, "
                "so what begins a text is unknown: use chats (chat or messages), or mend its post-processor"
            )
    return ()


def from_beginning(text: str, tokenizer: PreTrainedTokenizerBase, begins: Ids) -> str:
    """Remove the white space before the special token that ``text`` begins with, if it begins with one."""
    written = text.lstrip()
    return written if begins and written.startswith(str(tokenizer.decode([begins[-1]]))) else text


def begun(row: Ids, begins: Ids, bos: int | None) -> Ids:
    """Give ``row`` the ids that begin a text exactly once, however often the text wrote them itself.

    Args:
        row: Ids of a text, without special tokens except those that the text writes itself.
        begins: Ids to put before the row; those that it begins with already are not repeated.
        bos: The tokenizer's id for the beginning of a sequence, if it has one.
    """
    for once in (begins, () if bos is None else (bos,)):
        while once and row[: 2 * len(once)] == once + once:
            row = row[len(once) :]
    written = next(count for count in range(len(begins), -1, -1) if row[:count] == begins[len(begins) - count :])
    return begins[: len(begins) - written] + row


def endings(tokenizer: PreTrainedTokenizerBase, stops: Iterable[int] = ()) -> frozenset[int]:
    """Ids that no prompt may end with: the end of sequence, and those of ``stops`` that are no ordinary words."""
    added = tokenizer.added_tokens_decoder
    own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return frozenset((*own, *(token for token in stops if token in added)))


def stop_tokens(model: str, tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Ids that end a completion, ascending, each with the place that names it.

    They are the tokenizer's and those of ``generation_config.json``; where that file names none, those of the model's
    config, as in transformers and vLLM.

    Raises:
        ConfigError: No such id is named, or one is no id of the model's vocabulary, or the file cannot be read.
    """
    config = load_config(model)
    text = config.get_text_config()
    named = [("tokenizer", tokenizer.eos_token_id)]
    configured = _generation_config(model).get("eos_token_id")
    if configured is not None:
        named.append(("generation_config.json", configured))
    else:
        outer = getattr(config, "eos_token_id", None)
        named.append(("the model's config", getattr(text, "eos_token_id", None) if outer is None else outer))
    origins: dict[int, list[str]] = {}
    for origin, given in named:
        for token in _ids(given, origin, model, text.vocab_size):
            origins.setdefault(token, []).append(origin)
    if not origins:
        raise ConfigError(f"{model!r} names no end-of-sequence token: set eos_token in its tokenizer")
    return {token: " and ".join(dict.fromkeys(origins[token])) for token in sorted(origins)}


def _ids(given: Any, origin: str, model: str, vocabulary: int) -> list[int]:
    ids = [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
            raise ConfigError(
                f"{model!r}: the end of sequence of {origin} is {token!r}, and the model's ids are 0 to "
                f"{vocabulary - 1}: mend eos_token_id there"
            )
    return ids


def _generation_config(model: str) -> dict[str, Any]:
    # Private arguments of transformers: without them it raises for a model that lacks the file, which many do, and on a
    # machine without a connection.
    path = cached_file(
        model,
        "generation_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return {}
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read, {one_line(error)}: mend it, or remove it") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds a {type(found).__name__}, not an object: mend it, or remove it")
    return found


class Decoder:
    """Converter of token ids to text, with and without the tokens that begin, end and pad a text.

    Other special tokens, such as ``<think>`` or ``<tool_call>``, are part of the model's answer, and stay in both.

    Args:
        tokenizer: The model's tokenizer.
        stops: Ids that end a completion, in addition to the tokenizer's own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Collection[int] = ()) -> None:
        self.tokenizer = tokenizer
        own = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        self.left_out = frozenset(stops) | {token for token in own if token is not None}

    def leaves_out(self, row: Sequence[int]) -> bool:
        """Tell whether the text of ``row`` lacks one of its tokens."""
        return not self.left_out.isdisjoint(row)

    def texts(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Text of each row, without the tokens that begin, end and pad a text."""
        return self.raw_texts([[token for token in row if token not in self.left_out] for row in rows])

    def raw_texts(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Text of each row, with every token."""
        return self.tokenizer.batch_decode(
            [list(row) for row in rows],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
            spaces_between_special_tokens=False,
        )
