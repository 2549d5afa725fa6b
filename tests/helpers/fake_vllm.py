"""FakeVLLM: the routes of a vLLM server that VLLMRemote uses, in a thread, with faults that a test sets."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from transformers import AutoConfig, AutoTokenizer

from dppo_lightning.base.records import Completion
from dppo_lightning.generate.engine import EngineSpec, Failed, Request
from dppo_lightning.generate.vllm.in_server import read_weights
from dppo_lightning.generate.vllm.remote import VLLMRemote

KEY = "secret"


def tokens_of(seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 90, size=4).tolist()


def logp_of(token: int) -> float:
    return float(np.float32(-1 / (token + 3)))


class FakeVLLM(ThreadingHTTPServer):
    """A server that answers from the moment that it is built.

    Attributes:
        fault: Fate of requests for completions: "500", "drop" the connection, or "hang"; "" for none.
        sick: Whether a request has met the fault: ``/health`` answers 503 then.
        poison: Seeds that are always answered with 500.
        gate: Event that completions wait for.
        generated: Number of completions sent, by seed.
        working: Number of completions under way.
        lie: Number added to every sum of weights.
        answers: Fixed answers, (status, body) by path.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, model: str, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        config = AutoConfig.from_pretrained(model)
        self.model = model
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.max_model_len = 512
        self.worker = {
            "vocabulary": config.vocab_size,
            "hidden_size": config.hidden_size,
            "layers": config.num_hidden_layers,
            "dtype": "float32",
            "logprobs_mode": "processed_logprobs",
            "max_logprobs": 9,
        }
        self.version = "default"
        self.fault = ""
        self.sick = False
        self.poison: set[int] = set()
        self.lie = 0.0
        self.answers: dict[str, tuple[int, Any]] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.stopped = threading.Event()
        self.generated: Counter[int] = Counter()
        self.sums: dict[str, float] = {}
        self.working = 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def close(self) -> None:
        self.stopped.set()
        self.gate.set()
        self.shutdown()
        self.server_close()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any] | None:
        """Status and body of the answer; None drops the connection."""
        if path in self.answers:
            return self.answers[path]
        if path == "/health" and self.sick:
            return 503, {"error": "closed for today"}
        if path == "/inference/v1/generate":
            return self.generate(body)
        if path == "/v1/models":
            return 200, {"data": [{"id": self.model, "root": self.model, "max_model_len": self.max_model_len}]}
        if path == "/weight_info":
            return 200, {"weight_version": self.version}
        if path == "/update_weight_version":
            self.version = body["new_version"]
        if path == "/tokenize":
            return 200, {"tokens": self.tokenizer.encode(body["prompt"], add_special_tokens=False)}
        if path == "/collective_rpc":
            return 200, {"results": [getattr(self, body["method"])(*body["args"])]}
        return 200, {"success": True}

    def dppo_identity(self, file: str) -> dict[str, Any]:
        return self.worker | {"file": Path(file).read_text()}

    def dppo_load(self, file: str, names: str) -> dict[str, float]:
        self.sums = {name: float(tensor.double().sum()) for name, tensor in read_weights(file)} if file else {}
        return {name: self.sums[name] + self.lie for name in json.loads(names)}

    def generate(self, body: dict[str, Any]) -> tuple[int, Any] | None:
        sampling = body["sampling_params"]
        with self.lock:
            self.working += 1
        try:
            self.sick = bool(self.fault)
            if self.fault == "hang":
                self.stopped.wait(20)
            self.gate.wait()
            if self.fault == "drop":
                return None
            if self.fault == "500" or sampling["seed"] in self.poison:
                return 500, {"error": {"message": "EngineCore died\nof something"}}
        finally:
            with self.lock:
                self.working -= 1
        self.generated[sampling["seed"]] += 1
        tokens = tokens_of(sampling["seed"])
        content = [{"token_id": token, "logprob": logp_of(token), "top_logprobs": []} for token in tokens]
        spans = [{"version": self.version, "start": 0, "end": len(tokens)}]
        choice = {
            "token_ids": tokens,
            "logprobs": {"content": content},
            "finish_reason": "length",
            "weight_versions": spans,
        }
        return 200, {"choices": [choice]}


class Handler(BaseHTTPRequestHandler):
    server: FakeVLLM

    def do_GET(self) -> None:
        self.respond({})

    def do_POST(self) -> None:
        self.respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def respond(self, body: dict[str, Any]) -> None:
        path = urlsplit(self.path).path
        if (
            path != "/health"
            and self.headers.get("Authorization") != f"Bearer {KEY}"
            and "unguarded" not in self.server.answers
        ):
            answer: tuple[int, Any] | None = (401, {"error": "Unauthorized"})
        else:
            answer = self.server.answer(path, body)
        if answer is None or self.server.stopped.is_set():
            self.connection.close()
            return
        status, content = answer
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def handle(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # the client went away
            super().handle()

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""


def expected(requests: list[Request]) -> dict[str, list[int]]:
    return {request.id: tokens_of(request.seed) for request in requests}


class Fakes:
    """An engine with two fake servers."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.servers = [FakeVLLM(model), FakeVLLM(model)]
        self.engine: VLLMRemote | None = None

    def start(self, **settings: Any) -> VLLMRemote:
        urls = [server.url for server in self.servers]
        self.engine = VLLMRemote(**{"urls": urls, "api_key": KEY, "startup_timeout": 5.0} | settings)
        self.engine.start(EngineSpec(self.model, max_model_len=512, max_logprobs=8, stop_token_ids=(42,)))
        return self.engine

    def collect(self, count: int) -> dict[str, Completion | Failed]:
        assert self.engine is not None
        results: dict[str, Completion | Failed] = {}
        while len(results) < count:
            arrived = self.engine.poll(timeout=10)
            assert arrived
            for result in arrived:
                assert result.request_id not in results
                results[result.request_id] = result
        assert self.engine.poll(timeout=0.05) == []
        return results
