"""The two ends of a client rank's calls to the server, by torch RPC.

The tensors of a request and of its answer go from GPU to GPU where the client rank has a device map to the
server's, and through host memory elsewhere. What is sent once or off the clock, the initial and the averaged
weights, always goes through host memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.distributed import rpc
from torch.futures import Future

from fslsage_rpc.device.clock import clock, device_clock, synchronise, synchronise_stream
from fslsage_rpc.errors import ConnectionLost
from fslsage_rpc.measure.requests import RequestLog
from fslsage_rpc.models.flat import Weights
from fslsage_rpc.parties.predictor import FinishedServer
from fslsage_rpc.parties.requests import Announced, Answer, Request
from fslsage_rpc.parties.server import Server
from fslsage_rpc.transport.base import CPU, OnAnswer, ServerLink
from fslsage_rpc.transport.wire_ledger import WireLedger

NO_TIMEOUT = 0  # a call waits for a slow rank while it lives; signs of life tell of the dead
SIGNS_OF_LOSS = ("eof", "reset", "closed", "refused", "broken pipe", "rpcerr", "timed out", "unreachable")
SERVER = "server"
"""the name of its RPC worker"""


class ServerEndpoint:
    """The server as its remote callers see it. Handlers never block a thread of the RPC pool."""

    def __init__(self, server: Server | FinishedServer, device: torch.device):
        self._server: Any = server
        self._device = device

    def __reduce__(self) -> tuple[Any, ...]:
        """Nothing: torch pickles what an RRef holds to look for CUDA tensors, and the server stays here."""
        return object, ()

    def announce(self, round: int, plans: Mapping[int, Announced], ranking: Sequence[int]) -> None:
        """See `Server.announce`."""
        self._server.announce(round, plans, ranking)

    def clock(self) -> float:
        """The server's clock, in seconds."""
        return clock()

    def echo(self, payload: torch.Tensor, down_bytes: int) -> torch.Tensor:
        """Bytes up, bytes down: what a link's speed is measured with."""
        return torch.zeros(down_bytes, dtype=torch.uint8, device=payload.device)

    def initial(self) -> tuple[Weights, Weights | None]:
        """See `Server.initial`."""
        weights, auxiliary = self._server.initial
        return weights.to(CPU), auxiliary.to(CPU) if auxiliary else None

    def submit(self, request: Request, device_map: bool) -> Future[Answer]:
        """See `Server.submit`; the future is the answer, its tensors on the GPU if the caller has a device
        map.

        It is completed on the stream that computes the answer, whose place in it the future keeps.
        """
        future: Future[Answer] = Future(devices=[self._device] if device_map else None)
        self._server.submit(
            request, lambda answer: future.set_result(_on_gpu(answer) if device_map else answer.to(CPU))
        )
        return future

    def deposit_average(self, weights: Weights) -> None:
        """Take the averaged client model."""
        self._server.averaged_weights.load(weights)
        synchronise_stream(self._device)  # this thread's stream is not the one that evaluates

    def deposit_auxiliary(self, weights: Weights) -> None:
        """See `Server.take_auxiliary`."""
        self._server.take_auxiliary(weights)
        synchronise_stream(self._device)

    def predict(self, z: torch.Tensor) -> torch.Tensor:
        """See `FinishedServer.predict`; by way of host memory."""
        logits: torch.Tensor = self._server.predict(z)
        return logits.to(CPU)


_offered: ServerEndpoint | None = None  # on rank 0


def offer(endpoint: ServerEndpoint | None) -> None:
    """On rank 0: have calls from now on go to this server."""
    global _offered
    _offered = endpoint


def reference() -> rpc.RRef:
    """On rank 0, called from the others: the server that is offered."""
    assert _offered is not None
    return rpc.RRef(_offered)


class NamedServer:
    """Stands for the RRef where ranks may be lost and come: torch keeps a process's first RPC agent for all
    RRefs that it ever has, so that after a loss it could not use one.
    """

    def owner(self) -> str:
        """See `rpc.RRef.owner`."""
        return SERVER

    def local_value(self) -> ServerEndpoint:
        """See `rpc.RRef.local_value`."""
        assert _offered is not None
        return _offered


