"""vLLM's own weight transfer, without a GPU: chunks, messages, and that the installed vLLM accepts them."""

from __future__ import annotations

import importlib.util
import pickle
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from dppo_lightning.base.errors import EngineError, SyncError
from dppo_lightning.generate.engine import EngineSpec
from dppo_lightning.generate.vllm import embedded, ipc
from dppo_lightning.generate.vllm.child_process import ChildDied
from dppo_lightning.generate.vllm.embedded import VLLMEmbedded
from dppo_lightning.generate.vllm.weight_memory import SharedBlock
from tests.helpers.engines import weights
from tests.helpers.places import ROOT

TENSORS = {
    "embedding": torch.randn(50, 8),  # 1,600 bytes
    "bias": torch.randn(8),
    "half": torch.randn(3, 5, dtype=torch.bfloat16),
    "scale": torch.randn(()),
    "transposed": torch.randn(7, 9).T,
    "ids": torch.arange(5),
}


class OneBuffer:
    """Stands in for CUDA IPC: the handle is the place of a buffer in a list."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []

    def share(self, buffer: Tensor) -> dict[str, tuple[Any, ...]]:
        self.buffers.append(buffer)
        return {"GPU-0": (len(self.buffers) - 1,)}

    def read(self, chunk: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """What a receiver finds in the buffer while the chunk is its turn."""
        data = self.buffers[chunk["ipc_handles"]["GPU-0"][0]].numpy().tobytes()
        for name, dtype, shape, size in zip(
            chunk["names"], chunk["dtype_names"], chunk["shapes"], chunk["tensor_sizes"], strict=True
        ):
            piece, data = bytearray(data[:size]), data[size:]
            yield name, torch.frombuffer(piece, dtype=getattr(torch, dtype)).reshape(shape)


def one_at_a_time(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Each is gone when the next one comes."""
    for name, tensor in tensors.items():
        gathered = tensor.clone(memory_format=torch.preserve_format)
        yield name, gathered
        gathered.zero_()


@pytest.mark.parametrize("size", [1, 300, 1632, 10**6])
def test_chunks_bring_every_tensor_once(size: int) -> None:
    wire, received, chunk_bytes = OneBuffer(), {}, []
    for chunk in ipc.chunks(one_at_a_time(TENSORS), size, None, wire.share):
        chunk_bytes.append((sum(chunk["tensor_sizes"]), len(chunk["names"])))
        received.update(wire.read(chunk))
    assert list(received) == list(TENSORS)
    assert all(torch.equal(received[name], tensor) for name, tensor in TENSORS.items())
    largest = max(tensor.nbytes for tensor in TENSORS.values())
    assert all(bytes_ <= max(size, largest) for bytes_, _ in chunk_bytes)
    assert max(len(buffer) for buffer in wire.buffers) == max(size, largest)
    assert len(wire.buffers) <= 2


def test_wider_tensors_are_rounded() -> None:
    wire = OneBuffer()
    (first, *_) = ipc.chunks(one_at_a_time(TENSORS), 10**6, torch.bfloat16, wire.share)
    assert set(first["dtype_names"]) == {"bfloat16"}
    assert first["names"] == ["embedding", "bias", "half", "scale", "transposed"]
    assert first["tensor_sizes"] == [800, 16, 30, 2, 126]


