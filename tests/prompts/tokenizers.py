"""Small tokenizers, built in memory."""

from __future__ import annotations

import json

from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Metaspace, Split
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
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


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if '</think>' in message['content'] and message['role'] == 'assistant' %}"
    "{{ message['content'].split('</think>')[-1] }}{% else %}{{ message['content'] }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
LLAMA_3 = (
    "<|begin_of_text|>{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "<s>{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }}[/INST]"
    "{% else %} {{ message['content'] }}</s>{% endif %}{% endfor %}"
)
GEMMA = (
    "<bos>{% for message in messages %}<start_of_turn>{{ message['role'] }}\n{{ message['content'] | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
SPOKEN = "the user may ask what 12 + 7 is and the assistant answers 19 or thinks <think> about it </think> " * 3


def family_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Small BPE tokenizer with the special tokens, the chat template and the treatment of text of a family of models.

    Args:
        family: "qwen", "llama3", "mistral" or "gemma".
    """
    if family in ("qwen", "llama3"):
        tokenizer = Tokenizer(BPE())
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = BpeTrainer(vocab_size=340, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
        tokenizer.train_from_iterator([SPOKEN], trainer)
    else:
        tokenizer = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        spaced = family == "mistral"
        tokenizer.pre_tokenizer = Metaspace(prepend_scheme="first" if spaced else "never", split=False)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
            + ([decoders.Strip(" ", 1, 0)] if spaced else [])
        )
        bytes_ = [f"<0x{code:02X}>" for code in range(256)]
        own = ["<s>", "</s>", "[INST]", "[/INST]"] if spaced else ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
        alphabet = [chr(code) for code in range(32, 127)]
        trainer = BpeTrainer(
            vocab_size=440, special_tokens=["<unk>", *own, *bytes_], initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator([" ".join(SPOKEN.split())], trainer)
        tokenizer = _not_added(tokenizer, bytes_)
    template, eos, more = {
        "qwen": (CHATML, "<|im_end|>", ["<|im_start|>", "<|endoftext|>"]),
        "llama3": (LLAMA_3, "<|eot_id|>", ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]),
        "mistral": (MISTRAL, "</s>", ["<s>", "[INST]", "[/INST]"]),
        "gemma": (GEMMA, "<end_of_turn>", ["<bos>", "<eos>", "<start_of_turn>"]),
    }[family]
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, additional_special_tokens=more, chat_template=template
    )
    wrapped.add_tokens(["<think>", "</think>"] if family == "qwen" else ["\n\n"])
    return wrapped


def _not_added(tokenizer: Tokenizer, words: list[str]) -> Tokenizer:
    """The tokenizer with words of its vocabulary that are not found in a text as they stand."""
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in words]
    return Tokenizer.from_str(json.dumps(state))
