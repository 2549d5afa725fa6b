"""The files in benchmarks/, loaded into this process: a process of their own would import torch and more each time."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers.places import ROOT

BENCHMARKS = ROOT / "benchmarks"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A benchmark, the same one each time within a test."""
    loaded = sys.modules.get(f"benchmark_{name}")
    if loaded is not None:
        return loaded
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for other, module in list(sys.modules.items()):  # what an earlier test's benchmarks imported from there
        if Path(getattr(module, "__file__", None) or "/").parent == BENCHMARKS and not other.startswith("benchmark_"):
            monkeypatch.delitem(sys.modules, other)
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)  # by its file: tests/scaling/ has the name of a benchmark
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def shown_help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> str:
    """What a benchmark prints for ``--help``."""
    module = load(name, monkeypatch)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 0
    return capsys.readouterr().out
