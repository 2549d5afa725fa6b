"""The list of mutants fits the code that it is applied to."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutants import MUTANTS, Mutant
from mutate import mutated, name

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("mutant", MUTANTS, ids=name)
def test_a_mutant_changes_one_place_and_names_its_tests(mutant: Mutant) -> None:
    text = (ROOT / mutant.file).read_text()
    changed = mutated(mutant, text)
    assert changed != text
    compile(changed, mutant.file, "exec")
    assert all((ROOT / test).is_file() for test in mutant.tests)
    assert not any(test.startswith("tests/slow/") for test in mutant.tests)


def test_no_mutant_is_listed_twice() -> None:
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in MUTANTS}) == len(MUTANTS) >= 30


@pytest.mark.parametrize("text", ["", "a = b\na = b\n"])
def test_a_change_whose_place_is_not_certain_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"x.py has 'a = b' \d times, not once"):
        mutated(Mutant("x.py", "a = b", "a = c", ()), text)