class RpcLink(ServerLink):
    """Calls the server on rank 0.

    Args:
        server: a reference to its `ServerEndpoint`.
        device: of the clients.
        device_map: there is one from this device to the server's.
    """

    def __init__(
        self,
        server: rpc.RRef | NamedServer,
        ledger: WireLedger,
        log: RequestLog,
        device: torch.device,
        device_map: bool,
    ):
        super().__init__(ledger, log, carrier=device if device_map else CPU)
        self._server = server
        self._device = device
        self._device_map = device_map
        self.staged = device.type == "cuda" and not device_map

    def announce(self, round: int, plans: Mapping[int, Announced], ranking: Sequence[int]) -> None:
        self._call("announce", round, plans, ranking)

    def server_clock(self) -> float:
        seconds: float = self._call("clock")
        return seconds

    def _echo(self, payload: torch.Tensor, down_bytes: int) -> None:
        self._call("echo", payload, down_bytes)
        synchronise(self.carrier)

    def _initial_weights(self) -> tuple[Weights, Weights | None]:
        initial: tuple[Weights, Weights | None] = self._call("initial")
        return initial

    def _submit(self, request: Request, on_answer: OnAnswer) -> None:
        travelling = replace(request, body=request.body.to(self.carrier))

        def deliver(answered: Future[Any]) -> None:
            # torch calls this on a thread of its own. The current stream there waits for the answer's tensors
            # (`Future.add_done_callback`). The clients' thread may be capturing its own stream now, which
            # waits for them when that thread takes the answer.
            there = None
            try:
                there = device_clock(self.carrier)
            finally:
                on_answer(partial(self._take, answered), there)

        # Not by the RRef's own rpc_async: its future is made without devices, so nobody would wait for the
        # answer's tensors, and it may send from a stream that has not waited for the request's.
        arguments = (self._server, travelling, self._device_map)
        with peers_may_be_lost():
            call = rpc.rpc_async(self._server.owner(), _submit, args=arguments, timeout=NO_TIMEOUT)
            call.add_done_callback(deliver)

    def _take(self, answered: Future[Any]) -> Answer:
        with peers_may_be_lost():
            answer: Answer = answered.wait()
        return answer.to(self._device)

    def _deposit_average(self, weights: Weights) -> None:
        self._call("deposit_average", weights.to(CPU))

    def _deposit_auxiliary(self, weights: Weights) -> None:
        self._call("deposit_auxiliary", weights.to(CPU))

    def _predict(self, z: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._call("predict", z.to(CPU))
        return logits

    def _call(self, method: str, *arguments: Any) -> Any:
        """Call the server and wait for its answer."""
        arguments = (self._server, method, *arguments)
        with peers_may_be_lost():
            return rpc.rpc_sync(self._server.owner(), _answer, args=arguments, timeout=NO_TIMEOUT)


@contextmanager
def peers_may_be_lost() -> Iterator[None]:
    """torch reports a peer's death as a RuntimeError like any other; name it."""
    try:
        yield
    except RuntimeError as error:
        named = _named(error)
        if named is error:
            raise
        raise named from error


def _named(error: Exception) -> Exception:
    """ConnectionLost where the text of torch's error says that a peer is gone; else the error as it is."""
    text = str(error)
    if isinstance(error, ConnectionLost) or not any(sign in text.lower() for sign in SIGNS_OF_LOSS):
        return error
    return ConnectionLost(text.partition("\n")[0])


def _answer(server: rpc.RRef | NamedServer, method: str, *arguments: Any) -> Any:
    """On the server's rank."""
    return getattr(server.local_value(), method)(*arguments)


@rpc.functions.async_execution
def _submit(server: rpc.RRef | NamedServer, request: Request, device_map: bool) -> Future[Answer]:
    """On the server's rank."""
    return server.local_value().submit(request, device_map)


def _on_gpu(answer: Answer) -> Answer:
    """The answer as it is, but for an empty tensor, which has no address on a GPU to be sent from."""
    weights = answer.value
    if isinstance(weights, Weights) and not weights.integers.numel():
        return replace(answer, value=Weights(weights.floats, weights.integers.to(CPU)))
    return answer
