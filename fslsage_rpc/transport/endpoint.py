"""The server as its callers see it, whatever carries their calls."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fslsage_rpc.device.clock import clock, synchronise_stream
from fslsage_rpc.models.flat import Weights
from fslsage_rpc.parties.predictor import FinishedServer
from fslsage_rpc.parties.requests import Announced, Answer, Request
from fslsage_rpc.parties.server import Server


class ServerEndpoint:
    """Takes calls on rank 0, on any thread of a transport; none waits for another one.

    Args:
        device: of the server.
    """

    def __init__(self, server: Server | FinishedServer, device: torch.device):
        self._server: Any = server
        self.device = device

    def announce(
        self, t: int, plans: Mapping[int, Announced], ranking: Sequence[int], collecting: Collection[int]
    ) -> None:
        """Take the announcement of some participants: `Server.announce`."""
        self._server.announce(t, plans, ranking, collecting)

    def clock(self) -> float:
        """Read the server's clock, in seconds."""
        return clock()

    def initial(self) -> tuple[Weights, Weights | None]:
        """Give the weights that every client starts from: `Server.initial`."""
        initial: tuple[Weights, Weights | None] = self._server.initial
        return initial

    def submit(self, request: Request, reply: Callable[[Answer], None]) -> None:
        """Take in a request: `Server.submit`. The stream that computes the answer is current in `reply`."""
        self._server.submit(request, reply)

    def deposit_average(self, weights: Weights) -> None:
        """Take the averaged client model."""
        self._server.averaged_weights.load(weights)
        synchronise_stream(self.device)  # this thread's stream is not the one that evaluates

    def deposit_auxiliary(self, weights: Weights) -> None:
        """Take the averaged auxiliary model: `Server.take_auxiliary`."""
        self._server.take_auxiliary(weights)
        synchronise_stream(self.device)

    def predict(self, z: Tensor) -> Tensor:
        """Give outputs for smashed data: `FinishedServer.predict`."""
        outputs: Tensor = self._server.predict(z)
        return outputs

    def fail(self, error: BaseException) -> None:
        """End the round under way: `Server.fail`."""
        self._server.fail(error)
