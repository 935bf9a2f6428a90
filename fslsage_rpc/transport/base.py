"""A transport: what travels between the ranks. A new one is a subclass, and passes the conformance suite."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fslsage_rpc.device.clock import Reading
from fslsage_rpc.device.placement import CPU
from fslsage_rpc.models.flat import Weights
from fslsage_rpc.parties.requests import Answer, Request
from fslsage_rpc.transport.endpoint import ServerEndpoint

Take = Callable[[], Answer]
"""takes an answer in, on the thread that sent the request, or raises what the request came to; what that
thread queues from then on comes after the answer's tensors"""
OnAnswer = Callable[[Take, Reading], None]
"""gets, on any thread, an answer to be taken, and the reading of the carrier's clock at which its tensors are
there; None where the carrier is no GPU"""


class Transport(ABC):
    """Carries requests to the server, on rank 0, and weights among the client ranks, all others.

    A job of one rank is server and client rank at once. Who is there is settled before a transport is made.
    It serves these ranks until it is closed or abandoned.

    Methods marked *collective* are called by all ranks in the same order, from the main thread only. They
    wait for a slow rank while it lives. `submit`, `call` and `echo` are called by client ranks, from the
    thread that computes for the clients, between `serve` and the end.

    Once a peer that it needs has died, each method, and each `Take`, raises `ConnectionLost` in bounded time.
    So does one that waits then. A peer that lives and is silent is the world's concern.

    Attributes:
        device: of this rank's parties.
        carrier: the device on which requests' tensors leave this rank, and answers' come.
        staged: tensors pass through host memory on their way from a GPU, so must be there when handed over.
        client_ranks: how many ranks host clients.
        client_rank: this rank's place among them, from 0; None where it hosts none.
    """

    def __init__(self, rank: int, size: int, device: torch.device, carrier: torch.device = CPU):
        self.rank, self.size = rank, size
        self.device, self.carrier = device, carrier
        self.staged = device.type == "cuda" and carrier.type == "cpu"
        self.client_ranks = max(size - 1, 1)
        self.client_rank = 0 if size == 1 else rank - 1 if rank else None

    @abstractmethod
    def serve(self, endpoint: ServerEndpoint | None) -> None:
        """Collective: calls go to rank 0's endpoint (None elsewhere) from now on; those before have ended."""

    @abstractmethod
    def submit(self, request: Request, on_answer: OnAnswer) -> None:
        """Carry a request to the server and its answer back, without waiting for either.

        The request's tensors are on this rank's device and not changed until it is answered. They arrive on
        the carrier, or the server's end of it, and the answer's on this rank's device.
        Order is not promised: neither that of requests, nor that of answers. What the endpoint raises as it
        takes the request in, the `Take` raises here.
        """

    @abstractmethod
    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the endpoint, on a thread of rank 0's, and wait for what it returns or raises.

        For what is sent once or off the clock: tensors may pass through host memory, and come back there.
        """

    @abstractmethod
    def echo(self, payload: Tensor, down_bytes: int) -> None:
        """Carry a tensor on the carrier to the server's rank, and one of so many bytes back, as those of
        requests and answers; return when it is there.
        """

    @abstractmethod
    def barrier(self) -> None:
        """Collective: wait for all ranks, on the host."""

    @abstractmethod
    def client_barrier(self) -> None:
        """Collective among the client ranks: wait for them, on the host."""

    @abstractmethod
    def gather(self, value: Any) -> list[Any] | None:
        """Collective: every rank's value, which can be pickled, by rank, on rank 0; None elsewhere."""

    @abstractmethod
    def broadcast(self, value: Any) -> Any:
        """Collective: rank 0's value, which can be pickled, everywhere."""

    @abstractmethod
    def all_reduce(self, weights: Weights) -> int:
        """Collective among the client ranks, in place: sums of floats, maxima of integers, the same bits on
        all. No request is under way, and the device has done what was queued.

        Returns:
            The bytes that this rank sends in a ring: see `ring_share`.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The way that all this takes, for `environment.json`: the keys that `LocalTransport` has."""

    @abstractmethod
    def close(self, at_rest: Callable[[], None] = lambda: None) -> None:
        """Collective: leave in order, when no request is under way; nothing is left open or running.

        Args:
            at_rest: done before the last wait for the others, when no call can come any more.
        """

    @abstractmethod
    def abandon(self) -> None:
        """Leave at once, without a word to the others, dead or alive; nothing is left open or running."""
