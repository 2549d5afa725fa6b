"""Servers that are not what a run needs, and settings of VLLMRemote that cannot work, are refused in one line."""

from __future__ import annotations

import importlib.util
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dppo_lightning.base.errors import ConfigError, EngineError
from dppo_lightning.generate.engine import EngineSpec
from dppo_lightning.generate.vllm.remote import VLLMRemote
from dppo_lightning.generate.vllm.server import hold_port
from tests.helpers.fake_vllm import KEY, Fakes, FakeVLLM


def unguarded(server: FakeVLLM) -> None:
    server.answers["unguarded"] = (200, {})


def without_extension(server: FakeVLLM) -> None:
    message = "Call to collective_rpc method failed: Method 'dppo_identity' is not implemented."
    server.answers["/collective_rpc"] = (500, {"error": {"message": message}})


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda server: setattr(server, "model", "other/model"), "serves 'other/model', not .*--served-model-name"),
        (lambda server: setattr(server, "max_model_len", 256), "--max-model-len is 256, the run needs 512"),
        (lambda server: server.worker.update(vocabulary=97), "vocabulary is 97, the run needs 96"),
        (lambda server: server.worker.update(dtype="bfloat16"), "dtype is bfloat16"),
        (lambda server: server.worker.update(logprobs_mode="raw_logprobs"), "logprobs_mode is raw_logprobs"),
        (lambda server: server.worker.update(max_logprobs=8), "--max-logprobs is 8, the run needs 9"),
        (lambda server: server.answers.update({"/tokenize": (200, {"tokens": [1, 2]})}), "tokenizer differs"),
        (lambda server: setattr(server, "dppo_identity", lambda file: server.worker | {"file": ""}), "does not see"),
        (lambda server: server.answers.update({"/weight_info": (404, {})}), "VLLM_SERVER_DEV_MODE=1"),
        (lambda server: server.answers.update({"/v1/models": (200, {})}), "does not answer as vLLM does"),
        (without_extension, "without our --worker-extension-cls"),
        (unguarded, "answers anyone, without the key"),
    ],
)
def test_a_server_that_is_not_what_the_run_needs_is_refused(
    fakes: Fakes, spoil: Callable[[FakeVLLM], None], reason: str
) -> None:
    spoil(fakes.servers[1])
    with pytest.raises(EngineError, match=rf"^vLLM server {fakes.servers[1].url}: .*{reason}") as caught:
        fakes.start()
    assert "\n" not in str(caught.value)


def test_a_wrong_key_is_refused(fakes: Fakes) -> None:
    with pytest.raises(EngineError, match=r"refused the API key .*DPPO_API_KEY"):
        fakes.start(api_key="guess")


def test_a_server_that_cannot_be_reached_is_named(fakes: Fakes) -> None:
    with hold_port() as nobody_listens:
        url = f"http://127.0.0.1:{nobody_listens.getsockname()[1]}"
        with pytest.raises(EngineError, match=rf"^vLLM server {url}: .*[Cc]onnect") as caught:
            fakes.start(urls=[url])
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_a_temporary_folder_with_a_long_name_is_refused(
    tiny_model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 60)))
    with pytest.raises(EngineError, match="set TMPDIR to a shorter one"):
        VLLMRemote().start(EngineSpec(tiny_model_dir))


def test_a_folder_that_does_not_exist_is_named(fakes: Fakes, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="nowhere"):
        fakes.start(weights="checkpoint", weights_dir=str(tmp_path / "nowhere"))


def test_the_key_comes_from_the_environment(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPPO_API_KEY", KEY)
    assert fakes.start(api_key=None).health().alive


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"servers": 0}, "servers must be >= 1"),
        ({"max_concurrency": 0}, "max_concurrency"),
        ({"threads": 0}, "threads"),
        ({"request_timeout": 0}, "request_timeout"),
        ({"startup_timeout": -1}, "startup_timeout"),
        ({"kv_cache_gib": 0}, "kv_cache_gib"),
        ({"max_restarts": -1}, "max_restarts"),
        ({"gpu_memory_utilization": 2}, "gpu_memory_utilization"),
        ({"weights": "pigeon"}, "weights must be"),
        ({"weights": "checkpoint"}, "needs weights_dir"),
        ({"weights_dir": "/tmp"}, "weights_dir is of use"),
        ({"weights": "native"}, "needs GPUs"),
        ({"api_key": "k"}, "drop api_key, or set urls"),
        ({"urls": []}, "urls is empty"),
        ({"urls": ["http://a:1"], "servers": 2, "api_key": "k"}, "not both"),
        ({"urls": ["a:1"], "api_key": "k"}, "not like http://host:port"),
        ({"urls": ["http://a:1/v1"], "api_key": "k"}, "not like http://host:port"),
        ({"urls": ["http://a:1", "http://a:1/"], "api_key": "k"}, "twice"),
        ({"urls": ["http://a:1"]}, "DPPO_API_KEY"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    wrong: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DPPO_API_KEY", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=re.escape(message)):
        VLLMRemote(**wrong)
