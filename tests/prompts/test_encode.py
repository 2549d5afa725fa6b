"""encode: rendered once, tokenised once, ids that stay."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dppo_lightning.base.errors import DataError
from dppo_lightning.prompts import Example, encode
from dppo_lightning.prompts import encoding as encoding_module
from tests.prompts.tokenizers import character_tokenizer, framing_tokenizer, ids_of

PLAIN = character_tokenizer()
CHAT = character_tokenizer(chat=True)


def user(text: str) -> Example:
    return Example(messages=({"role": "user", "content": text},))


def test_plain_text_begins_as_the_tokenizer_lets_texts_begin() -> None:
    (prompt,), dropped = encode([Example(prompt="1+1=")], CHAT, "train", None)
    assert prompt.token_ids == (0, *ids_of("1+1="))
    assert prompt.text == "1+1="
    assert dropped == 0


def test_a_chat_gets_its_special_token_once_and_asks_for_the_answer() -> None:
    (prompt,), _ = encode([user("hi")], CHAT, "train", None)
    assert prompt.text == "<s>[user]hi[assistant]"
    assert prompt.token_ids == (0, *ids_of("[user]hi[assistant]"))


BOS, EOS, MASK = 0, 97, 98


@pytest.mark.parametrize("text", ["<s>hi", "<s><s><s>hi", "\n <s>hi", "hi"])
@pytest.mark.parametrize("parts", ["<s> $A", "<s> $A </s>"])
def test_a_text_begins_with_the_beginning_once_however_often_it_writes_it(text: str, parts: str) -> None:
    (prompt,), _ = encode([Example(prompt=text)], framing_tokenizer(parts), "train", None)
    assert prompt.token_ids == (BOS, *ids_of("hi"))


@pytest.mark.parametrize("text", ["[M]<s>hi", "<s>hi", "hi", "[M]<s>[M]<s>hi"])
def test_a_beginning_of_several_tokens_is_completed_and_not_repeated(text: str) -> None:
    (prompt,), _ = encode([Example(prompt=text)], framing_tokenizer("[M] <s> $A"), "train", None)
    assert prompt.token_ids == (MASK, BOS, *ids_of("hi"))


@pytest.mark.parametrize("parts", ["$A </s>", "<s> $A </s>", "$A"])
def test_what_the_tokenizer_puts_after_a_text_does_not_end_a_prompt(parts: str) -> None:
    (prompt,), _ = encode([Example(prompt="hi")], framing_tokenizer(parts), "train", None)
    assert prompt.token_ids == (*((BOS,) if parts.startswith("<s>") else ()), *ids_of("hi"))


@pytest.mark.parametrize("parts", ["<s> $A", "<s> $A </s>", "$A"])
@pytest.mark.parametrize("template", ["<s>[user]hi", "<s><s>[user]hi"])
def test_a_template_that_writes_the_beginning_gets_no_other(parts: str, template: str) -> None:
    tokenizer = framing_tokenizer(parts)
    tokenizer.chat_template = template
    (prompt,), _ = encode([user("hi")], tokenizer, "train", None)
    assert prompt.token_ids == (BOS, *ids_of("[user]hi"))


def test_a_prompt_that_ends_with_the_end_is_refused_whoever_wrote_it() -> None:
    tokenizer = framing_tokenizer("<s> $A")
    with pytest.raises(DataError, match=r"prompt train/1 ends with '</s>'.*remove it from"):
        encode([Example(prompt="hi"), Example(prompt="hi</s>")], tokenizer, "train", None)
    tokenizer.chat_template = "[user]hi</s>"
    with pytest.raises(DataError, match=r"prompt heldout/0 ends with '</s>'.*add_generation_prompt"):
        encode([user("hi")], tokenizer, "heldout", None)


def test_other_ends_of_the_model_count_where_they_are_special_tokens() -> None:
    tokenizer = framing_tokenizer("$A")
    with pytest.raises(DataError, match=r"ends with '\[M\]'"):
        encode([Example(prompt="hi[M]")], tokenizer, "train", None, stops=(MASK,))
    ordinary = ids_of("i")
    assert encode([Example(prompt="hi")], tokenizer, "train", None, stops=ordinary)[0][0].token_ids == ids_of("hi")


def test_one_token_may_both_begin_and_end_a_text() -> None:
    tokenizer = framing_tokenizer("<s> $A")
    tokenizer.eos_token = "<s>"
    prompts, _ = encode([Example(prompt="<s>"), Example(prompt="<s>hi")], tokenizer, "train", None)
    assert [prompt.token_ids for prompt in prompts] == [(BOS,), (BOS, *ids_of("hi"))]


def test_answer_and_columns_come_through() -> None:
    (prompt,), _ = encode([Example(prompt="q", answer="4", columns={"level": 2})], PLAIN, "heldout", None)
    assert (prompt.id, prompt.answer, prompt.columns) == ("heldout/0", "4", {"level": 2})


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(st.tuples(st.booleans(), st.text("abc 12", min_size=1, max_size=12)), min_size=1, max_size=12),
    longest=st.integers(1, 40),
)
def test_the_short_enough_keep_their_id_order_and_ids(texts: list[tuple[bool, str]], longest: int) -> None:
    examples = [user(text) if chat else Example(prompt=text) for chat, text in texts]
    expected = {
        f"train/{place}": (0, *ids_of(f"[user]{text}[assistant]" if chat else text))
        for place, (chat, text) in enumerate(texts)
    }
    expected = {name: ids for name, ids in expected.items() if len(ids) <= longest}
    if not expected:
        with pytest.raises(DataError):
            encode(examples, CHAT, "train", longest)
        return
    prompts, dropped = encode(examples, CHAT, "train", longest)
    assert [(prompt.id, prompt.token_ids) for prompt in prompts] == list(expected.items())
    assert dropped == len(texts) - len(expected)


def test_more_texts_than_one_call_takes_stay_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding_module, "CHUNK", 3)
    prompts, _ = encode([Example(prompt="x" * (1 + i % 5)) for i in range(11)], PLAIN, "train", None)
    assert [len(prompt.token_ids) - 1 for prompt in prompts] == [1 + i % 5 for i in range(11)]


def test_all_too_long_names_the_shortest_the_limit_and_the_settings() -> None:
    with pytest.raises(DataError, match=r"shortest has 4 tokens, the limit is 3.*max_prompt_tokens.*max_new_tokens"):
        encode([Example(prompt="abc"), Example(prompt="abcdef")], PLAIN, "heldout", 3)


def test_nothing_to_train_on_is_an_error_and_nothing_held_out_is_not() -> None:
    with pytest.raises(DataError, match="training set is empty"):
        encode([], PLAIN, "train", None)
    assert encode([], PLAIN, "heldout", None) == ([], 0)


def test_a_chat_needs_a_chat_template() -> None:
    with pytest.raises(DataError, match=r"train/0 is a chat.*no chat template"):
        encode([user("hi")], PLAIN, "train", None)


def test_what_the_template_refuses_names_the_prompt_and_the_reason() -> None:
    tool = Example(messages=({"role": "tool", "content": "4"},))
    with pytest.raises(DataError, match=r"refuses prompt train/1: no tools here"):
        encode([user("hi"), tool], CHAT, "train", None)


def test_a_prompt_without_tokens_is_an_error() -> None:
    tokenizer = character_tokenizer(unknown=False)
    with pytest.raises(DataError, match=r"train/1 encodes to no tokens"):
        encode([Example(prompt="a"), Example(prompt="")], tokenizer, "train", None)


@pytest.mark.parametrize("example", [Example(), Example(prompt="a", messages=({"role": "user", "content": "a"},))])
def test_an_example_is_either_text_or_chat(example: Example) -> None:
    with pytest.raises(DataError, match="either prompt or messages"):
        encode([example], CHAT, "train", None)