class Recorder:
    """An engine, or a link to the trainer, that remembers its calls and gives messages out."""

    def __init__(self, messages: list[tuple[str, Any]] | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.messages = messages or []

    def collective_rpc(self, method: str, kwargs: dict[str, Any] | None = None) -> None:
        self.calls.append((method, kwargs))

    def send(self, kind: str, value: Any = None) -> None:
        self.calls.append(("send", kind))

    def receive(self, wait: bool) -> tuple[str, Any]:
        assert wait
        return self.messages.pop(0)


def test_the_engine_is_called_in_the_order_that_vllm_documents() -> None:
    engine = Recorder([("chunk", {"names": ["a"]}), ("chunk", {"names": ["b"]}), ("finish", None)])
    ipc.prepare(engine)  # type: ignore[arg-type]
    ipc.receive(engine, engine)  # type: ignore[arg-type]
    assert engine.calls == [
        ("init_weight_transfer_engine", {"init_info": {"packed": True}}),
        ("start_weight_update", None),
        ("send", "transfer"),
        ("update_weights", {"update_info": {"names": ["a"]}}),
        ("send", "chunk"),
        ("update_weights", {"update_info": {"names": ["b"]}}),
        ("send", "chunk"),
        ("finish_weight_update", None),
    ]


class FakeWorker:
    """Answers every command of an EngineProcess at once, and reads each chunk while it is its turn."""

    alive, pid = True, 0

    def __init__(self, wire: OneBuffer) -> None:
        self.wire = wire
        self.kinds: list[str] = []
        self.received: dict[str, Tensor] = {}
        self.closed = False

    def send(self, kind: str, value: Any = None) -> None:
        self.kinds.append(kind)
        if kind == "chunk":
            self.received.update(self.wire.read(pickle.loads(pickle.dumps(value))))

    def receive(self, timeout: float | None) -> tuple[str, Any]:
        kind = self.kinds[-1]
        return ("ready", ("fake", True)) if kind == "start" else (kind, None)

    def give_up(self, message: str) -> None:
        self.closed = True
        raise EngineError(message)

    def unread(self) -> list[tuple[str, Any]]:
        return []

    def close(self) -> None:
        self.closed = True


class WithFakeWorker(VLLMEmbedded):
    """An engine whose worker is not vLLM, and whose buffers are on the CPU."""

    def __init__(self, worker: FakeWorker) -> None:
        super().__init__(weights="ipc", bucket_mib=1, startup_timeout=1.0)
        self.worker = worker

    def launch_worker(self, spec: EngineSpec, block: SharedBlock) -> Any:
        return self.worker


@pytest.fixture
def engine(tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[WithFakeWorker]:
    """Such an engine, started."""
    wire, chunks = OneBuffer(), ipc.chunks
    monkeypatch.setattr(embedded, "require_vllm", lambda alternative: None)
    monkeypatch.setattr(ipc, "check_gpu", lambda available: None)
    monkeypatch.setattr(ipc, "chunks", lambda *arguments: chunks(*arguments, wire.share))
    engine = WithFakeWorker(FakeWorker(wire))
    engine.start(EngineSpec(tiny_model_dir))
    yield engine
    engine.close()


@pytest.fixture
def model(tiny_model_dir: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)


def test_an_update_transfers_every_weight(engine: WithFakeWorker, model: PreTrainedModel) -> None:
    worker = engine.worker
    stats = engine.update_weights(weights(model), version=5)
    assert worker.kinds == ["start", "transfer", "chunk", "finish"]
    assert all(torch.equal(worker.received[name], parameter) for name, parameter in model.named_parameters())
    assert len(worker.received) == stats.tensors == len(list(model.parameters()))
    assert stats.bytes == 4 * sum(parameter.numel() for parameter in model.parameters())
    assert stats.version == engine.health().version == 5


def test_a_transfer_that_fails_half_way_stops_the_engine(engine: WithFakeWorker, model: PreTrainedModel) -> None:
    with pytest.raises(EngineError, match=r"engine was stopped.*missing: model\.embed_tokens") as caught:
        engine.update_weights(list(model.named_parameters())[1:], version=5)
    assert not isinstance(caught.value, SyncError)
    assert engine.worker.closed
    assert "finish" not in engine.worker.kinds


def test_after_a_transfer_a_dead_process_cannot_be_replaced(engine: WithFakeWorker, model: PreTrainedModel) -> None:
    engine.update_weights(weights(model), version=5)

    def die(timeout: float | None) -> None:
        raise ChildDied("the vLLM process stopped: killed")

    engine.worker.receive = die  # type: ignore[assignment, method-assign]
    with pytest.raises(EngineError, match="cannot be started again: weights: ipc keeps no copy"):
        engine.pause()


def test_without_a_gpu_it_is_refused_before_anything_is_started(
    tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    engine = VLLMEmbedded(weights="ipc")
    with pytest.raises(EngineError, match=r"CUDA GPU.*set weights to shared_memory") as caught:
        engine.start(EngineSpec(tiny_model_dir))
    assert "\n" not in str(caught.value)
    assert engine.pid is None


def test_weights_on_the_cpu_are_refused() -> None:
    with pytest.raises(EngineError, match="CUDA GPU"):
        next(ipc.chunks(TENSORS.items(), 100, None))


IN_VLLM = """
import sys

import torch
from vllm import EngineArgs
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.packed_tensor import unpack_tensor
from vllm.v1.worker.gpu_worker import Worker

from dppo_lightning.generate.vllm import ipc
from tests.generate.vllm.test_native_transfer import TENSORS, OneBuffer, Recorder, one_at_a_time

engine = Recorder()
ipc.prepare(engine)
(method, kwargs), = engine.calls
assert hasattr(Worker, method)
assert IPCWeightTransferEngine.init_info_cls(**kwargs["init_info"]).packed
assert WeightTransferConfig(**ipc.CONFIG).backend == "ipc"
arguments = EngineArgs(model=sys.argv[1], weight_transfer_config=ipc.CONFIG)
assert arguments.weight_transfer_config == WeightTransferConfig(backend="ipc")
for method in ("start_weight_update", "update_weights", "finish_weight_update"):
    assert hasattr(Worker, method) and hasattr(IPCWeightTransferEngine, method)

wire, received = OneBuffer(), {}
for chunk in ipc.chunks(one_at_a_time(TENSORS), 300, None, wire.share):
    info = IPCWeightTransferEngine.parse_update_info(IPCWeightTransferEngine, chunk)
    buffer = wire.buffers[info.ipc_handles["GPU-0"][0]][: sum(info.tensor_sizes)].clone()
    dtypes = [getattr(torch, name) for name in info.dtype_names]
    received.update(unpack_tensor(buffer, info.names, info.shapes, dtypes, info.tensor_sizes))
assert received.keys() == TENSORS.keys()
assert all(torch.equal(received[name], tensor) for name, tensor in TENSORS.items())
print("accepted")
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_installed_vllm_accepts_what_it_is_sent(tiny_model_dir: str) -> None:
    command = [sys.executable, "-c", IN_VLLM, tiny_model_dir]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.stdout.endswith("accepted\n"), ran.stderr[-2000:]
