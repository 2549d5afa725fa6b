"""The starting model "tiny", which is worth training further: it spells words backward, and is right four times in ten.

What is simplified away: one fixed question with the word at its end, words of 3 to 8 letters in lower case, a
vocabulary of bytes. What is real: the task and its scorer are reasoning-gym's, and the words that quickstart.yaml holds
out are not among those that the model is supervised on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dppo_lightning.prompts import Example, ReasoningGymPrompts
from dppo_lightning.prompts.base import without

TASK: dict[str, Any] = {
    "task": "spell_backward",
    "parameters": {"min_word_len": 3, "max_word_len": 8},
    "template": "{question}\n",  # without an end, "ball" and the first letter of "bal" backward look the same
    "lowercase": True,
}
SUPERVISED_WORDS = 4_000
SUPERVISED_SEED = 1_000
HELDOUT_WORDS = 1_000
"""Number of words drawn with seed 0, the default of ReasoningGymPrompts, on which the model is not supervised.

A run that holds out fewer words has the first of them.
"""

SOLVED = 0.35
"""Share of unseen words at which supervision ends: between a third and a half leaves the most to learn from samples."""
MOST_STEPS = 800
STEPS_PER_EVALUATION = 5
EVALUATED_LOSS = 0.6
"""Loss in nats above which no word is solved, so that the model is not evaluated."""
EVALUATED_WORDS = 200
SAMPLES_PER_WORD = 2
ROWS = 128
"""Number of words in a step."""
LEARNING_RATE = 1.5e-3
WARM_UP = 30
"""Number of steps in which the learning rate rises to its full value."""

CARD = """\
# A tiny speller

A byte-level Llama of {parameters:,} parameters, supervised for {steps} steps of {rows} words on the reasoning-gym task
spell_backward (words of 3 to 8 letters, lower case, the prompt ends with a line break). Sampled at temperature 1 it
gets {solved:.0%} of unseen words right. Made to be trained further.
"""


def write_tiny(folder: Path, most_steps: int = MOST_STEPS) -> str:
    """Supervise a new model and write it into an empty ``folder``; returns what was written, in a phrase.

    The result depends on the number of steps alone, not on the machine's speed.

    Raises:
        ConfigError: reasoning-gym is not installed.
    """
    tokenizer = byte_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = new_model(tokenizer)
        steps, solved = supervise(model, tokenizer, most_steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    parameters = sum(p.numel() for p in model.parameters())
    card = CARD.format(parameters=parameters, steps=steps, rows=ROWS, solved=solved)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return f"solves {solved:.2f} of spell_backward at temperature 1, {parameters:,} parameters, {steps} steps"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with a token for each byte, so for each character of English; any text can be decoded again."""
    words = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Make an untrained model; its weights are drawn from the global generator."""
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=2,  # each 32 wide: vLLM's attention on the CPU takes no narrower ones
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        **ends,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**ends)
    return model


def questions() -> tuple[list[Example], list[Example]]:
    """Draw questions to supervise on, and unseen ones to evaluate on; none is held out by quickstart.yaml."""
    reserved = ReasoningGymPrompts(**TASK, train=1, heldout=HELDOUT_WORDS).load().heldout
    sets = ReasoningGymPrompts(**TASK, train=SUPERVISED_WORDS, heldout=EVALUATED_WORDS, seed=SUPERVISED_SEED).load()
    return without(sets.train, reserved), without(sets.heldout, reserved)


def supervise(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, most_steps: int) -> tuple[int, float]:
    """Train until the model solves ``SOLVED`` of the unseen words; returns steps taken and the share solved then."""
    train, unseen = questions()
    opening = tokenizer(common_opening(prompt_text(train[0])), return_tensors="pt").input_ids
    rows = [encode_row(example, tokenizer) for example in train]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))
    draw = np.random.default_rng(0)
    share = 0.0
    with tqdm(total=most_steps, desc="spell_backward", unit="step", mininterval=1.0) as bar:
        for step in range(1, most_steps + 1):
            chosen = draw.choice(len(rows), ROWS, replace=False)
            loss = answer_loss(model, opening, [rows[i] for i in chosen])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update()
            if (step % STEPS_PER_EVALUATION == 0 and loss < EVALUATED_LOSS) or step == most_steps:
                share = solved_share(model, tokenizer, unseen)
                if share >= SOLVED:
                    break
            bar.set_postfix(loss=f"{loss.item():.2f}", solved=f"{share:.2f}", refresh=False)
    return step, share


def prompt_text(example: Example) -> str:
    """Text of a question; reasoning-gym's tasks have no other kind of prompt."""
    assert example.prompt is not None
    return example.prompt


def common_opening(prompt: str) -> str:
    """Text that all prompts begin with: everything before the word, which is the last thing in them."""
    return prompt[: prompt.rindex(" ") + 1]


def encode_row(example: Example, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], int]:
    """Encode word and answer, without the opening; returns the token ids and how many of them are prompt."""
    text = prompt_text(example)
    prompt = tokenizer(text.removeprefix(common_opening(text))).input_ids
    answer = tokenizer(example.answer).input_ids
    return [*prompt, *answer, tokenizer.eos_token_id], len(prompt)


def answer_loss(model: LlamaForCausalLM, opening: Tensor, rows: Sequence[tuple[list[int], int]]) -> Tensor:
    """Mean cross-entropy of the answers' tokens, in nats.

    The opening, four fifths of every prompt, is run once for all rows.

    Args:
        model: Model to train.
        opening: Token ids [1, T] of the opening that all prompts share.
        rows: Token ids after the opening, and how many of them are prompt; see ``encode_row``.
    """
    ids = torch.zeros(len(rows), max(len(row) for row, _ in rows), dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for place, (row, prompt) in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
        labels[place, prompt : len(row)] = ids[place, prompt : len(row)]
    cache = model(input_ids=opening, use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(rows))
    logits = model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True).logits
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


@torch.no_grad()
def solved_share(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]) -> float:
    """Share of samples at temperature 1 that are the answer; the same random numbers at every call."""
    prompts = tokenizer([prompt_text(e) for e in examples], padding=True, padding_side="left", return_tensors="pt")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokens = model.generate(  # type: ignore[misc]
            input_ids=prompts.input_ids,
            attention_mask=prompts.attention_mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            max_new_tokens=10,
            num_return_sequences=SAMPLES_PER_WORD,
        )
    texts = tokenizer.batch_decode(tokens[:, prompts.input_ids.shape[1] :], skip_special_tokens=True)
    answers = [example.answer for example in examples for _ in range(SAMPLES_PER_WORD)]
    return sum(text == answer for text, answer in zip(texts, answers, strict=True)) / len(answers)
