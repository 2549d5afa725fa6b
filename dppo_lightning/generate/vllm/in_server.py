"""Code that runs inside a vLLM server: the extension of its workers, the check of the key, and its process.

A server that the user starts is given ``--worker-extension-cls dppo_lightning.generate.vllm.in_server.WeightExtension``
and ``--middleware dppo_lightning.generate.vllm.in_server.RequireKey``. One that VLLMRemote starts is
``python -m dppo_lightning.generate.vllm.in_server PIPE PARENT``: vLLM's own API server, which ends with its parent. The
one message that it is sent is "start", with the settings of vLLM's EngineArgs and further arguments; after that it
answers by HTTP only.
"""

from __future__ import annotations

import gc
import hmac
import json
import os
import runpy
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dppo_lightning.generate.vllm.child_process import ParentLink
from dppo_lightning.generate.vllm.weight_memory import PADDING
from dppo_lightning.generate.vllm.worker import cpu_settings, repack_tied_head

SERVER_KEY_VARIABLE = "VLLM_API_KEY"
"""Environment variable of a server that holds the key that clients must show."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class WeightExtension:
    """Methods that vLLM's workers get in addition, called by name through ``/collective_rpc``."""

    def dppo_identity(self, file: str = "") -> dict[str, Any]:
        """Model and settings of the worker, and the content of a file that both sides should see.

        Args:
            file: Path of the file; "" asks for none.

        Returns:
            Values by name; under "file" the content, "" when the worker does not see the file.
        """
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
            file: Path of the file, or "".
            names: JSON list of the names of parameters to sum up.

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
    """Read the tensors of a WeightFile, one at a time."""
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
    """Whether this worker holds a parameter whole; more rows than the model's are allowed: vLLM pads the vocabulary."""
    if name not in parameters or name not in shapes:
        return False
    mine, theirs = parameters[name].shape, shapes[name]
    return len(mine) == len(theirs) and mine[0] >= theirs[0] and list(mine[1:]) == theirs[1:]


def _sum(parameter: Tensor, shape: list[int]) -> float:
    return float(parameter[: shape[0]].double().sum())


class RequireKey:
    """ASGI middleware that answers nothing but ``/health`` without the key.

    vLLM's own ``--api-key`` guards the paths below ``/v1`` and ``/inference`` only; those that pause a server, replace
    its weights or call its workers stay open. The key is that of the environment variable VLLM_API_KEY.

    Args:
        app: ASGI application that answers when the key is right.

    Raises:
        RuntimeError: The variable is not set.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        key = os.environ.get(SERVER_KEY_VARIABLE)
        if not key:
            raise RuntimeError(f"set the environment variable {SERVER_KEY_VARIABLE} to the key that clients must show")
        self.app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope.get("path") == "/health" or self._shows_key(scope):
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"error": "Unauthorized"}'})

    def _shows_key(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, self._expected)


SERVER = "vllm.entrypoints.openai.api_server"


def command_line(settings: Mapping[str, Any]) -> list[str]:
    """Words of vLLM's command line for these settings; None leaves vLLM's default."""
    words = []
    for name, value in settings.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif value is not None:
            words += [f"--{option}", str(value)]
    return words


def main() -> None:
    """Serve until the parent closes the pipe."""
    pipe, parent = map(int, sys.argv[1:])
    link = ParentLink(pipe, parent)
    _, settings = link.receive(wait=True) or ("", {})
    try:
        gc.disable()  # collecting while a million objects are imported takes a quarter of the time to start
        from vllm.platforms import current_platform

        gc.freeze()
        gc.enable()
        if current_platform.is_cpu():
            settings = settings | cpu_settings(settings)
        sys.argv = [SERVER, *command_line(settings)]
        runpy.run_module(SERVER, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        print(f"the server left with {error.code}", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    main()
