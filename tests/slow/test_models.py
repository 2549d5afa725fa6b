"""Every causal LM of transformers is trained as what it is or refused by name, and docs/models.md says which."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.places import ROOT

pytestmark = pytest.mark.slow


def test_the_table_of_models_is_what_the_command_writes(tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    command = [sys.executable, str(ROOT / "benchmarks" / "models.py"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["wrong"] == []
    assert found["tried"] > 120
    page = (ROOT / "docs" / "models.md").read_text()
    table = page.partition("writes from here -->\n")[2].partition("<!-- to here -->")[0]
    assert out.read_text() == table
