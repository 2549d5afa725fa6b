"""TransformersEngine: generation with Hugging Face transformers in the trainer's own process; needs no vLLM."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dppo_lightning.base.errors import ConfigError, EngineError
from dppo_lightning.base.pretrained import load_model
from dppo_lightning.base.records import Completion
from dppo_lightning.generate.decoding import Decoder, Row
from dppo_lightning.generate.engine import (
    EngineSpec,
    ExpectedWeights,
    Failed,
    Health,
    Request,
    RolloutEngine,
    UpdateStats,
    refusal,
)


class TransformersEngine(RolloutEngine):
    """Engine that generates batch after batch with a copy of the model. All work is done inside ``poll``.

    Every request draws from a generator of its own, and no global one is touched. What else is in the batch changes
    logits by rounding only (about 1e-6), so tokens are the same unless two candidates tie to that precision.

    Args:
        batch_size: Number of completions generated at a time, >= 1.
        device: Device of the copy, e.g. "cpu" or "cuda:1".

    Raises:
        ConfigError: ``batch_size`` is out of range, or there is no such device.
    """

    def __init__(self, batch_size: int = 64, device: str = "cpu") -> None:
        if batch_size < 1:
            raise ConfigError(f"TransformersEngine: batch_size must be >= 1, got {batch_size}")
        try:
            self.device = torch.device(device)
        except RuntimeError as error:
            raise ConfigError(f"TransformersEngine: no device {device!r}; use for example cpu or cuda:0") from error
        self.batch_size = batch_size
        self._decoder: Decoder | None = None
        self._reset()

    def _reset(self) -> None:
        self._queue: deque[Request] = deque()
        self._arrived: list[Completion | Failed] = []
        self._paused = False
        self._version = 0

    def start(self, spec: EngineSpec) -> None:
        self.close()
        try:
            # Loading initialises what a checkpoint lacks, from the global generator.
            with torch.random.fork_rng(devices=[]):
                model = load_model(spec.model, spec.max_model_len)
            for parameter in model.parameters():
                parameter.data = parameter.data.to(self.device, getattr(torch, spec.dtype))
            torch.nn.Module.to(model, self.device)  # buffers
            model.eval().requires_grad_(False)
        except (ConfigError, RuntimeError, AssertionError) as error:
            raise EngineError(f"TransformersEngine cannot load {spec.model!r} on {self.device}: {error}") from error
        self._spec = spec
        self._expected = ExpectedWeights(model)
        self._vocabulary = model.config.get_text_config().vocab_size
        self._decoder = Decoder(model, spec)

    def submit(self, requests: Sequence[Request]) -> None:
        self._running()
        for request in requests:
            reason = refusal(request, self._spec, self._vocabulary)
            if reason is None:
                self._queue.append(request)
            else:
                self._arrived.append(Failed(request.id, reason))

    def poll(self, timeout: float | None = None) -> list[Completion | Failed]:
        """Do as the base class says; return at once while paused, when nothing can finish."""
        decoder = self._running()
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._arrived and not self._paused and (decoder.rows or self._queue):
            if not decoder.rows:
                decoder.begin([self._queue.popleft() for _ in range(min(self.batch_size, len(self._queue)))])
            self._arrived.extend(row.completion() for row in decoder.step(self._version))
            if deadline is not None and time.monotonic() >= deadline:
                break
        arrived, self._arrived = self._arrived, []
        return arrived

    def abort(self, ids: Iterable[str]) -> None:
        decoder = self._running()
        wanted = set(ids)
        stopped = decoder.remove(wanted) + [Row(request) for request in self._queue if request.id in wanted]
        self._queue = deque(request for request in self._queue if request.id not in wanted)
        for row in stopped:
            row.finish_reason = "abort"
            self._arrived.append(row.completion())

    def pause(self) -> None:
        self._running()
        self._paused = True

    def resume(self) -> None:
        self._running()
        self._paused = False

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> UpdateStats:
        decoder = self._running()
        started = time.perf_counter()
        parameters = dict(decoder.model.named_parameters(remove_duplicate=False))
        copies: dict[str, Tensor] = {}
        for name, tensor in named_tensors:  # copied one by one: a sharded trainer gathers them one by one
            target = parameters.get(name, tensor)
            copies[name] = tensor.detach().to(target.device, target.dtype, copy=True)
        self._expected.check({name: copy.shape for name, copy in copies.items()})
        for name, copy in copies.items():
            parameters[name].data = copy
        decoder.forget_cache()
        self._version = version
        size = sum(copy.numel() * copy.element_size() for copy in copies.values())
        return UpdateStats(len(copies), size, time.perf_counter() - started, version)

    def health(self) -> Health:
        rows = len(self._decoder.rows) if self._decoder is not None else 0
        return Health(
            alive=self._decoder is not None,
            version=self._version,
            in_flight=rows + len(self._queue),
            description=f"transformers on {self.device}, batches of {self.batch_size}",
        )

    def close(self) -> None:
        self._decoder = None
        self._reset()

    def _running(self) -> Decoder:
        if self._decoder is None:
            raise EngineError("the engine is not running: call start first")
        return self._decoder
