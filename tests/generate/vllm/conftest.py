"""What the tests of VLLMRemote share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dppo_lightning.generate.vllm import fleet as vllm_fleet
from tests.helpers.fake_vllm import Fakes


@pytest.fixture
def fakes(tiny_policy_dir: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fakes]:
    monkeypatch.setattr(vllm_fleet, "RETRY_SECONDS", (0.02, 0.2))
    monkeypatch.setattr(vllm_fleet, "ABORT_SECONDS", 0.3)
    fakes = Fakes(tiny_policy_dir)
    yield fakes
    if fakes.engine is not None:
        fakes.engine.close()
    for server in fakes.servers:
        server.close()
