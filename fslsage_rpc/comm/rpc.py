"""The real transport: the server behind an RRef on rank 0, requests by torch RPC, weights by collectives.

Tensors travel as CPU tensors: a rank on a GPU stages them through host memory, so no CUDA RPC is ever in
flight together with an NCCL collective (which would deadlock).
"""

import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed import rpc
from torch.distributed.rendezvous import rendezvous
from torch.futures import Future

from fslsage_rpc.comm.ledger import WireLedger, ring_share
from fslsage_rpc.comm.link import ServerLink
from fslsage_rpc.comm.watchdog import PERIOD_SECONDS, Watchdog
from fslsage_rpc.comm.world import World, choose_device, interfaces, server_workers
from fslsage_rpc.config import Comm, Config
from fslsage_rpc.errors import ConnectionLost, InputError
from fslsage_rpc.measure.clock import clock
from fslsage_rpc.measure.requests import RequestLog
from fslsage_rpc.models.flat import Weights
from fslsage_rpc.parties.requests import Answer, Request
from fslsage_rpc.parties.server import Server

CPU = torch.device("cpu")
FOREVER = timedelta(days=365)  # collectives wait for a slow rank while it lives: the watchdog ends dead ones
NO_TIMEOUT = 0  # likewise for calls
SHM_CORES_PER_RANK = 2  # TensorPipe's shm transport keeps up to a core busy per rank, also while it waits
SIGNS_OF_LOSS = ("eof", "reset", "closed", "refused", "broken pipe", "rpcerr", "timed out", "unreachable")

_offered: rpc.RRef | None = None  # rank 0's current server


