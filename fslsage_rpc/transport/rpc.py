"""The real transport: requests by torch RPC to the server on rank 0, weights by collectives of Gloo or NCCL.

The tensors of a request and of its answer go from GPU to GPU where the client rank has a device map to the
server's, and through host memory elsewhere. What is sent once or off the clock, the initial and the averaged
weights, always goes through host memory.

CUDA calls in flight together with an NCCL collective deadlock: the round loop lets all calls end, waits for
the device and then, on the CPU, for the other client ranks, before it averages.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import autograd, rpc
from torch.futures import Future

from fslsage_rpc.config.schema import Comm
from fslsage_rpc.device.clock import device_clock, synchronise
from fslsage_rpc.device.placement import CPU, GpuPlace
from fslsage_rpc.errors import ConnectionLost
from fslsage_rpc.models.flat import Weights
from fslsage_rpc.parties.requests import Answer, Request
from fslsage_rpc.transport import choices
from fslsage_rpc.transport.base import OnAnswer, Transport
from fslsage_rpc.transport.endpoint import ServerEndpoint
from fslsage_rpc.transport.wire_ledger import ring_share

NO_TIMEOUT = 0  # a call waits for a slow rank while it lives: signs of life tell of the dead
FOREVER = timedelta(days=365)  # and so does a collective
SIGNS_OF_LOSS = ("eof", "reset", "closed", "refused", "broken pipe", "rpcerr", "timed out", "unreachable")
SERVER = "server"
"""the name of its RPC worker"""


class Desk:
    """A place on rank 0, to which client ranks hold an RRef: calls go to whatever server is there."""

    endpoint: ServerEndpoint | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Nothing: torch pickles what an RRef holds to look for CUDA tensors, and the server stays here."""
        return object, ()


_desk = Desk()  # of rank 0


class RpcTransport(Transport):
    """torch has one RPC agent and one set of process groups in a process, so there is one of these at a time.

    Args:
        store: in which the ranks find each other, its keys for nobody else.
        devices, places, workers: by rank, where each is, and the name of its RPC worker; rank 0's is SERVER.
        number: where ranks may be lost and come, by which this process is known for all its life, whatever
            its rank; else None.

    Raises:
        InputError: the ranks cannot be joined as configured.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        keys: Comm,
        devices: Sequence[torch.device],
        places: Sequence[GpuPlace],
        workers: Sequence[str],
        number: int | None = None,
    ):
        maps = choices.device_maps(devices, keys.device_maps)
        super().__init__(rank, len(workers), devices[rank], devices[rank] if rank in maps else CPU)
        self._maps, self.workers, self._number = maps, workers, number
        self._interface = choices.bind_interface(keys)
        self._transports = keys.transports or choices.default_transports()
        self._averaging = choices.choose_averaging(keys.averaging, places[1:], dist.is_nccl_available())
        chosen = choices.choose_channels(keys.channels, places, maps)
        self._channels = list(filter(choices.has_channel, chosen))  # not every build of torch has all
        self._server: rpc.RRef | None = None
        self._owner: Any = SERVER
        self._clients: Any = None
        self._averaging_group: Any = None
        clients = list(range(1, self.size))
        try:
            dist.init_process_group("gloo", store=store, rank=rank, world_size=self.size, timeout=FOREVER)
            self._start_agent(store, keys)
            # new_group is called by all ranks, also by rank 0, which is in neither group.
            self._clients = self._averaging_group = dist.new_group(clients, timeout=FOREVER, backend="gloo")
            if self._averaging == "nccl":
                self._averaging_group = dist.new_group(clients, timeout=FOREVER, backend="nccl")
        except BaseException:
            self.abandon()
            raise

    def _start_agent(self, store: dist.Store, keys: Comm) -> None:
        options = rpc.TensorPipeRpcBackendOptions(
            rpc_timeout=keys.timeout_seconds,
            _transports=self._transports,
            _channels=self._channels,
        )
        if self.rank in self._maps:  # answers take the same way back; torch tells the server
            options.set_device_map(SERVER, dict([self._maps[self.rank]]))
        name, number = self.workers[self.rank], self._number
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are using a Backend")  # torch's own doing
            if number is None:
                rpc.init_rpc(name, rank=self.rank, world_size=self.size, rpc_backend_options=options)
                return
            # What init_rpc does, but that a process may have another rank than before (distributed autograd,
            # of no use here, would refuse that), and that a newcomer finds the others' keys in the store.
            autograd._init(number)
            own = dist.PrefixStore("rpc", store)
            own.set_timeout(timedelta(seconds=keys.timeout_seconds))
            rpc._init_rpc_backend(
                rpc.BackendType.TENSORPIPE,  # type: ignore[attr-defined]  # a member that torch adds at run time
                store=own,
                name=name,
                rank=self.rank,
                world_size=self.size,
                rpc_backend_options=options,
            )

    def serve(self, endpoint: ServerEndpoint | None) -> None:
        self.barrier()  # nobody still uses the last one
        synchronise(self.device)  # calls have streams of their own: what they find must be there
        if self.rank == 0:
            offer(endpoint)
        self.barrier()
        # Calls go to its owner and do not carry it: each time would cost a fork and an acknowledgement. Where
        # ranks may be lost the worker's name will do. torch keeps a process's first RPC agent for all RRefs
        # that it ever has, so that after a loss it could not use one.
        if self.rank and self._number is None and self._server is None:
            with peers_may_be_lost():
                self._server = rpc.rpc_sync(SERVER, _reference)
                self._owner = self._server.owner()

    def submit(self, request: Request, on_answer: OnAnswer) -> None:
        travelling = replace(request, body=request.body.to(self.carrier))
        if self.rank in self._maps:
            travelling = _with_addresses(travelling)

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
        arguments = (travelling, self.rank in self._maps)
        with peers_may_be_lost():
            call = rpc.rpc_async(self._owner, _submit, args=arguments, timeout=NO_TIMEOUT)
            call.add_done_callback(deliver)

    def _take(self, answered: Future[Any]) -> Answer:
        with peers_may_be_lost():
            answer: Answer = answered.wait()
        return answer.to(self.device)

    def call(self, method: str, *arguments: Any) -> Any:
        with peers_may_be_lost():
            travelling = (method, *_in_host_memory(arguments))
            return rpc.rpc_sync(self._owner, _answer, args=travelling, timeout=NO_TIMEOUT)

    def echo(self, payload: torch.Tensor, down_bytes: int) -> None:
        with peers_may_be_lost():
            rpc.rpc_sync(self._owner, _echo, args=(payload, down_bytes), timeout=NO_TIMEOUT)
        synchronise(self.carrier)

    def barrier(self) -> None:
        with peers_may_be_lost():
            dist.barrier()

    def client_barrier(self) -> None:
        with peers_may_be_lost():
            dist.barrier(self._clients)

    def gather(self, value: Any) -> list[Any] | None:
        values = [None] * self.size if self.rank == 0 else None
        with peers_may_be_lost():
            dist.gather_object(value, values)
        return values

    def broadcast(self, value: Any) -> Any:
        box = [value]
        with peers_may_be_lost():
            dist.broadcast_object_list(box)
        return box[0]

    def all_reduce(self, weights: Weights) -> int:
        assert self.client_rank is not None
        if self.client_ranks == 1:
            return 0
        travelling = weights if self._averaging == "nccl" else weights.to(CPU)
        with peers_may_be_lost():
            dist.all_reduce(travelling.floats, dist.ReduceOp.SUM, self._averaging_group)
            if weights.integers.numel():
                dist.all_reduce(travelling.integers, dist.ReduceOp.MAX, self._averaging_group)
        if travelling is not weights:
            weights.load(travelling)
        return ring_share(weights.nbytes, self.client_ranks, self.client_rank)

    def describe(self) -> dict[str, Any]:
        return {
            "transport": "rpc",
            "averaging": self._averaging,
            "rpc_transports": self._transports or "TensorPipe's own choice",
            "rpc_channels": self._channels,
            "request_tensors": {
                worker: "{} to the server's {} and back, by device map".format(*self._maps[rank])
                if rank in self._maps
                else "through host memory"
                for rank, worker in enumerate(self.workers)
                if rank
            },
            "interface": self._interface or "the libraries' own choice",
        }

    def close(self, at_rest: Callable[[], None] = lambda: None) -> None:
        self._server = None
        with peers_may_be_lost():
            self.barrier()
            rpc.shutdown()
            at_rest()
            self.barrier()  # the rank that hosts the store leaves it only when no thread needs it
        self.abandon()

    def abandon(self) -> None:
        self._server = None
        offer(None)
        with suppress(RuntimeError):  # there is no agent, or no more
            rpc.shutdown(graceful=False)
        with suppress(RuntimeError, ValueError, AssertionError):
            dist.destroy_process_group()
        self._clients = self._averaging_group = None


@contextmanager
def peers_may_be_lost() -> Iterator[None]:
    """torch reports a peer's death as a RuntimeError like any other; name it."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if isinstance(error, ConnectionLost) or not any(sign in text.lower() for sign in SIGNS_OF_LOSS):
            raise
        raise ConnectionLost(text.partition("\n")[0]) from error


