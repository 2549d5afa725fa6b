"""The child process of VLLMEmbedded: vLLM's engine behind a pipe.

Run as ``python -m dppo_lightning.generate.vllm.worker PIPE PARENT BLOCK``: two file descriptors and a process id. Each
message is (kind, value). The first is "start"; it is answered with "ready", every other command but "submit" with its
own kind, when it is done. "results" come as requests finish; "broken" is the last word of a worker that cannot go on.
An update is one message, "update", or with vLLM's own transfer "transfer", "chunk" as often as needed, and "finish".
"""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dppo_lightning.base.errors import one_line
from dppo_lightning.base.records import Completion
from dppo_lightning.generate.engine import Failed, Request
from dppo_lightning.generate.vllm import ipc
from dppo_lightning.generate.vllm.adapters import AdapterSlot
from dppo_lightning.generate.vllm.child_process import ParentLink
from dppo_lightning.generate.vllm.weight_memory import Manifest, SharedBlock

if TYPE_CHECKING:
    from vllm import LLMEngine, SamplingParams

CPU_KV_CACHE_BYTES = 2**30
"""Memory for keys and values on the CPU where kv_cache_gib is not set."""

CPU_TOKENS_PER_STEP = 4096
"""Most tokens of prompts that one step computes on the CPU, unless one prompt may be longer."""


class Worker:
    """Server of one parent, until the parent closes the pipe.

    Args:
        link: Pipe to the parent.
        block: Shared memory that weights arrive in.
        engine: vLLM's engine, in this process.
        stop_token_ids: Token ids that end a completion.
    """

    def __init__(self, link: ParentLink, block: SharedBlock, engine: LLMEngine, stop_token_ids: Sequence[int]) -> None:
        self.link = link
        self.block = block
        self.engine = engine
        self.stop_token_ids = list(stop_token_ids)
        self.adapters = AdapterSlot() if engine.vllm_config.lora_config is not None else None
        self.in_flight: dict[str, tuple[Request, str]] = {}  # by id: the request, and vLLM's own id of it
        self.paused = False

    def serve(self) -> None:
        """Read messages and generate in turn; with nothing to generate the process sleeps until a message comes."""
        while True:
            idle = self.paused or not self.in_flight
            message = self.link.receive(wait=idle)
            if message is not None:
                self.handle(*message)
                continue
            finished = [self.completion_of(output) for output in self.engine.step() if output.finished]
            if finished:
                self.link.send("results", finished)

    def handle(self, kind: str, value: Any) -> None:
        """Do what a message of the parent asks, and answer when it is done."""
        if kind == "submit":
            failed = [failure for request in value if (failure := self.add_request(request)) is not None]
            if failed:
                self.link.send("results", failed)
            return
        if kind == "abort":
            self.abort(value)
        elif kind == "update":
            self.update(*value)
        elif kind == "transfer":
            ipc.receive(self.engine, self.link)
            self.put_in_force(version=value)
            kind = "finish"
        else:
            assert kind in ("pause", "resume"), kind
            self.paused = kind == "pause"
        self.link.send(kind)

    def add_request(self, request: Request) -> Failed | None:
        """Queue a request; return a failure when vLLM refuses it."""
        from vllm.exceptions import VLLMValidationError
        from vllm.inputs import tokens_input

        if self.adapters is not None and self.adapters.request is None:
            return Failed(request.id, "no adapters are loaded: with adapter_rank an update comes before any request")
        try:
            name = self.engine.add_request(
                request.id,
                tokens_input(list(request.prompt_token_ids)),
                sampling_params(request, self.stop_token_ids),
                lora_request=self.adapters.request if self.adapters is not None else None,
            )
        except VLLMValidationError as error:
            return Failed(request.id, one_line(error, whole=True))
        self.in_flight[request.id] = request, name
        return None

    def abort(self, ids: Collection[str]) -> None:
        """Stop requests and send the tokens that they have so far, which vLLM's engine does not return."""
        from vllm.v1.engine import FinishReason

        names = [self.in_flight[name][1] for name in ids if name in self.in_flight]
        states = self.engine.output_processor.request_states
        partial = [states[name].make_request_output([], None, FinishReason.ABORT, None) for name in names]
        self.engine.abort_request(names, internal=True)
        if partial:
            self.link.send("results", [self.completion_of(output) for output in partial])

    def update(self, manifest: Manifest, version: int) -> None:
        """Load the weights that lie in the shared block."""
        if self.adapters is not None:
            self.adapters.load(self.engine, self.block.read(manifest))
        else:
            self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": self.block.read(manifest)})
            self.engine.apply_model(repack_tied_head)
        self.put_in_force(version)

    def put_in_force(self, version: int) -> None:
        """Forget all keys and values computed with the old weights, and stamp what is sampled from now on."""
        # Without the flag nothing is reset while requests run.
        if not self.engine.reset_prefix_cache(reset_running_requests=True):
            raise RuntimeError("vLLM did not reset its prefix cache")
        self.engine.set_weight_version(str(version))

    def completion_of(self, output: Any) -> Completion:
        """Record of a request that has ended, which is then no longer in flight.

        vLLM's flat log-probs hold K + 1 entries for each position, the sampled token first.
        """
        request, _ = self.in_flight.pop(output.request_id)
        (sample,) = output.outputs
        count, k = len(sample.token_ids), request.sampling.topk_logprobs
        logp = np.array(sample.logprobs.logprobs, np.float32).reshape(count, k + 1)
        ids = np.array(sample.logprobs.token_ids, np.int64).reshape(count, k + 1)
        versions = np.empty(count, np.int64)
        for span in sample.weight_versions or ():
            versions[span.start : span.end] = int(span.version)
        return Completion(
            request_id=request.id,
            token_ids=np.array(sample.token_ids, np.int64),
            logp=logp[:, 0].copy(),
            finish_reason=sample.finish_reason,
            versions=versions,
            topk_ids=ids[:, 1:].copy() if k else None,
            topk_logp=logp[:, 1:].copy() if k else None,
        )


