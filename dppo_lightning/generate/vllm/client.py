"""ServerClient: commands and requests to one vLLM server over HTTP, its URL, and the key that it asks for.

Requests go to vLLM's token-in, token-out route ``/inference/v1/generate``: it takes token ids and vLLM's own sampling
parameters, and answers with token ids, log-probs as numbers, and the weight version of each token.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import numpy as np

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.base.records import Completion
from dppo_lightning.generate.engine import EngineSpec, Request

CLIENT_KEY_VARIABLE = "DPPO_API_KEY"
"""Environment variable of the trainer that holds the key of the servers at ``urls``."""

GENERATE = "/inference/v1/generate"
WIRE_PREFIX = "generate-tokens-"
"""Prefix that vLLM puts before the ids of our requests."""

REMOVED = -9999.0
"""Number that the server writes for a log-prob of -inf."""


class ServerFault(Exception):
    """The server cannot do what was asked; another one may. The message is one line.

    Attributes:
        status: Status of the HTTP answer; None when there was no answer.
    """

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


class RequestRefused(Exception):
    """The server says that this request is wrong; every other server would say so too."""


class ServerClient:
    """Client of one server.

    Args:
        session: HTTP session, shared by the clients of all servers.
        url: URL of the server, without a path.
        key: Key that is sent with everything.
        timeout: Seconds for the answer to a command, > 0.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, key: str, timeout: float) -> None:
        self.session = session
        self.url = url
        self.timeout = timeout
        self._headers = {"Authorization": f"Bearer {key}"}

    async def call(
        self, path: str, body: dict[str, Any] | None = None, timeout: float | None = None, key: bool = True
    ) -> Any:
        """POST ``body``, or GET without one; return the decoded answer.

        Args:
            path: Path, with its query.
            body: Content to send, as JSON.
            timeout: Seconds for the answer; None: the timeout of the client; 0: no limit.
            key: Whether to show the key.

        Raises:
            RequestRefused: The server answers that the request is wrong.
            ServerFault: It cannot be reached, does not answer in time, or answers with any other error.
        """
        limit = self.timeout if timeout is None else timeout
        try:
            async with self.session.request(
                "GET" if body is None else "POST",
                self.url + path,
                json=body,
                headers=self._headers if key else None,
                timeout=aiohttp.ClientTimeout(total=limit or None, sock_connect=min(limit or 10.0, 10.0)),
                allow_redirects=False,
            ) as response:
                text = await response.text()
        except TimeoutError as error:
            raise ServerFault(f"no answer from {path} within {limit:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ServerFault(_one_line(str(error) or type(error).__name__)) from error
        if response.status in (400, 422):
            raise RequestRefused(_message(text))
        if response.status != 200:
            raise ServerFault(_explain(response.status, path, text), response.status)
        try:
            return json.loads(text) if text else None
        except ValueError as error:
            raise ServerFault(f"the answer of {path} is not JSON") from error

    async def ask(
        self, path: str, body: dict[str, Any] | None = None, field: str = "", timeout: float | None = None
    ) -> Any:
        """Send a command that vLLM never refuses; return its answer.

        Args:
            path: Path, with its query.
            body: Content to send, as JSON; None: GET.
            field: Field of the answer to return; "": the whole answer.
            timeout: Seconds for the answer; None: the timeout of the client.

        Raises:
            ServerFault: The server fails, refuses the command, or answers without the field.
        """
        try:
            answer = await self.call(path, body, timeout)
            return answer[field] if field else answer
        except RequestRefused as error:
            raise ServerFault(f"{path} was refused: {error}", 400) from error
        except (KeyError, TypeError) as error:
            raise ServerFault(f"{path} does not answer as vLLM does") from error

    async def call_workers(self, method: str, *arguments: str) -> list[dict[str, Any]]:
        """Call a method of the worker extension; return one result from each worker."""
        body = {"method": method, "args": list(arguments)}
        return list(await self.ask("/collective_rpc", body, "results"))

    async def healthy(self) -> bool:
        """Whether the server answers and calls itself healthy."""
        try:
            await self.ask("/health", timeout=5.0)
        except ServerFault:
            return False
        return True

    async def version(self) -> str:
        """Weight version that the server names; "default" for the weights that it began with."""
        return str(await self.ask("/weight_info", field="weight_version"))

    async def set_version(self, version: int) -> None:
        """Give the weights in force a version, and check that the server reports it."""
        await self.ask("/update_weight_version", {"new_version": str(version)})
        found = await self.version()
        if found != str(version):
            raise ServerFault(f"holds weight version {found}, not {version}")

    async def pause(self, keep: bool) -> None:
        """Stop generating.

        Args:
            keep: Whether to keep the requests in flight; else they are thrown away.
        """
        await self.ask(f"/pause?mode={'keep' if keep else 'abort'}&clear_cache=false", {})

    async def resume(self) -> None:
        """Go on generating."""
        await self.ask("/resume", {})

    async def forget_prefixes(self) -> None:
        """Forget all cached prefixes, also of requests in flight: they compute their keys and values again."""
        if not await self.ask("/reset_prefix_cache?reset_running_requests=true", {}, "success"):
            raise ServerFault("the prefix cache was not reset")

    async def abort(self, wire_ids: Sequence[str]) -> None:
        """Stop requests, which then are answered with the tokens that they have."""
        ids = [WIRE_PREFIX + name for name in wire_ids]
        await self.ask("/inference/v1/abort_requests", {"request_ids": ids})

    async def generate(self, request: Request, wire_id: str, spec: EngineSpec, vocabulary: int) -> Completion:
        """Generate one completion, and wait as long as it takes.

        Args:
            request: The request.
            wire_id: Id that the request gets on the server.
            spec: Settings that the run needs of its engine.
            vocabulary: Number of token ids that the model knows.
        """
        body = generate_body(request, wire_id, spec, vocabulary)
        answer = await self.call(GENERATE, body, timeout=0.0)
        try:
            return read_completion(request, answer)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ServerFault(f"the answer of {GENERATE} was not understood ({error!r})", 200) from error


def generate_body(request: Request, wire_id: str, spec: EngineSpec, vocabulary: int) -> dict[str, Any]:
    """Body that asks vLLM's route for a completion.

    The server lists the sampled token and then the most likely ones, and cuts the list at the number asked for: one
    more is asked for, so that the last of the K is there when the sampled token is none of them.
    """
    sampling = request.sampling
    tokens_left = spec.max_model_len - len(request.prompt_token_ids)
    return {
        "request_id": wire_id,
        "token_ids": list(request.prompt_token_ids),
        "sampling_params": {
            "n": 1,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_tokens": min(sampling.max_new_tokens, tokens_left),
            "seed": request.seed,
            "logprobs": wire_logprobs(sampling.topk_logprobs, vocabulary),
            "detokenize": False,
            "ignore_eos": True,  # only the run's own stop ids end a completion
            "stop_token_ids": list(spec.stop_token_ids),
        },
    }


def wire_logprobs(k: int, vocabulary: int) -> int:
    """Number of log-probs to ask for at each position, to get those of the ``k`` most likely tokens."""
    return min(k + 1, vocabulary) if k else 0


def read_completion(request: Request, answer: dict[str, Any]) -> Completion:
    """Turn the server's answer into a record.

    Raises:
        ValueError: The answer contradicts itself; a KeyError, TypeError or IndexError when it has another form.
    """
    (choice,) = answer["choices"]
    tokens = choice["token_ids"] or []
    positions = ((choice["logprobs"] or {}).get("content") or []) if tokens else []
    if len(positions) != len(tokens) or [position["token_id"] for position in positions] != list(tokens):
        raise ValueError("log-probs and tokens differ")
    if choice["finish_reason"] not in ("stop", "length", "abort"):
        raise ValueError(f"finish reason {choice['finish_reason']}")
    versions = np.full(len(tokens), -1, np.int64)
    for span in choice["weight_versions"] or ():
        versions[span["start"] : span["end"]] = int(span["version"])
    if (versions < 0).any():
        raise ValueError("tokens without a weight version")
    ids, logp = _topk(positions, request.sampling.topk_logprobs)
    return Completion(
        request_id=request.id,
        token_ids=np.array(tokens, np.int64),
        logp=_with_infinities(np.array([position["logprob"] for position in positions], np.float32)),
        finish_reason=choice["finish_reason"],
        versions=versions,
        topk_ids=ids,
        topk_logp=logp,
    )


def _topk(positions: list[dict[str, Any]], k: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Ids and log-probs [T, K], the most likely first; None and None for ``k`` = 0."""
    if not k:
        return None, None
    rows = [sorted(position["top_logprobs"], key=lambda entry: entry["rank"])[:k] for position in positions]
    shape = (len(rows), k)
    ids = np.array([[entry["token_id"] for entry in row] for row in rows], np.int64).reshape(shape)
    logp = np.array([[entry["logprob"] for entry in row] for row in rows], np.float32).reshape(shape)
    return ids, _with_infinities(logp)


def _with_infinities(values: np.ndarray) -> np.ndarray:
    return np.where(values <= REMOVED, np.float32(-np.inf), values)


def _message(text: str) -> str:
    """Message of an error answer, in one line."""
    try:
        error = json.loads(text)
        error = error.get("error", error.get("detail", error))
        error = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        error = text
    return _one_line(str(error))


def _one_line(text: str) -> str:
    return " ".join(text.split())[:500]


def _explain(status: int, path: str, text: str) -> str:
    message = _message(text)
    if status == 401:
        return f"refused the API key (VLLMRemote's api_key, or the environment variable {CLIENT_KEY_VARIABLE})"
    if status == 403 and "scale-out" in message:
        return "runs without --enable-scale-out, see docs/remote-engine.md"
    if status == 404:
        return f"has no {path}: set VLLM_SERVER_DEV_MODE=1 in its environment, see docs/remote-engine.md"
    if "dppo_" in message and "not implemented" in message:
        return "runs without our --worker-extension-cls, see docs/remote-engine.md"
    return f"{path} answered {status}: {message}"


def check_urls(urls: Sequence[str]) -> None:
    """Refuse URLs that are no server's, or name a server twice.

    Raises:
        ConfigError: One is not like http://host:port, two are the same, or there are none.
    """
    if not urls:
        raise ConfigError("VLLMRemote: urls is empty; leave it out to start servers here")
    for url in urls:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path or parts.query:
            raise ConfigError(f"VLLMRemote: {url!r} is not like http://host:port")
        if parts.username or parts.password:
            raise ConfigError(f"VLLMRemote: {url!r} has a user: servers ask for the key of {CLIENT_KEY_VARIABLE} alone")
    if len(set(urls)) < len(urls):
        raise ConfigError(f"VLLMRemote: urls names a server twice: {', '.join(urls)}")


def find_key(api_key: str | None) -> str:
    """Key of servers that run already: the one given, or the environment's.

    Raises:
        ConfigError: There is none.
    """
    key = api_key or os.environ.get(CLIENT_KEY_VARIABLE)
    if not key:
        raise ConfigError(
            f"VLLMRemote: servers at urls need a key: set api_key, or {CLIENT_KEY_VARIABLE} in the environment"
        )
    return key
