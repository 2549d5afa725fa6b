"""Loading: what cannot be used is refused in one line, and what is loaded computes what transformers computes."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import dppo_lightning
from dppo_lightning.base.batch import TrainingBatch, pack
from dppo_lightning.base.pretrained import context_length, load_config, load_model, load_tokenizer
from dppo_lightning.base.records import Sequence
from dppo_lightning.train.policy import Policy
from tests.helpers.errors import config_error
from tests.helpers.records import random_sequence


def make_batch(shapes: list[tuple[int, int]]) -> tuple[list[Sequence], TrainingBatch]:
    sequences = [random_sequence(prompt, tokens, seed) for seed, (prompt, tokens) in enumerate(shapes)]
    return sequences, pack(sequences, np.ones(len(sequences)))


@pytest.fixture(scope="module")
def policy(tiny_model_dir: str) -> Policy:
    return Policy(tiny_model_dir, temperature=0.7)


@pytest.fixture(scope="module")
def plain(tiny_model_dir: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)


@pytest.fixture(scope="module")
def dropping_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A GPT-2 whose config asks for dropout everywhere."""
    folder = str(tmp_path_factory.mktemp("dropping"))
    size = {"vocab_size": 96, "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    config = GPT2Config(**size, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("load", [load_config, load_model, load_tokenizer, context_length, Policy])
def test_a_missing_folder_is_named(load: object, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    message = config_error(load, missing)
    assert f"{missing!r} does not exist" in message
    assert "model.policy" in message


@pytest.mark.parametrize("load", [load_config, load_model, load_tokenizer])
def test_a_folder_without_config_is_named(load: object, tmp_path: Path) -> None:
    message = config_error(load, str(tmp_path))
    assert repr(str(tmp_path)) in message
    assert "config.json" in message


def test_a_folder_without_tokenizer_is_named(tiny_model_dir: str) -> None:
    message = config_error(load_tokenizer, tiny_model_dir)
    assert f"no tokenizer in {tiny_model_dir!r}" in message
    assert "save_pretrained" in message


def test_a_folder_without_weights_is_named(tiny_model_dir: str, tmp_path: Path) -> None:
    shutil.copy(Path(tiny_model_dir) / "config.json", tmp_path)
    assert repr(str(tmp_path)) in config_error(load_model, str(tmp_path))


@pytest.mark.parametrize("config", ["{", "{}", '{"model_type": "no-such-architecture"}'])
def test_a_config_that_cannot_be_read_is_refused(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    assert repr(str(tmp_path)) in config_error(load_model, str(tmp_path))


OWN_CODE = {"AutoConfig": "configuration_mine.Mine", "AutoModelForCausalLM": "modeling_mine.Mine"}
UNUSABLE = {
    "newer": ({"model_type": "qwen9"}, "model type `qwen9` but Transformers does not recognize this architecture"),
    "own code": (
        {"model_type": "mine", "auto_map": OWN_CODE},
        r"made of code of its own \(auto_map\), which is never run",
    ),
    "no type": ({"vocab_size": 8}, "Unrecognized model"),
    "a list": ([1], "model folder"),
    "wrong type": ({"model_type": "llama", "hidden_size": "wide"}, "hidden_size"),
}


@pytest.mark.parametrize(("config", "why"), UNUSABLE.values(), ids=UNUSABLE)
@pytest.mark.parametrize("load", [load_config, load_model, load_tokenizer, context_length, Policy])
def test_the_reason_why_a_folder_cannot_be_used_is_given(
    load: object, config: object, why: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = config_error(load, str(tmp_path))
    assert re.search(why, message)
    assert "no such folder" not in message
    assert "set model.policy" in message


def test_a_config_that_is_no_json_is_named_with_the_place(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama",')
    message = config_error(load_config, str(tmp_path))
    assert "not a valid JSON file" in message
    assert "line 1 column 2" in message
    (tmp_path / "config.json").write_bytes(b'{"model_type": "\xff"}')
    assert "\n" not in config_error(load_config, str(tmp_path))


@pytest.fixture
def asked_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: object) -> str:
        raise AssertionError("a question on the terminal")

    monkeypatch.setattr("builtins.input", ask)


@pytest.mark.usefixtures("asked_nothing")
def test_code_of_a_models_own_is_neither_run_nor_asked_about(tiny_policy_dir: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_policy_dir, folder)
    (folder / "mine.py").write_text("raise SystemExit('run')\n")
    (folder / "config.json").write_text(
        json.dumps(
            {"model_type": "mine", "auto_map": dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "mine.Mine")}
        )
    )
    for load in (load_config, load_model, load_tokenizer, Policy):
        assert "code of its own" in config_error(load, str(folder))
    shutil.copy(Path(tiny_policy_dir) / "config.json", folder)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}})
    )
    assert "code of its own" in config_error(load_tokenizer, str(folder))


def test_nothing_in_the_package_lets_transformers_ask() -> None:
    calls = [
        (path.name, call.lineno, ast.unparse(call))
        for path in Path(dppo_lightning.__file__).parent.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and re.match(r"Auto\w+\.from_(pretrained|config)\(", ast.unparse(call))
    ]
    assert len(calls) >= 7
    assert [call for call in calls if "trust_remote_code=False" not in call[2]] == []


