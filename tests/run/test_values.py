"""Values of a recipe that are none: what is empty, no text, or has no end."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import pytest
import yaml

from dppo_lightning.run.cli import RecipeReader
from dppo_lightning.run.values import check_readable, takes_none
from tests.helpers.errors import config_error
from tests.helpers.places import ROOT
from tests.helpers.sizes import recipe

BATCHES = {"class_path": "TransformersEngine", "init_args": {"batch_size": None}}
MASKS = [{"class_path": "BinaryTV", "init_args": {"delta": None}}, {"class_path": "IcePop"}]


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"data": {"max_new_tokens": None}}, "data.max_new_tokens"),
        ({"trainer": {"max_steps": None}}, "trainer.max_steps"),
        ({"model": {"kl": {"coefficient": None}}}, "model.kl.coefficient"),
        ({"model": {"lora": {"rank": None}}}, "model.lora.rank"),
        ({"data": {"engine": BATCHES}}, "data.engine.batch_size"),
        (
            {"model": {"trust_region": {"class_path": "Combined", "init_args": {"masks": MASKS}}}},
            "model.trust_region.masks[0].delta",
        ),
    ],
)
def test_a_value_that_is_empty_is_named(given: dict[str, Any], name: str, tmp_path: Path) -> None:
    file = tmp_path / "more.yaml"
    file.write_text(yaml.safe_dump(given))
    words = ["fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), "--config", str(file)]
    assert config_error(RecipeReader, words) == f"{name} is empty (null): give it a value, or leave the line out"


def test_a_value_may_be_empty_where_its_type_says_so(tmp_path: Path) -> None:
    file = tmp_path / "more.yaml"
    file.write_text(yaml.safe_dump({"data": {"max_prompt_tokens": None}, "trainer": None, "model": {"lora": None}}))
    assert recipe("--config", str(file))["data"]["max_prompt_tokens"] is None


@pytest.mark.parametrize(
    ("kind", "taken"),
    [(int, False), (int | None, True), (Any, True), (list[int | None], False), (Optional[int], True)],  # noqa: UP045
)
def test_none_is_a_value_of_a_type_or_not(kind: Any, taken: bool) -> None:
    assert takes_none(kind) == taken


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: \xd3\x00", "is not UTF-8: invalid continuation byte at byte 3"),
        (b"a: &x [1, *x]", "an anchor (&) holds an alias (*) of itself"),
        (b"a: &x\n  b:\n    c: *x", "an anchor (&) holds an alias (*) of itself"),
        (b"[" * 5000, "is nested too deeply"),
    ],
)
def test_a_recipe_without_an_end_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    assert said in config_error(RecipeReader, ["fit", "--config", str(file)])


def test_an_alias_may_be_used_twice(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("a: &x [1, 2]\nb: *x\nc: [*x, *x]")
    check_readable(file)
