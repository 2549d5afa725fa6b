"""A model that the tests of the doctor size."""

from __future__ import annotations

import pytest

from dppo_lightning.run.doctor.memory import ModelShape
from tests.helpers.sizes import save_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("shapes") / "tied")


@pytest.fixture(scope="module")
def shape(folder: str) -> ModelShape:
    return ModelShape.from_name(folder)