def sampling_params(request: Request, stop_token_ids: list[int]) -> SamplingParams:
    """vLLM's SamplingParams of a request."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = request.sampling
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_new_tokens,
        seed=request.seed,
        logprobs=sampling.topk_logprobs,
        flat_logprobs=True,
        detokenize=False,
        ignore_eos=True,  # only the run's own stop ids end a completion
        stop_token_ids=stop_token_ids,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def repack_tied_head(model: Any) -> None:
    """Pack the weight of a tied output projection again.

    vLLM's CPU linears multiply with a packed copy of their weight. Reloading packs each layer's weight again but, where
    the projection shares the embedding's weight, not the projection's. Private parts of vLLM: without them a model with
    tied embeddings would keep its old output projection after an update on the CPU.
    """
    from vllm.platforms import current_platform

    head: Any = getattr(model, "lm_head", None)
    if current_platform.is_cpu() and hasattr(head, "cpu_linear"):
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        dispatch_cpu_unquantized_gemm(head, remove_weight=False)


def has_uniform_dtype(engine: LLMEngine) -> bool:
    """Whether all weights are in the engine's dtype. Some models keep a few, such as a router's biases, in float32."""
    dtype = engine.model_config.dtype

    def uniform(model: Any) -> bool:
        return all(p.dtype == dtype for p in model.parameters() if p.is_floating_point() and p.numel())

    return all(engine.apply_model(uniform))


def build_engine(settings: dict[str, Any]) -> LLMEngine:
    """Start vLLM in this process."""
    gc.disable()  # collecting while a million objects are imported takes a quarter of the time to start
    from vllm import EngineArgs, LLMEngine
    from vllm.platforms import current_platform

    gc.freeze()
    transfer = settings["weight_transfer_config"]
    if transfer:
        ipc.check_gpu(current_platform.is_cuda())
    if current_platform.is_cpu():
        settings = settings | cpu_settings(settings)
    engine = LLMEngine.from_engine_args(EngineArgs(**settings))
    engine.set_weight_version("0")
    if transfer:
        ipc.prepare(engine)
    gc.enable()
    return engine


def cpu_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments that vLLM needs on the CPU in addition to the run's own settings.

    Prompts are computed whole. vLLM would cut those that do not fit in one step, sample a token after the first piece
    and take it back by rewinding the request's generator, which the CPU's cannot: the engine would die.
    """
    return {
        "kv_cache_memory_bytes": settings["kv_cache_memory_bytes"] or CPU_KV_CACHE_BYTES,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(CPU_TOKENS_PER_STEP, settings["max_model_len"]),
    }


def describe(started: float) -> str:
    """Version of vLLM, device, and seconds that the start took, for the run's record."""
    from vllm import __version__
    from vllm.platforms import current_platform

    return f"vLLM {__version__} on {current_platform.device_type}, started in {time.perf_counter() - started:.1f} s"


def main() -> None:
    """Serve the parent; the process ends when the parent closes the pipe."""
    started = time.perf_counter()
    pipe, parent, block = map(int, sys.argv[1:])
    link = ParentLink(pipe, parent)
    try:
        _, (settings, stop_token_ids) = link.receive(wait=True) or ("", ({}, ()))
        engine = build_engine(settings)
        link.send("ready", (describe(started), has_uniform_dtype(engine)))
        Worker(link, SharedBlock(block), engine, stop_token_ids).serve()
    except Exception as error:
        traceback.print_exc()
        link.send("broken", one_line(error, typed=True, whole=True))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # vLLM's own teardown takes seconds and has nothing to save


if __name__ == "__main__":
    main()
