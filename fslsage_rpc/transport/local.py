"""Everything in one process, without torch.distributed: the oracle for tests, and the way to run in a
notebook.

The server works inside the call that hands it a request, so nothing here happens at the same time.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fslsage_rpc.device.clock import device_clock
from fslsage_rpc.models.flat import Weights
from fslsage_rpc.parties.requests import Request
from fslsage_rpc.transport.base import OnAnswer, Transport
from fslsage_rpc.transport.endpoint import ServerEndpoint


class LocalTransport(Transport):
    """Calls the endpoint."""

    def __init__(self, device: torch.device):
        super().__init__(0, 1, device, carrier=device)
        self._endpoint: ServerEndpoint | None = None

    def serve(self, endpoint: ServerEndpoint | None) -> None:
        self._endpoint = endpoint

    def submit(self, request: Request, on_answer: OnAnswer) -> None:
        assert self._endpoint is not None
        self._endpoint.submit(request, lambda answer: on_answer(lambda: answer, device_clock(self.carrier)))

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._endpoint, method)(*arguments)

    def echo(self, payload: Tensor, down_bytes: int) -> None:
        pass

    def barrier(self) -> None:
        pass

    client_barrier = barrier

    def gather(self, value: Any) -> list[Any] | None:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value

    def all_reduce(self, weights: Weights) -> int:
        return 0

    def describe(self) -> dict[str, Any]:
        without = ("averaging", "rpc_transports", "rpc_channels", "request_tensors", "interface")
        return {"transport": "local", **dict.fromkeys(without)}

    def close(self, at_rest: Callable[[], None] = lambda: None) -> None:
        at_rest()
        self.abandon()

    def abandon(self) -> None:
        self._endpoint = None
