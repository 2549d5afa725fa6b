"""``dppo export``: what is written is what was trained, for every reader of such folders."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dppo_lightning.base.batch import pack
from dppo_lightning.base.records import Completion, Prompt, Sequence
from dppo_lightning.generate.engine import EngineSpec, Request, Sampling
from dppo_lightning.generate.vllm.embedded import VLLMEmbedded
from dppo_lightning.run.cli import main
from dppo_lightning.train.lora import LoRA
from dppo_lightning.train.policy import Policy
from tests.helpers.errors import printed_error
from tests.helpers.recipes import changed, recipe, run

ADAM = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}}
LORA = {"rank": 4, "alpha": 8.0, "target_modules": ["q_proj", "v_proj", "down_proj"]}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def base(tiny_policy_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with a generation config and a chat template of its own."""
    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(tiny_policy_dir, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 95, "temperature": 0.5}))
    return str(folder)


@pytest.fixture(scope="module")
def runs(base: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two steps of the model itself, and two of adapters on it."""
    made = {}
    for name, lora in (("full", None), ("lora", LORA)):
        folder = tmp_path_factory.mktemp(name)
        run("fit", changed(recipe(folder, base), model__optimizer=ADAM, model__lora=lora), folder)
        made[name] = folder / "run"
    return made


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing but the run directory and the base model may be needed."""
    monkeypatch.chdir(tmp_path)


def export(source: Path, out: Path, *options: str) -> None:
    main(["export", "--run", str(source), "--out", str(out), *options])


def trained(source: Path, base: str, checkpoint: str = "last.ckpt") -> Policy:
    """The policy of a run, put together from its checkpoint."""
    lora = LoRA(**LORA) if source.parent.name.startswith("lora") else None
    policy = Policy(base, lora=lora)
    weights = torch.load(source / "checkpoints" / checkpoint, weights_only=False)["state_dict"]
    policy.load_state_dict({n.removeprefix("policy."): w for n, w in weights.items() if n.startswith("policy.")})
    return policy


IDS = np.random.default_rng(0).integers(0, 95, 40)


def gap(policy: Policy, model: Any) -> float:
    """Largest difference of log-probs over a text."""
    completion = Completion("r", IDS[5:], np.zeros(35, np.float32), "stop", np.zeros(35, np.int64))
    sequence = Sequence.from_completion(Prompt("p", tuple(IDS[:5].tolist()), ""), completion, 0.0)
    mine = policy.logp(pack([sequence], np.ones(1), policy.layout))
    with torch.no_grad():
        table = model(torch.from_numpy(IDS)[None]).logits[0].float().log_softmax(-1)
    return (table[4:-1].gather(1, torch.from_numpy(IDS[5:])[:, None])[:, 0] - mine).abs().max().item()


def load(folder: Path | str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize(("name", "tolerance"), [("full", 1e-6), ("lora", 1e-5)])  # W x + B A x, and (W + B A) x
def test_the_folder_gives_the_log_probs_of_the_trained_policy(
    name: str, tolerance: float, runs: dict[str, Path], base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(runs[name], tmp_path / "out")
    policy = trained(runs[name], base)
    assert gap(policy, load(tmp_path / "out")) < tolerance
    assert gap(policy, load(base)) > 1e-2
    assert (tmp_path / "out" / "generation_config.json").read_text() == json.dumps(
        {"eos_token_id": 95, "temperature": 0.5}
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer("AB").input_ids == [33, 34]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".jinja", ".safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert f"{tmp_path / 'out'}: LlamaForCausalLM, 0.1M parameters" in capsys.readouterr().out


def test_exported_weights_are_bit_for_bit_those_of_the_policy(runs: dict[str, Path], base: str, tmp_path: Path) -> None:
    export(runs["lora"], tmp_path / "out")
    found = dict(load(tmp_path / "out").named_parameters())
    wanted = dict(trained(runs["lora"], base).named_weights())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())


def test_bfloat16_is_the_rounded_float32(runs: dict[str, Path], base: str, tmp_path: Path) -> None:
    export(runs["full"], tmp_path / "out", "--dtype", "bfloat16")
    found = dict(load(tmp_path / "out", torch.bfloat16).named_parameters())
    wanted = dict(trained(runs["full"], base).named_weights())
    assert all(torch.equal(found[name], weight.bfloat16()) for name, weight in wanted.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_adapters_alone_load_in_peft(runs: dict[str, Path], base: str, tmp_path: Path) -> None:
    export(runs["lora"], tmp_path / "out", "--adapter")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8.0, base)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    model = PeftModel.from_pretrained(load(base), str(tmp_path / "out"))
    assert gap(trained(runs["lora"], base), model) < 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TEMPLATE


def test_another_checkpoint_can_be_chosen(runs: dict[str, Path], base: str, tmp_path: Path) -> None:
    older = tmp_path / "older.ckpt"
    saved = torch.load(runs["full"] / "checkpoints" / "last.ckpt", weights_only=False)
    name = "policy.model.model.norm.weight"
    saved["state_dict"][name] = saved["state_dict"][name] + 1
    torch.save(saved, older)
    export(runs["full"], tmp_path / "out", "--checkpoint", str(older))
    export(runs["full"], tmp_path / "named", "--checkpoint", "step=2.ckpt")
    moved, named = (load(tmp_path / folder).model.norm.weight for folder in ("out", "named"))
    assert torch.equal(moved, named + 1)


def test_a_distributed_checkpoint_is_joined(runs: dict[str, Path], base: str, tmp_path: Path) -> None:
    from torch.distributed import checkpoint as dcp

    weights = torch.load(runs["lora"] / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
    state = {"state_dict": weights, "optimizer_0": {"state": {"exp_avg": torch.zeros(3)}}}
    dcp.save(state, checkpoint_id=tmp_path / "sharded.ckpt", no_dist=True)
    export(runs["lora"], tmp_path / "out", "--checkpoint", str(tmp_path / "sharded.ckpt"))
    assert gap(trained(runs["lora"], base), load(tmp_path / "out")) < 1e-5


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_loads_the_folder(runs: dict[str, Path], base: str, tmp_path: Path) -> None:
    export(runs["lora"], tmp_path / "out")
    policy, engine = trained(runs["lora"], base), VLLMEmbedded(kv_cache_gib=0.25)
    try:
        engine.start(EngineSpec(model=str(tmp_path / "out"), max_model_len=128))
        engine.submit([Request("a", tuple(IDS[:5].tolist()), Sampling(max_new_tokens=32), seed=1)])
        (completion,) = engine.poll()
    finally:
        engine.close()
    assert isinstance(completion, Completion)
    sequence = Sequence.from_completion(Prompt("p", tuple(IDS[:5].tolist()), ""), completion, 0.0)
    mine = policy.logp(pack([sequence], np.ones(1), policy.layout)).numpy()
    np.testing.assert_allclose(completion.logp, mine, atol=1e-4)


def refused(capsys: pytest.CaptureFixture[str], source: Path, out: Path, *options: str) -> str:
    """The one line of an export that must leave nothing behind."""
    before = sorted(out.parent.rglob("*"))
    line = printed_error(capsys, export, source, out, *options)
    assert sorted(out.parent.rglob("*")) == before
    return line


def test_nothing_is_written_over(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert "exists already: choose another --out" in refused(capsys, runs["full"], tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--checkpoint", "step=9"], ["no checkpoint 'step=9'", "last.ckpt", "step=2.ckpt"]),
        (["--adapter"], ["trained the model itself", "--adapter"]),
        (["--dtype", "float8"], ["float8"]),
    ],
)
def test_what_is_not_there_is_named(
    options: list[str], words: list[str], runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, runs["full"], tmp_path / "out", *options)
    assert all(word in line for word in words), line


def test_a_folder_that_is_no_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is no run directory" in refused(capsys, tmp_path, tmp_path / "out")


def test_a_base_model_out_of_reach_is_named(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "run"
    moved.mkdir()
    config = yaml.safe_load((runs["full"] / "config.yaml").read_text())
    (moved / "config.yaml").write_text(yaml.safe_dump(changed(config, model__policy="./gone")))
    line = refused(capsys, moved, tmp_path / "out")
    assert all(word in line for word in ("'./gone' does not exist", "the run was started in"))


def test_a_checkpoint_of_something_else_is_refused(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = str(runs["lora"] / "checkpoints" / "last.ckpt")
    assert "lacks model.layers.0.self_attn.q_proj.weight" in refused(
        capsys, runs["full"], tmp_path / "out", "--checkpoint", other
    )
    wrong = tmp_path / "wrong.ckpt"
    saved = torch.load(runs["full"] / "checkpoints" / "last.ckpt", weights_only=False)
    for change, words in (
        ({"policy.model.extra": torch.zeros(1)}, "unknown extra"),
        ({"policy.model.model.norm.weight": torch.zeros(3)}, "another shape for model.norm.weight"),
    ):
        torch.save({"state_dict": saved["state_dict"] | change}, wrong)
        assert words in refused(capsys, runs["full"], tmp_path / "out", "--checkpoint", str(wrong))


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all"])
def test_a_damaged_file_is_refused(
    content: bytes, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.ckpt").write_bytes(content)
    line = refused(capsys, runs["full"], tmp_path / "out", "--checkpoint", str(tmp_path / "bad.ckpt"))
    assert "bad.ckpt cannot be read" in line


def test_a_folder_of_no_strategy_is_refused(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.ckpt").mkdir()
    line = refused(capsys, runs["full"], tmp_path / "out", "--checkpoint", str(tmp_path / "empty.ckpt"))
    assert "no checkpoint of Lightning, DeepSpeed or FSDP2" in line
