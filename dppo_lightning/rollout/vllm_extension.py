"""What a vLLM server of ours loads beside vLLM: the worker extension that takes weights, and the guard of its doors.

Given to the server as ``--worker-extension-cls dppo_lightning.rollout.vllm_extension.WeightExtension`` and
``--middleware dppo_lightning.rollout.vllm_extension.RequireKey``.
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dppo_lightning.rollout.vllm_worker import repack_tied_head
from dppo_lightning.rollout.weight_file import PADDING

KEY_VARIABLE = "VLLM_API_KEY"

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class WeightExtension:
    """Methods that vLLM's workers get in addition; called by name through ``/collective_rpc``."""

    def dppo_identity(self, file: str = "") -> dict[str, Any]:
        """What the worker runs, and the content of a file that both sides should see ("" when it does not)."""
        worker: Any = self
        config = worker.vllm_config.model_config
        text = config.hf_text_config
        return {
            "vocabulary": text.vocab_size,
            "hidden_size": text.hidden_size,
            "layers": text.num_hidden_layers,
            "dtype": str(config.dtype).removeprefix("torch."),
            "logprobs_mode": str(getattr(config.logprobs_mode, "value", config.logprobs_mode)),
            "max_logprobs": config.max_logprobs,
            "file": _content(file),
        }

    def dppo_load(self, file: str, names: str) -> dict[str, float]:
        """Replace every weight by those of a safetensors file, or, for "", by those that the server began with.

        Args:
            file: Path.
            names: JSON list of parameters to sum up.

        Returns:
            Sums of those of ``names`` that this worker holds whole and under this name, from its own memory.
        """
        worker: Any = self
        worker.reload_weights(**({"weights_iterator": read_weights(file)} if file else {}))
        model = worker.get_model()
        repack_tied_head(model)
        shapes = _shapes(file) if file else {}
        parameters = dict(model.named_parameters())
        whole = [name for name in json.loads(names) if _whole(name, parameters, shapes)]
        return {name: _sum(parameters[name], shapes[name]) for name in whole}


def _content(file: str) -> str:
    try:
        return Path(file).read_text() if file else ""
    except OSError:
        return ""


def read_weights(file: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a WeightFile, one at a time."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  # not a mapping
            if not name.startswith(PADDING):
                yield name, tensors.get_tensor(name)


def _shapes(file: str) -> dict[str, list[int]]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118


def _whole(name: str, parameters: dict[str, Tensor], shapes: dict[str, list[int]]) -> bool:
    """Embeddings may have more rows than the model's: vLLM pads the vocabulary."""
    if name not in parameters or name not in shapes:
        return False
    mine, theirs = parameters[name].shape, shapes[name]
    return len(mine) == len(theirs) and mine[0] >= theirs[0] and list(mine[1:]) == theirs[1:]


def _sum(parameter: Tensor, shape: list[int]) -> float:
    return float(parameter[: shape[0]].double().sum())


class RequireKey:
    """ASGI middleware: nothing but ``/health`` is answered without the key.

    vLLM's own ``--api-key`` guards the paths below ``/v1`` and ``/inference`` only; those that pause a server, replace
    its weights or call its workers stay open. The key is that of the environment variable VLLM_API_KEY.

    Raises:
        RuntimeError: The variable is not set.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        key = os.environ.get(KEY_VARIABLE)
        if not key:
            raise RuntimeError(f"set the environment variable {KEY_VARIABLE} to the key that clients must show")
        self.app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope.get("path") == "/health" or self._knows_key(scope):
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"error": "Unauthorized"}'})

    def _knows_key(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, self._expected)