class RpcWorld(World):
    """The ranks of a torchrun, srun or self-launched job.

    A rank that dies ends the job: its peers' calls fail or its silence is noticed (`Watchdog`), and
    everything since the last finished round is lost.
    """

    def __init__(self, config: Config):
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.client_ranks = self.size - 1
        self.client_rank = self.rank - 1 if self.rank > 0 else None
        self.device = choose_device(config.device, self._gpu_index())
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self._interface = _bind_interface(config.comm)
        self._transports = config.comm.transports or _default_transports()
        self._pools: dict[str, ThreadPoolExecutor] = {}
        timeout = timedelta(seconds=config.comm.timeout_seconds)
        self._watchdog: Watchdog | None = None
        try:
            store = self._find_store(timeout)
            self._watchdog = Watchdog(store.clone(), self.rank, self.size, config.comm.timeout_seconds)
            self._roll_call(store, timeout)
            self._watchdog.start()
            with _peers_may_be_lost():
                self._join(store, config.comm)
        except BaseException as error:
            self.fail(error)

    def _find_store(self, timeout: timedelta) -> dist.Store:
        """The job's key-value store, its keys apart from those of earlier attempts of the same job.

        Raises:
            ConnectionLost: it cannot be reached, or (on the rank that hosts it) ranks are missing.
        """
        try:
            store, _, _ = next(iter(rendezvous("env://", self.rank, self.size, timeout=timeout)))
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ConnectionLost(f"the {self.size} ranks did not all meet: {reason}") from None
        return dist.PrefixStore(f"fslsage_rpc/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    def _join(self, store: dist.Store, keys: Comm) -> None:
        """Form the process groups and the RPC agents."""
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size, timeout=FOREVER)
        options = rpc.TensorPipeRpcBackendOptions(
            rpc_timeout=keys.timeout_seconds, _transports=self._transports
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are using a Backend")  # torch's own doing
            rpc.init_rpc(
                _worker(self.rank), rank=self.rank, world_size=self.size, rpc_backend_options=options
            )
        # new_group is called by all ranks, also by rank 0, which is in neither group.
        clients = list(range(1, self.size))
        self._clients: Any = dist.new_group(clients, timeout=FOREVER, backend="gloo")
        self._averaging = self._choose_averaging(keys.averaging)
        nccl = self._averaging == "nccl"
        self._averaging_group: Any = (
            dist.new_group(clients, timeout=FOREVER, backend="nccl") if nccl else self._clients
        )

    def connect(self, server: Server | None, ledger: WireLedger, log: RequestLog) -> ServerLink | None:
        global _offered
        with _peers_may_be_lost():
            self.barrier()  # nobody still uses the last one
            _offered = None if server is None else rpc.RRef(ServerEndpoint(server))
            self.barrier()
            if self.rank == 0:
                return None
            return RpcLink(rpc.rpc_sync(_worker(0), _offered_server), ledger, log, self.device)

    def start(self, kind: str, work: Callable[[], None]) -> None:
        if kind not in self._pools:
            self._pools[kind] = ThreadPoolExecutor(server_workers(), thread_name_prefix=kind)
        self._pools[kind].submit(work)

    def barrier(self) -> None:
        with _peers_may_be_lost():
            dist.barrier()

    def client_barrier(self) -> None:
        with _peers_may_be_lost():
            dist.barrier(self._clients)

    def gather(self, value: Any) -> list[Any] | None:
        values = [None] * self.size if self.rank == 0 else None
        with _peers_may_be_lost():
            dist.gather_object(value, values)
        return values

    def broadcast(self, value: Any) -> Any:
        box = [value]
        with _peers_may_be_lost():
            dist.broadcast_object_list(box)
        return box[0]

    def all_reduce(self, weights: Weights, ledger: WireLedger) -> None:
        assert self.client_rank is not None
        travelling = weights if self._averaging == "nccl" else weights.to(CPU)
        with _peers_may_be_lost():
            dist.all_reduce(travelling.floats, dist.ReduceOp.SUM, self._averaging_group)
            if weights.integers.numel():
                dist.all_reduce(travelling.integers, dist.ReduceOp.MAX, self._averaging_group)
        if travelling is not weights:
            weights.load(travelling)
        ledger.count("weights_allreduce", ring_share(weights.bytes, self.client_ranks, self.client_rank))

    def describe(self) -> dict[str, Any]:
        return {
            "transport": "rpc",
            "averaging": self._averaging,
            "rpc_transports": self._transports or "TensorPipe's own choice",
            "interface": self._interface or "the libraries' own choice",
        }

    def fail(self, error: BaseException) -> NoReturn:
        role = "server" if self.rank == 0 else "clients"
        # An error that came back from a call begins with a line that names the worker.
        said = [line for line in str(error).splitlines() if not line.startswith("On WorkerInfo")]
        reason = f"{type(error).__name__}: {said[0] if said else ''}"
        message, status = f"fslsage_rpc: rank {self.rank} ({role}) failed: {reason}", 1
        if isinstance(error, InputError):
            message, status = f"fslsage_rpc: {error}", 2
        elif isinstance(error, KeyboardInterrupt):
            message, status = "fslsage_rpc: interrupted", 130
        elif not isinstance(error, ConnectionLost):
            message = "".join(traceback.format_exception(error)) + message
        if self._watchdog is None or self._watchdog.claim(wait=isinstance(error, ConnectionLost)):
            print(message, file=sys.stderr, flush=True)
        sys.stdout.flush()
        if self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            time.sleep(2 * PERIOD_SECONDS)  # this process hosts the store: let the others see the claim
        os._exit(status)  # sys.exit would wait for RPC threads that wait for peers that are gone

    def close(self) -> None:
        global _offered
        _offered = None
        with _peers_may_be_lost():
            self.barrier()
            rpc.shutdown()
            if self._watchdog is not None:
                self._watchdog.stop()
            self.barrier()  # the rank that hosts the store leaves it only when nobody's watchdog needs it
            dist.destroy_process_group()
        for pool in self._pools.values():
            pool.shutdown()

    def _gpu_index(self) -> int:
        """Clients take the GPUs from the first on; the server takes one of its own where one is left."""
        local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
        if self.rank == 0:
            return (
                min(int(os.environ.get("LOCAL_WORLD_SIZE", self.size)), max(torch.cuda.device_count(), 1)) - 1
            )
        on_server_host = self.rank == local_rank
        return local_rank - 1 if on_server_host else local_rank

    def _roll_call(self, store: dist.Store, timeout: timedelta) -> None:
        """Wait for all ranks to have started.

        Raises:
            ConnectionLost: some did not, within the time-out.
        """
        store.set(f"here/{self.rank}", "yes")
        keys = [f"here/{rank}" for rank in range(self.size)]
        try:
            store.wait(keys, timeout)
        except RuntimeError:
            absent = ", ".join(str(rank) for rank, key in enumerate(keys) if not store.check([key]))
            raise ConnectionLost(
                f"rank {absent} did not start within {timeout.total_seconds():g} s"
            ) from None

    def _choose_averaging(self, wanted: str) -> str:
        """NCCL where it can be had: every client rank on a GPU of its own.

        Raises:
            InputError: NCCL is asked for and cannot be had.
        """
        places: list[Any] = [None] * self.size
        place = (os.uname().nodename, _gpu_identity(self.device))
        dist.all_gather_object(places, place)
        own_gpus = len(set(places[1:])) == self.client_ranks and all(gpu is not None for _, gpu in places[1:])
        possible = own_gpus and dist.is_nccl_available()
        if wanted == "nccl" and not possible:
            raise InputError(
                "comm.averaging: got 'nccl', expected auto or gloo: client ranks lack GPUs of their own"
            )
        return "nccl" if possible and wanted != "gloo" else "gloo"


class ServerEndpoint:
    """The server as its RRef's callers see it. Handlers never block a thread of the RPC pool."""

    def __init__(self, server: Server):
        self._server = server

    def announce(self, plans: Mapping[int, Sequence[int]], ranking: Sequence[int]) -> None:
        """See `Server.announce`."""
        self._server.announce(plans, ranking)

    def clock(self) -> float:
        """The server's clock, in seconds."""
        return clock()

    def echo(self, payload: torch.Tensor, down_bytes: int) -> torch.Tensor:
        """Bytes up, bytes down: what a link's speed is measured with."""
        return torch.zeros(down_bytes, dtype=torch.uint8)

    def initial(self) -> tuple[Weights, Weights | None]:
        """See `Server.initial`."""
        weights, auxiliary = self._server.initial
        return weights.to(CPU), auxiliary.to(CPU) if auxiliary else None

    @rpc.functions.async_execution
    def submit(self, request: Request) -> Future[Answer]:
        """See `Server.submit`; the future is the answer."""
        future: Future[Answer] = Future()
        self._server.submit(request, lambda answer: future.set_result(answer.to(CPU)))
        return future

    def deposit_average(self, weights: Weights) -> None:
        """Take the averaged client model."""
        self._server.averaged_weights.load(weights)

    def deposit_auxiliary(self, weights: Weights) -> None:
        """See `Server.take_auxiliary`."""
        self._server.take_auxiliary(weights)


class RpcLink(ServerLink):
    """Calls the server through its RRef."""

    def __init__(self, server: rpc.RRef, ledger: WireLedger, log: RequestLog, device: torch.device):
        super().__init__(ledger, log)
        self._server = server
        self._device = device

    def announce(self, plans: Mapping[int, Sequence[int]], ranking: Sequence[int]) -> None:
        with _peers_may_be_lost():
            self._server.rpc_sync(timeout=NO_TIMEOUT).announce(plans, ranking)

    def server_clock(self) -> float:
        with _peers_may_be_lost():
            return self._server.rpc_sync(timeout=NO_TIMEOUT).clock()

    def _echo(self, payload: torch.Tensor, down_bytes: int) -> None:
        with _peers_may_be_lost():
            self._server.rpc_sync(timeout=NO_TIMEOUT).echo(payload, down_bytes)

    def _initial_weights(self) -> tuple[Weights, Weights | None]:
        with _peers_may_be_lost():
            return self._server.rpc_sync(timeout=NO_TIMEOUT).initial()

    def _submit(self, request: Request, on_answer: Callable[[Any], None]) -> None:
        travelling = Request(request.client, request.number, request.body.to(CPU))

        def deliver(future: Future[Any]) -> None:
            try:
                on_answer(future.value().to(self._device))
            except Exception as error:
                on_answer(_named(error))

        with _peers_may_be_lost():
            self._server.rpc_async(timeout=NO_TIMEOUT).submit(travelling).add_done_callback(deliver)

    def _deposit_average(self, weights: Weights) -> None:
        with _peers_may_be_lost():
            self._server.rpc_sync(timeout=NO_TIMEOUT).deposit_average(weights.to(CPU))

    def _deposit_auxiliary(self, weights: Weights) -> None:
        with _peers_may_be_lost():
            self._server.rpc_sync(timeout=NO_TIMEOUT).deposit_auxiliary(weights.to(CPU))


@contextmanager
def _peers_may_be_lost() -> Iterator[None]:
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


def _offered_server() -> rpc.RRef:
    assert _offered is not None
    return _offered


def _worker(rank: int) -> str:
    return "server" if rank == 0 else f"clients{rank}"


def _gpu_identity(device: torch.device) -> str | None:
    return None if device.type == "cpu" else str(torch.cuda.get_device_properties(device).uuid)


def _default_transports() -> list[str] | None:
    """uv where cores are few, else None: TensorPipe's own choice, which prefers shm on one host."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ["uv"] if cores < SHM_CORES_PER_RANK * local_ranks else None


def _bind_interface(keys: Comm) -> str | None:
    """Make RPC, Gloo and NCCL use one interface: the configured one, or loopback where all is on one host."""
    interface = keys.interface
    if interface is None and os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        interface = next((name for name in ("lo", "lo0") if name in interfaces()), None)
    for variable in ("TP_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if keys.interface is not None:
            os.environ[variable] = keys.interface
        elif interface is not None:
            os.environ.setdefault(variable, interface)  # what the user has set stays
    return os.environ.get("TP_SOCKET_IFNAME")
