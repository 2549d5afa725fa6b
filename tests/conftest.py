"""What holds for every test, and tiny models with random weights for those that need a model."""
# ruff: noqa: E402  (torch reads the environment when it loads)

import os
import sys
from collections.abc import Iterator
from typing import Any

from tests.helpers.surroundings import TERMINAL, without_the_users_settings

without_the_users_settings(os.environ)

import pytest
from hypothesis import settings
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from xdist.scheduler import LoadScopeScheduling

from tests.helpers import limits
from tests.helpers.models import save_character_tokenizer, save_tiny_llama

# The same examples every time, and no time limit on one: a test that fails, fails for everybody.
settings.register_profile("suite", derandomize=True, deadline=None, database=None)
settings.load_profile("suite")

TOGETHER = {
    "scaling",
    "generate/vllm/test_adapters.py",
    "generate/test_engine_contract.py",
    "generate/vllm/test_restart.py",
    "run/test_export.py",
    "run/test_fit.py",
    "train/test_lora.py",
    "run/test_prepare.py",
    "train/test_shared_prompt.py",
}
"""Folders and files whose tests share what is dear to make."""

SLOW_LIMIT = 1800.0
"""Seconds for one test of the slow suite."""


def pytest_configure(config: pytest.Config) -> None:
    limits.mark_this_run()
    config.pluginmanager.register(limits)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_LIMIT))


class Grouped(LoadScopeScheduling):
    """Tests that share an engine, ranks or a run stay on one worker, the largest groups first; others go anywhere."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0].removeprefix("tests/")
        return next((group for group in (path, path.partition("/")[0]) if group in TOGETHER), nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return Grouped(config, log)


@pytest.fixture(scope="session", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An empty folder, a terminal of 80 columns; and at the end nothing still runs that a test has started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("started_here"))
        for name, value in TERMINAL.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["dppo"])  # Lightning warns of pytest's
        patch.setattr(_SubprocessScriptLauncher, "_call_children_scripts", _start_no_ranks)
        yield
    assert not (left := limits.end_what_is_left()), f"left running: {left}"


def _start_no_ranks(launcher: object) -> None:
    """Of a trainer in the test's own process: Lightning's watch over the ranks would kill that process with them."""
    pytest.fail("a trainer would start this test run once more as its other rank: see helpers/rank_pool.py for ranks")


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny Llama with tied embeddings."""
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tied", tied=True)


@pytest.fixture(scope="session")
def tiny_untied_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny Llama with an output projection of its own."""
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "untied", tied=False)


@pytest.fixture(scope="session")
def tiny_policy_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny Llama that can be trained: with a tokenizer of characters."""
    folder = save_tiny_llama(tmp_path_factory.mktemp("models") / "policy", tied=True)
    save_character_tokenizer(folder)
    return folder