def offer(endpoint: ServerEndpoint | None) -> None:
    """On rank 0: have calls go to this server from now on."""
    _desk.endpoint = endpoint


def offered() -> ServerEndpoint | None:
    """On rank 0, on any thread: what calls go to."""
    return _desk.endpoint


# On the server's rank. What is called there never blocks a thread of the RPC pool.


def _reference() -> rpc.RRef:
    return rpc.RRef(_desk)


def _answer(method: str, *arguments: Any) -> Any:
    return _in_host_memory(getattr(_desk.endpoint, method)(*arguments))


def _echo(payload: torch.Tensor, down_bytes: int) -> torch.Tensor:
    """Bytes up, bytes down: what a link's speed is measured with."""
    return torch.zeros(down_bytes, dtype=torch.uint8, device=payload.device)


@rpc.functions.async_execution
def _submit(request: Request, device_map: bool) -> Future[Answer]:
    """The future is the answer, its tensors on the GPU if the caller has a device map.

    It is completed on the stream that computes the answer, whose place in it the future keeps.
    """
    endpoint = offered()
    assert endpoint is not None
    future: Future[Answer] = Future(devices=[endpoint.device] if device_map else None)
    endpoint.submit(
        request,
        lambda answer: future.set_result(_with_addresses(answer) if device_map else answer.to(CPU)),
    )
    return future


def _with_addresses(value: Any) -> Any:
    """A request or answer, or a part of one, with empty tensors in host memory: on a GPU they have no address
    to be sent from.
    """
    if isinstance(value, torch.Tensor):
        return value if value.numel() else value.to(CPU)
    if type(value) is tuple:
        return tuple(map(_with_addresses, value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{name: _with_addresses(part) for name, part in vars(value).items()})
    return value


def _in_host_memory(value: Any) -> Any:
    """What a call sends or returns: tensors, weights and tuples of them from whatever device they are on."""
    if isinstance(value, tuple):
        return tuple(map(_in_host_memory, value))
    return value.to(CPU) if isinstance(value, torch.Tensor | Weights) else value
