"""The list of mutants fits the code that it is applied to."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.places import ROOT
from tests.mutants import MUTANTS, Mutant
from tests.mutate import mutated, name, try_all


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


def test_a_mutant_is_killed_by_a_test_that_fails_and_by_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    right = "def of_mutants(x):\n    return 2 * x  # twice\n"
    (tmp_path / "core_of_mutants.py").write_text(right)
    (tmp_path / "test_it.py").write_text(
        "from core_of_mutants import of_mutants\n\n\ndef test_it():\n    assert of_mutants(3) == 6\n"
    )
    (tmp_path / "test_for_ever.py").write_text("import time\n\n\ndef test_it():\n    time.sleep(1000)\n")
    killed, *survivors = (
        Mutant("core_of_mutants.py", "2 * x", "3 * x", ("test_it.py",)),
        Mutant("core_of_mutants.py", "# twice", "# thrice", ("test_it.py",)),
        Mutant("core_of_mutants.py", "def of_mutants", "def of_none", ("test_it.py",)),
        Mutant("core_of_mutants.py", "2 * x", "4 * x", ("test_nowhere.py",)),
        Mutant("core_of_mutants.py", "2 * x", "5 * x", ("test_for_ever.py",)),
    )
    assert try_all([killed, *survivors[:3]], [tmp_path], limit=60) == [name(mutant) for mutant in survivors[:3]]
    assert try_all(survivors[3:], [tmp_path], limit=1) == [name(survivors[3])]
    assert (tmp_path / "core_of_mutants.py").read_text() == right
    said = capsys.readouterr().out
    assert [said.count(text) for text in ("killed in", "its tests pass", "with status", "no end after")] == [1, 1, 2, 1]
