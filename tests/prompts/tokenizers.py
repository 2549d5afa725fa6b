"""Small tokenizers, built in memory."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "<s>{% for message in messages %}"
    "{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def character_tokenizer(chat: bool = False, unknown: bool = True) -> PreTrainedTokenizerFast:
    """One token a printable ASCII character; puts ``<s>`` (id 0) before every text unless told not to."""
    vocabulary = {"<s>": 0, "<unk>": 1} | {chr(32 + i): 2 + i for i in range(95)}
    model = WordLevel(vocabulary, unk_token="<unk>") if unknown else WordLevel(vocabulary)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    if unknown:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        unk_token="<unk>" if unknown else None,
        chat_template=CHAT_TEMPLATE if chat else None,
    )


def framing_tokenizer(parts: str) -> PreTrainedTokenizerFast:
    """One token a character, with ``</s>`` (id 97) and ``[M]`` (98) besides, framing every text as ``parts`` says."""
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "</s>", "additional_special_tokens": ["[M]"]})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=parts, special_tokens=[("<s>", 0), ("</s>", 97), ("[M]", 98)]
    )
    return tokenizer


def ids_of(text: str) -> tuple[int, ...]:
    """The ids of a text's characters, without the special token."""
    return tuple(ord(character) - 30 for character in text)
