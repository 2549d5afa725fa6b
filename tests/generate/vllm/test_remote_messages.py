"""What goes to a vLLM server and comes back; its command line, its key, and the settings of the docs."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import numpy as np
import pytest
import yaml

from dppo_lightning import generate
from dppo_lightning.generate.engine import EngineSpec
from dppo_lightning.generate.vllm.client import generate_body, read_completion
from dppo_lightning.generate.vllm.in_server import RequireKey, command_line
from dppo_lightning.generate.vllm.remote import VLLMRemote
from tests.helpers.engines import ask
from tests.helpers.places import ROOT


def position(token: int, *top: tuple[int, float, int]) -> dict[str, Any]:
    entries = [{"token_id": name, "logprob": logp, "rank": rank} for name, logp, rank in top]
    return {"token_id": token, "logprob": entries[0]["logprob"], "rank": entries[0]["rank"], "top_logprobs": entries}


def test_the_most_likely_tokens_are_there_whether_the_sampled_one_is_among_them_or_not() -> None:
    request = ask(topk_logprobs=2, max_new_tokens=50, prompt=range(20))
    spec = EngineSpec("m", max_model_len=60, max_logprobs=2, stop_token_ids=(42,))
    sampling = generate_body(request, "w", spec, vocabulary=96)["sampling_params"]
    assert (sampling["logprobs"], sampling["max_tokens"], sampling["stop_token_ids"]) == (3, 40, [42])
    content = [
        position(5, (5, -2.0, 2), (8, -0.5, 1), (9, -3.0, 3)),  # as vLLM lists three: sampled, then by rank
        position(7, (7, -4.0, 9), (8, -0.5, 1), (9, -0.75, 2)),
        position(8, (8, 0.0, 1), (1, -9999.0, 2), (2, -9999.0, 3)),
    ]
    choice = {
        "token_ids": [5, 7, 8],
        "logprobs": {"content": content},
        "finish_reason": "stop",
        "weight_versions": [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 3}],
    }
    completion = read_completion(request, {"choices": [choice]})
    assert completion.topk_ids.tolist() == [[8, 5], [8, 9], [8, 1]]
    assert completion.topk_logp.tolist() == [[-0.5, -2.0], [-0.5, -0.75], [0.0, -np.inf]]
    assert completion.logp.tolist() == [-2.0, -4.0, 0.0]
    assert completion.versions.tolist() == [3, 4, 4]
    with pytest.raises(ValueError, match="without a weight version"):
        read_completion(request, {"choices": [choice | {"weight_versions": None}]})


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/health", [], 200),
        ("/pause", [(b"authorization", b"Bearer secret")], 200),
        ("/pause", [(b"authorization", b"Bearer secre")], 401),
        ("/collective_rpc", [], 401),
        ("/metrics", [], 401),
    ],
)
def test_nothing_but_health_is_answered_without_the_key(
    path: str, headers: list[tuple[bytes, bytes]], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    monkeypatch.setenv("VLLM_API_KEY", "secret")
    asyncio.run(RequireKey(app)({"type": "http", "path": path, "headers": headers}, app, send))
    assert sent[0]["status"] == status
    monkeypatch.delenv("VLLM_API_KEY")
    with pytest.raises(RuntimeError, match="VLLM_API_KEY"):
        RequireKey(app)


def test_settings_become_a_command_line() -> None:
    words = command_line({"max_model_len": 5, "enforce_eager": True, "enable_chunked_prefill": False, "seed": None})
    assert words == ["--max-model-len", "5", "--enforce-eager", "--no-enable-chunked-prefill"]


def test_the_settings_of_the_docs_can_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPPO_API_KEY", "k")
    page = (ROOT / "docs" / "remote-engine.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        engine = yaml.safe_load(block)["data"]["engine"]
        assert engine["class_path"] == "dppo_lightning.generate.VLLMRemote"
        generate.VLLMRemote(**engine["init_args"])
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| [^|]+ \| [^|]*\|$", page, re.MULTILINE)
    listed = [name for row in rows for name in re.findall(r"\w+", row)]
    arguments = VLLMRemote.__init__.__annotations__.keys() - {"return"}
    assert arguments <= set(listed)
