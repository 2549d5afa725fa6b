"""The shape of the package: imports point down and in no circle, no file is long, no folder is crowded."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers.places import ROOT

PACKAGE = ROOT / "dppo_lightning"
FLOORS = (
    {"base"},
    {"prompts", "reward", "advantage", "trust_region", "scaling"},
    {"generate"},
    {"sync"},
    {"train"},
    {"run"},
)
"""Low to high: a part imports from its own floor only itself, and from the floors below."""

MODULES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in PACKAGE.rglob("*.py")
}
TOP = {"dppo_lightning", "dppo_lightning.__main__"}


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it: inside a function and for types alone too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("dppo_lightning"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else str(node.module) for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
        else:
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}:{node.lineno}: write it absolute"
    return found


def part(module: str) -> str:
    return module.split(".")[1]


def floor(module: str) -> int:
    return next(number for number, parts in enumerate(FLOORS) if part(module) in parts)


def arrows_up(module: str, imported: set[str]) -> list[str]:
    others = [other for other in imported if part(other) != part(module)]
    return [f"{module} imports {other}" for other in others if floor(other) >= floor(module)]


@pytest.mark.parametrize("module", sorted(MODULES.keys() - TOP))
def test_imports_point_down(module: str) -> None:
    assert not arrows_up(module, imports(MODULES[module]))


def test_an_import_that_is_turned_round_is_noticed() -> None:
    assert arrows_up("dppo_lightning.generate.stream", {"dppo_lightning.sync.weight_sync", "dppo_lightning.advantage"})
    assert arrows_up("dppo_lightning.reward.base", {"dppo_lightning.prompts.base"})


def test_no_import_goes_round_in_a_circle() -> None:
    TopologicalSorter({module: imports(path) - {module} for module, path in MODULES.items()}).prepare()


def test_files_are_short_and_folders_are_small() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in MODULES.values()}
    assert not {name: lines for name, lines in lengths.items() if lines > 350}
    kinds = {"prompts", "reward", "trust_region"}  # a new one of a kind is a new file, and needs no more than that
    assert len([path for path in MODULES.values() if path.relative_to(PACKAGE).parts[0] not in kinds]) <= 105
    shown = {path.relative_to(PACKAGE).parts[0] for path in MODULES.values()}
    assert len(shown) <= 12


@pytest.mark.parametrize(("library", "home"), [("vllm", "generate/vllm"), ("deepspeed", "scaling/zero.py")])
def test_one_place_imports_a_heavy_library(library: str, home: str) -> None:
    places = set()
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any(name.split(".")[0] == library for name in names):
                places.add(path.relative_to(PACKAGE).as_posix())
    assert places
    assert all(place.startswith(home) for place in places)


def test_the_package_loads_nothing_until_a_name_is_used() -> None:
    code = (
        "import sys, dppo_lightning as d; print(*({'torch', 'vllm', 'deepspeed'} & sys.modules.keys())); d.DPPOModule"
    )
    code += "; print(*({'vllm', 'deepspeed'} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


UNSAFE = ("pickle.load", "pickle.loads", "eval", "exec")


def test_nothing_is_loaded_that_could_run_code() -> None:
    loads = 0
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"dill", "joblib", "shelve", "marshal"}, f"{path}:{node.lineno}"
                # sends a reward to its workers; what they answer is JSON
                assert "cloudpickle" not in names or path.name == "pool.py", f"{path}:{node.lineno}"
            if not isinstance(node, ast.Call):
                continue
            called, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert given.get("trust_remote_code", "False") == "False", f"{path}:{node.lineno}"
            if called.endswith((".from_pretrained", ".from_config")):
                loads += 1
                assert "trust_remote_code" in given, f"{path}:{node.lineno}"
            if called == "torch.load":
                assert given.get("weights_only") == "True", f"{path}:{node.lineno}"
            of_the_trainer = path.name in ("cell.py", "scorer.py") and called == "pickle.loads"  # in workers
            assert of_the_trainer or called not in UNSAFE, f"{path}:{node.lineno}"
    assert loads
