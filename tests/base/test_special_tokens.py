"""What begins and ends a text: the stop ids and their origins, and what of a completion its text leaves out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.base.pretrained import load_model, load_tokenizer
from dppo_lightning.base.special_tokens import Decoder, stop_tokens
from dppo_lightning.run.export import Trained, write_model

END = 95  # of the tiny policy's tokenizer, which is the only one to name it


@pytest.fixture
def folder(tiny_policy_dir: str, tmp_path: Path) -> Path:
    """The tiny policy without a generation config."""
    shutil.copytree(tiny_policy_dir, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").unlink()
    return tmp_path / "model"


def configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def stops(folder: Path) -> dict[int, str]:
    return stop_tokens(str(folder), load_tokenizer(str(folder)))


@pytest.mark.parametrize("given", [[5, 1], 5])
def test_without_a_generation_config_the_models_config_says_where_completions_end(folder: Path, given: Any) -> None:
    configure(folder, eos_token_id=given)
    wanted = {5, END} | (set(given) if isinstance(given, list) else set())
    assert tuple(stop_tokens(str(folder), load_tokenizer(str(folder)))) == tuple(sorted(wanted))
    assert stops(folder)[5] == "the model's config"
    assert stops(folder)[END] == "tokenizer"


def test_a_generation_config_says_it_instead(folder: Path) -> None:
    configure(folder, eos_token_id=[1, 5])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, END]}))
    assert stops(folder) == {7: "generation_config.json", END: "tokenizer and generation_config.json"}


def test_a_generation_config_that_names_no_end_leaves_it_to_the_models_config(folder: Path) -> None:
    configure(folder, eos_token_id=5)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    assert stops(folder) == {5: "the model's config", END: "tokenizer"}


def test_the_end_may_stand_in_the_config_of_the_text_model_alone(tmp_path: Path, tiny_policy_dir: str) -> None:
    text = {"model_type": "gemma3_text", "vocab_size": 96, "eos_token_id": [3, 5]}
    config = {"model_type": "gemma3", "eos_token_id": None, "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert set(stop_tokens(str(tmp_path), load_tokenizer(tiny_policy_dir))) == {3, 5, END}


def test_an_exported_model_ends_where_its_base_does(folder: Path, tmp_path: Path) -> None:
    configure(folder, eos_token_id=[1, 5])
    exported = tmp_path / "exported"
    exported.mkdir()
    write_model(exported, load_model(str(folder)), Trained(str(folder), None), torch.float32)
    assert set(stop_tokens(str(exported), load_tokenizer(str(folder)))) == set(stops(folder)) == {1, 5, END}


@pytest.mark.parametrize("bad", [96, -1, [5, 4096], "5", [True], 2.0])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_end_that_is_no_id_of_the_model_is_refused_in_one_line(folder: Path, file: str, bad: Any) -> None:
    if file == "config.json":
        configure(folder, eos_token_id=bad)
    else:
        (folder / file).write_text(json.dumps({"eos_token_id": bad}))
    with pytest.raises(ConfigError) as caught:
        stops(folder)
    assert "\n" not in str(caught.value)
    assert "eos_token_id" in str(caught.value)


def test_a_tokenizer_whose_end_is_beyond_the_models_words_is_refused(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "<beyond>"})
    with pytest.raises(ConfigError, match=r"end of sequence of tokenizer is 96, and the model's ids are 0 to 95"):
        stop_tokens(str(folder), tokenizer)


@pytest.mark.parametrize("content", ["{", "[1]", "\ud800"])
def test_a_generation_config_that_cannot_be_read_is_named(folder: Path, content: str) -> None:
    (folder / "generation_config.json").write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(ConfigError, match=r"generation_config\.json (cannot be read|holds a list).*mend it, or remove"):
        stops(folder)


def test_a_model_that_names_no_end_is_refused(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="names no end-of-sequence token"):
        stop_tokens(str(folder), tokenizer)


@pytest.fixture
def thinking(tiny_policy_dir: str) -> PreTrainedTokenizerBase:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_policy_dir)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<think>", "</think>", "<turn>"], "pad_token": "<pad>", "bos_token": "<bos>"}
    )
    return tokenizer


def test_special_tokens_that_neither_begin_nor_end_nor_pad_stay_in_the_text(thinking: Any) -> None:
    think, close, turn = thinking.convert_tokens_to_ids(["<think>", "</think>", "<turn>"])
    row = [thinking.bos_token_id, think, 33, close, 34, thinking.pad_token_id, turn]
    decoder = Decoder(thinking, stops=(turn,))
    assert decoder.texts([row, [33, END], []]) == ["<think>A</think>B", "A", ""]
    assert decoder.raw_texts([row, [33, END], []]) == ["<bos><think>A</think>B<pad><turn>", "A<end>", ""]
    assert Decoder(thinking).texts([row]) == ["<think>A</think>B<turn>"]


def test_ids_beyond_the_tokenizer_have_no_text(thinking: Any) -> None:
    assert Decoder(thinking).texts([[33, 4000, 34]]) == ["AB"]
