"""NCCLTransfer: vLLM's own weight transfer, from the trainer's GPU to those of the servers over NCCL.

Written against the interface of vLLM 0.32; it needs GPUs and has not run on hardware.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from torch import Tensor

from dppo_lightning.base.errors import EngineError, one_line
from dppo_lightning.generate.vllm.client import ServerClient, ServerFault
from dppo_lightning.generate.vllm.event_loop import EventLoop
from dppo_lightning.generate.vllm.server import hold_port

NCCL_SETTINGS = {"weight_transfer_config": '{"backend": "nccl"}'}
"""Arguments that a server must be started with."""


class NCCLTransfer:
    """One NCCL group: the trainer is rank 0, the workers of all servers follow. It is built at the first ``send``.

    Args:
        clients: Clients of all servers.
        loop: Event loop that the clients belong to.
    """

    def __init__(self, clients: Sequence[ServerClient], loop: EventLoop) -> None:
        self._clients = list(clients)
        self._loop = loop
        self._engine: Any = None

    def send(self, weights: Sequence[tuple[str, Tensor]], up: Sequence[ServerClient]) -> None:
        """Replace the weights of every server.

        Args:
            weights: All weights, by name.
            up: Clients of the servers that are up.

        Raises:
            EngineError: One of the servers is missing, or failed: the group cannot be used without it.
        """
        if len(up) < len(self._clients):
            raise EngineError(
                'with weights="native" an update needs every vLLM server, and one is out: restart the run'
            )
        source = self._source(weights)
        try:
            if self._engine is None:
                self._engine = self._build_group(source)
            self._engine.source = source
            self._engine.send_weights()
        except ServerFault as fault:
            raise EngineError(f"vLLM's weight transfer failed: {fault}") from fault
        except (RuntimeError, ValueError) as error:
            raise EngineError(f"vLLM's weight transfer failed: {one_line(error)}") from error

    def _source(self, weights: Sequence[tuple[str, Tensor]]) -> Any:
        from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

        class Source(WeightSource):
            """The weights of one update."""

            def metadata(self) -> list[ParamMeta]:
                return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights]

            def __iter__(self) -> Iterator[tuple[str, Tensor]]:
                return iter((name, tensor.cuda()) for name, tensor in weights)

        return Source()

    def _build_group(self, source: Any) -> Any:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

        sizes = [int(self._ask(client, "/get_world_size", None, "world_size")) for client in self._clients]
        address = _own_address(self._clients[0].url)
        with hold_port(address) as holder:  # until vLLM listens there
            port = holder.getsockname()[1]
            info = NCCLTrainerInitInfo(master_address=address, master_port=port, world_size=1 + sum(sizes), rank=0)
            return NCCLTrainerWeightTransferEngine.trainer_init(info, client=_AllServers(self, sizes), source=source)

    def _ask(self, client: ServerClient, path: str, body: dict[str, Any] | None, field: str = "") -> Any:
        return self._loop.run(client.ask(path, body, field))

    def post_to_all(self, path: str, bodies: Sequence[dict[str, Any]]) -> None:
        """Send each server its body, all at the same time: all meet in one collective operation."""
        with ThreadPoolExecutor(len(self._clients)) as executor:
            list(executor.map(lambda client, body: self._ask(client, path, body), self._clients, bodies))

    def close(self) -> None:
        """Leave the group; safe to call twice."""
        if self._engine is not None:
            self._engine.shutdown()
        self._engine = None


class _AllServers:
    """All servers behind the interface of the one client that vLLM's trainer side speaks to.

    Args:
        transfer: The transfer that sends to them.
        sizes: Number of workers of each server.
    """

    def __init__(self, transfer: NCCLTransfer, sizes: Sequence[int]) -> None:
        self._transfer = transfer
        self._sizes = list(sizes)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        offsets = [1 + sum(self._sizes[:place]) for place in range(len(self._sizes))]
        bodies = [{"init_info": init_info | {"rank_offset": offset}} for offset in offsets]
        self._transfer.post_to_all("/init_weight_transfer_engine", bodies)

    def start_weight_update(self) -> None:
        self._post("/start_weight_update", {})

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        self._post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._post("/finish_weight_update", {})

    def _post(self, path: str, body: dict[str, Any]) -> None:
        self._transfer.post_to_all(path, [body] * len(self._sizes))


def _own_address(url: str) -> str:
    """Address of this machine at which the server at ``url`` can reach it."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))
        return str(probe.getsockname()[0])
