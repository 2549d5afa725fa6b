"""Every recipe in configs/ starts: on a small model of its own architecture, with its own precision and strategy.

What a recipe says is kept but for sizes, and for what this machine does not have: the model's weights, its data files,
GPUs, several nodes, and vLLM, in whose place transformers generates (the recipes for the CPU run with vLLM in
tests/slow/test_recipes.py). So `accelerator: gpu`, `num_nodes`, and the engine's settings are built by
tests/test_configs.py and sized below, not run.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pyarrow import Table, parquet
from transformers import AutoTokenizer, LlamaConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from dppo_lightning.run.cli import RecipeReader
from dppo_lightning.run.doctor.command import doctor_parser
from dppo_lightning.run.doctor.memory import GIB
from dppo_lightning.run.doctor.recipe import report
from dppo_lightning.run.parsing import underscored
from tests.helpers.command_line import fit
from tests.helpers.models import save_character_tokenizer, save_tiny_llama
from tests.helpers.places import ROOT
from tests.helpers.rank_pool import RankPool

FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml"))
CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def given(file: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / file).read_text())


RECIPES = [file for file in FILES if "prompts" in given(file).get("data", {})]
PIECES = [file for file in FILES if file not in RECIPES]
"""To combine with a recipe; here with the quickstart."""


def small_llama(folder: Path) -> None:
    save_tiny_llama(folder, tied=True)
    save_character_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)


def small_qwen3_moe(folder: Path) -> None:
    config = Qwen3MoeConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_experts=4, num_experts_per_tok=2,
        tie_word_embeddings=False, max_position_embeddings=512, initializer_range=0.1, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    save_character_tokenizer(folder)


MODELS: dict[str, Callable[[Path], None]] = {
    "models/tiny": small_llama,
    "models/smollm2": small_llama,
    "Qwen/Qwen3-30B-A3B-Base": small_qwen3_moe,
}


def shrunken(file: str, folder: Path) -> dict[str, Any]:
    """What is given on top of a recipe, or of the quickstart below a piece; makes the model and the data."""
    recipe = given(file if file in RECIPES else "configs/quickstart.yaml")
    piece = {} if file in RECIPES else given(file)
    data, prompts = recipe["data"], recipe["data"]["prompts"]
    MODELS[recipe["model"]["policy"]](folder / "small")
    if prompts["class_path"].endswith("ParquetPrompts"):
        questions = [{"prompt": f"What is {a} + {a}?", "answer": f"${2 * a}$"} for a in range(16)]
        for part, rows in (("train", questions[:12]), ("heldout", questions[12:])):
            parquet.write_table(Table.from_pylist(rows), folder / f"{part}.parquet")
        small = {"train": "train.parquet", "heldout": "heldout.parquet"}
    elif prompts["class_path"].endswith("HumanEvalPrompts"):
        small = {"heldout": 4}
    else:
        small = {"train": 12, "heldout": 4}
    ranks = 2 if "strategy" in (piece.get("trainer") or recipe["trainer"]) else 1
    return {
        "trainer": {
            "accelerator": "cpu",
            "devices": ranks,
            "num_nodes": 1,
            "max_steps": 2,
            "accumulate_grad_batches": min(recipe["trainer"]["accumulate_grad_batches"], 2),
            "enable_progress_bar": False,
        },
        "model": {"policy": "small"},
        "data": {
            "prompts": {"class_path": prompts["class_path"], "init_args": small},
            "engine": {"class_path": "TransformersEngine"},
            "prompts_per_step": 2,
            "samples_per_prompt": 4,
            "steps_per_rollout": min(data["steps_per_rollout"], 2),
            "max_new_tokens": 6,
            "max_prompt_tokens": None,
            "heldout_samples": 1,
        },
    }


@pytest.mark.parametrize("file", FILES)
def test_every_recipe_starts(file: str, two_ranks: RankPool, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(shrunken(file, tmp_path)))
    below = [] if file in RECIPES else ["configs/quickstart.yaml"]
    arguments = [word for name in (*below, file) for word in ("--config", str(ROOT / name))]
    arguments += ["--config", "small.yaml"]
    if yaml.safe_load((tmp_path / "small.yaml").read_text())["trainer"]["devices"] > 1:
        metrics, _ = two_ranks.run(fit, tmp_path, arguments, timeout=120)
    else:
        metrics = fit(tmp_path, arguments)
    assert len(metrics["train/loss"]) == 2
    assert all(math.isfinite(loss) for loss in metrics["train/loss"])
    cut_off_is_left_out = given(file).get("data", {}).get("selection", {}).get("overlong") == "mask"
    assert min(metrics["train/tokens"]) > 0 or cut_off_is_left_out
    assert max(metrics["sync/parity_error"]) < (0.5 if "precision" in given(file).get("trainer", {}) else 1e-3)
    said = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    for name in ("precision", "strategy"):
        wanted = given(file).get("trainer", {}).get(name)
        assert wanted is None or class_of(said["trainer"][name]) == class_of(wanted)


def hardware(file: str) -> list[str]:
    """What `dppo doctor` is to be told, of the command in the comments at the top of a recipe."""
    top = "".join(line for line in (ROOT / file).read_text().splitlines(keepends=True) if line.startswith("#"))
    (command,) = re.findall(r"^#   dppo doctor (.*)$", top, re.MULTILINE)
    return shlex.split(command)


@pytest.mark.parametrize("file", RECIPES)
def test_the_doctor_says_that_a_recipe_fits_the_hardware_of_its_header(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DPPO_API_KEY", "of nobody")
    chosen = doctor_parser().parse_args(underscored(hardware(file)))
    assert chosen.config == [file]
    SHAPES[given(file)["model"]["policy"]].save_pretrained(tmp_path)
    recipe = RecipeReader(["fit", "--config", str(ROOT / file), "--model.policy", str(tmp_path)]).config.fit.as_dict()
    trainer = recipe["trainer"]
    if trainer["accelerator"] == "gpu":
        assert chosen.gpus == trainer["devices"] * trainer["num_nodes"]
    _, lines, fits = report(recipe, chosen.gpus, chosen.gpu_memory_gib * GIB)
    assert fits, lines


def test_the_example_of_the_docs_is_what_the_doctor_prints(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "doctor.md").read_text()
    (command,) = re.findall(r"dppo doctor (--config .*)", page)
    chosen = doctor_parser().parse_args(underscored(shlex.split(command)))
    SHAPES["models/smollm2"].save_pretrained(tmp_path)
    arguments = ["fit", "--config", str(ROOT / chosen.config[0]), "--model.policy", str(tmp_path)]
    recipe = RecipeReader(arguments).config.fit.as_dict()
    table, lines, _ = report(recipe, chosen.gpus, chosen.gpu_memory_gib * GIB)
    (shown,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in shown.splitlines() if "│" in line]
    assert rows == [list(row) for row in zip(*(column.cells for column in table.columns), strict=True)]
    assert shown.splitlines()[2 + len(rows) :] == lines


SHAPES = {
    "models/tiny": LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
    ),
    "models/smollm2": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "Qwen/Qwen3-30B-A3B-Base": Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        max_position_embeddings=32768, tie_word_embeddings=False,
    ),
}  # fmt: skip
"""The configs of the models that the recipes name, as they are published or as `dppo prepare` makes them."""


def class_of(value: Any) -> Any:
    return value["class_path"] if isinstance(value, dict) else value