def test_a_tokenizer_that_cannot_be_read_is_named_with_the_reason(tiny_policy_dir: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_policy_dir, folder)
    (folder / "tokenizer.json").write_text("{")
    message = config_error(load_tokenizer, str(folder))
    assert repr(str(folder)) in message
    assert "line 1 column" in message


def test_weights_that_are_damaged_or_missing_are_named(tiny_untied_dir: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_untied_dir, folder)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {n: w for n, w in weights.items() if "layers.1.mlp" not in n}, folder / "model.safetensors", {"format": "pt"}
    )
    assert "model.layers.1.mlp.down_proj.weight, model.layers.1.mlp.gate" in config_error(load_model, str(folder))
    save_file(weights | {"lm_head.weight": torch.zeros(7, 64)}, folder / "model.safetensors", {"format": "pt"})
    assert "holds no weights, or of another shape, for lm_head.weight of a Llama" in config_error(
        load_model, str(folder)
    )
    (folder / "model.safetensors").write_bytes(b"12345678")
    assert "cannot load a causal language model" in config_error(load_model, str(folder))


def test_an_unknown_id_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "no model 'no-such-model'" in config_error(load_model, "no-such-model")


def test_the_tokenizer_of_a_folder_is_found(tiny_policy_dir: str) -> None:
    assert load_tokenizer(tiny_policy_dir).decode([33, 34]) == "AB"


def test_the_context_is_that_of_the_config(tiny_model_dir: str) -> None:
    assert context_length(tiny_model_dir) == 512


@settings(deadline=None, max_examples=10)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5))
def test_padding_on_the_right_changes_no_hidden_state(
    policy: Policy, plain: torch.nn.Module, shapes: list[tuple[int, int]]
) -> None:
    sequences, batch = make_batch(shapes)
    with torch.no_grad():
        mine = policy.hidden_states(batch)
        alone = [plain.model(torch.from_numpy(s.token_ids)[None]).last_hidden_state[0] for s in sequences]
    expected = torch.cat([hidden[s.generated - 1] for hidden, s in zip(alone, sequences, strict=True)])
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)  # of order 1; another batch, another order of sums


def test_log_probs_are_those_of_full_logits_at_the_temperature(policy: Policy, plain: torch.nn.Module) -> None:
    sequences, batch = make_batch([(3, 5), (1, 2), (6, 1)])
    expected = []
    with torch.no_grad():
        for s in sequences:
            table = (plain(torch.from_numpy(s.token_ids)[None]).logits[0].double() / 0.7).log_softmax(-1)
            expected += [table[place - 1, s.token_ids[place]].item() for place in s.generated]
    found = policy.logp(batch)
    assert not found.requires_grad
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


def test_an_empty_micro_batch_has_no_hidden_states(policy: Policy) -> None:
    assert policy.hidden_states(pack([], np.zeros(0))).shape == (0, 64)


def test_dropout_is_off_even_in_training_mode(dropping_dir: str) -> None:
    batch = make_batch([(3, 8)])[1]
    untouched = GPT2LMHeadModel.from_pretrained(dropping_dir).train()
    assert not torch.equal(untouched(batch.input_ids).logits, untouched(batch.input_ids).logits)
    policy = Policy(dropping_dir).train()
    assert torch.equal(policy.logp(batch), policy.logp(batch))


def test_weights_are_loaded_in_float32(tiny_model_dir: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in load_model(str(tmp_path)).parameters()} == {torch.float32}


def test_a_tied_weight_is_listed_once_and_an_untied_one_as_itself(tiny_model_dir: str, tiny_untied_dir: str) -> None:
    tied, untied = (list(Policy(folder).named_weights()) for folder in (tiny_model_dir, tiny_untied_dir))
    names = [name for name, _ in tied]
    assert len(names) == len(set(names)) == len({tensor.data_ptr() for _, tensor in tied})
    assert {name for name, _ in untied} - set(names) == {"lm_head.weight"}
    assert set(names) <= {name for name, _ in untied}
    assert not any(tensor.requires_grad for _, tensor in tied)


def test_weights_carry_the_names_of_the_hugging_face_state_dict(tiny_untied_dir: str) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_untied_dir, dtype=torch.float32).state_dict()
    mine = dict(Policy(tiny_untied_dir).named_weights())
    assert set(mine) == set(plain)
    assert all(torch.equal(mine[name], plain[name]) for name in plain)


def test_a_parameter_is_trained_once_though_the_head_holds_it_too(tiny_model_dir: str) -> None:
    policy = Policy(tiny_model_dir)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    assert sum(p.numel() for p in policy.parameters()) == sum(p.numel() for p in plain.parameters())


def test_checkpointing_runs_each_layer_twice_and_changes_no_gradient(tiny_model_dir: str) -> None:
    batch = make_batch([(3, 5), (1, 2)])[1]
    gradients, calls = [], []
    for checkpointing in (False, True):
        policy = Policy(tiny_model_dir, gradient_checkpointing=checkpointing)
        seen: list[int] = []
        policy.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        policy.hidden_states(batch).square().mean().backward()
        gradients.append(policy.model.model.embed_tokens.weight.grad)
        calls.append(len(seen))
    assert calls == [1, 2]
    torch.testing.assert_close(*gradients)
