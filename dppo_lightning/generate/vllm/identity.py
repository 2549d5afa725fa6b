"""Identity: what a server must be to serve a run, compared before it is given a request."""

from __future__ import annotations

from typing import Any

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.base.pretrained import load_config, load_tokenizer
from dppo_lightning.generate.engine import EngineSpec
from dppo_lightning.generate.vllm.client import RequestRefused, ServerClient, ServerFault, wire_logprobs

PROBE_TEXT = "The 3 quick brown foxes: naïve, ~42% off!\n"
"""Text whose token ids are compared."""


class Identity:
    """Model, dtype, log-probs and files that a run needs its servers to have.

    Args:
        spec: Settings that the run needs of its engine.
        probe: Path of a file that every server must see; "" asks for none.
        content: Text in that file.

    Attributes:
        vocabulary: Number of token ids that the model knows.
        needed_logprobs: Log-probs for each position that a server must be ready to give.

    Raises:
        ConfigError: There is no such model.
    """

    def __init__(self, spec: EngineSpec, probe: str = "", content: str = "") -> None:
        config = load_config(spec.model).get_text_config()
        self.spec = spec
        self.probe = probe
        self.content = content
        self.vocabulary: int = config.vocab_size
        self.needed_logprobs = max(1, wire_logprobs(spec.max_logprobs, self.vocabulary))
        self._shape = {
            "vocabulary": config.vocab_size,
            "hidden_size": config.hidden_size,
            "layers": config.num_hidden_layers,
            "dtype": spec.dtype,
            "logprobs_mode": "processed_logprobs",
        }
        self._tokens: list[int] | None = None

    async def check(self, client: ServerClient) -> None:
        """Compare a server with what the run needs.

        Raises:
            ServerFault: Something differs; the message says what, and what to change.
        """
        await self._check_guard(client)
        try:
            await self._check_model(client)
        except (RequestRefused, KeyError, TypeError, ValueError, IndexError) as error:
            raise ServerFault(f"does not answer as vLLM does ({error!r})") from error
        await self._check_workers(client)
        await self._check_tokenizer(client)

    async def _check_guard(self, client: ServerClient) -> None:
        """Refuse a server that answers without the key: anyone who reaches it could replace its weights."""
        try:
            await client.call("/weight_info", key=False)
        except ServerFault as fault:
            if fault.status == 401:
                return
            raise
        raise ServerFault("answers anyone, without the key: start it with our --middleware, see docs/remote-engine.md")

    async def _check_model(self, client: ServerClient) -> None:
        card = (await client.call("/v1/models"))["data"][0]
        if self.spec.model not in (card["id"], card["root"]):
            raise ServerFault(
                f"serves {card['id']!r}, not {self.spec.model!r} (the same model under another path is declared with "
                f"--served-model-name)"
            )
        if card["max_model_len"] < self.spec.max_model_len:
            raise ServerFault(
                f"its --max-model-len is {card['max_model_len']}, the run needs {self.spec.max_model_len}"
            )

    async def _check_workers(self, client: ServerClient) -> None:
        for found in await client.call_workers("dppo_identity", self.probe):
            for what, expected in self._shape.items():
                if found.get(what) != expected:
                    raise ServerFault(f"its {what} is {found.get(what)}, the run needs {expected}")
            if 0 <= found["max_logprobs"] < self.needed_logprobs:
                raise ServerFault(
                    f"its --max-logprobs is {found['max_logprobs']}, the run needs {self.needed_logprobs}"
                )
            if found["file"] != self.content:
                raise ServerFault(
                    f"does not see {self.probe}: it runs on another machine, or as another user; set weights to "
                    '"checkpoint" and weights_dir to a folder that both sides see'
                )

    async def _check_tokenizer(self, client: ServerClient) -> None:
        """Compare tokenizers, where both sides have one: only token ids are ever sent."""
        body: dict[str, Any] = {"model": self.spec.model, "prompt": PROBE_TEXT, "add_special_tokens": False}
        try:
            found = (await client.call("/tokenize", body))["tokens"]
        except (ServerFault, RequestRefused, KeyError):
            return
        if self._tokens is None:
            self._tokens = tokens_of(self.spec.model)
        if self._tokens and found != self._tokens:
            raise ServerFault(f"its tokenizer differs: {PROBE_TEXT!r} is {found[:8]}..., not {self._tokens[:8]}...")


def tokens_of(model: str) -> list[int]:
    """Token ids of the probe text; none when the model has no tokenizer."""
    try:
        tokenizer = load_tokenizer(model)
    except ConfigError:
        return []
    return list(tokenizer.encode(PROBE_TEXT, add_special_tokens=False))
