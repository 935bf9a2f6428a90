"""The real transport: the server behind an RRef on rank 0, requests by torch RPC, weights by collectives.

CUDA calls in flight together with an NCCL collective deadlock: the round loop lets all calls end, waits for
the device and then, on the CPU, for the other client ranks, before it averages.
"""

import os
import pickle
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed import rpc

from fslsage_rpc.config.schema import Comm, Config
from fslsage_rpc.device.clock import synchronise
from fslsage_rpc.device.placement import (
    SHM_CORES_PER_RANK,
    choose_averaging,
    choose_channels,
    device_maps,
    fair_threads,
)
from fslsage_rpc.device.workers import Workers
from fslsage_rpc.errors import FIRST_WORD_SECONDS, ConnectionLost, InputError
from fslsage_rpc.job.launching import LOOPBACK
from fslsage_rpc.job.roll_call import Presence, claim_failure, roll_call
from fslsage_rpc.job.signs_of_life import EndTheJob, Policy, SignsOfLife, leave
from fslsage_rpc.job.stopping import NOBODY_READS
from fslsage_rpc.job.world import (
    World,
    has_channel,
    interfaces,
    on_one_host,
    open_device,
)
from fslsage_rpc.measure.host_load import usable_cores
from fslsage_rpc.measure.requests import RequestLog
from fslsage_rpc.models.flat import Weights
from fslsage_rpc.parties.predictor import FinishedServer
from fslsage_rpc.parties.server import Server
from fslsage_rpc.transport.base import CPU, ServerLink
from fslsage_rpc.transport.rpc import (
    SERVER,
    NamedServer,
    RpcLink,
    ServerEndpoint,
    offer,
    peers_may_be_lost,
    reference,
)
from fslsage_rpc.transport.wire_ledger import WireLedger, ring_share

POLL_SECONDS = 0.05
# Collectives wait for a slow rank while it lives: signs of life tell of the dead.
FOREVER = timedelta(days=365)


class RpcWorld(World):
    """The ranks of a torchrun, srun or self-launched job.

    A rank that dies ends the job: its peers' calls fail or its silence is noticed (`SignsOfLife`), and
    everything since the last complete checkpoint is lost.
    """

    works_beside = True

    def __init__(self, config: Config):
        self.number, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.homes = size - 1
        self.home = self.number - 1 if self.number > 0 else None
        self._take_place(self.number, size)
        self.device = open_device(config, self._gpu_index())
        self._here = Presence.here(self.number, self.device)
        self._interface = _bind_interface(config.comm)
        self._transports = config.comm.transports or _default_transports()
        self._workers = Workers(self.device)
        self._hosts_store = self.number == 0 and not _launcher_hosts_store()
        self._store: dist.Store | None = None
        self._signs: SignsOfLife | None = None
        try:
            self._start(config)
        except BaseException as error:
            self.fail(error)

    def _take_place(self, rank: int, size: int) -> None:
        """This process's rank among so many."""
        self.rank, self.size = rank, size
        self.client_ranks = size - 1
        self.client_rank = rank - 1 if rank > 0 else None

    def _start(self, config: Config) -> None:
        """Meet the other ranks."""
        timeout = timedelta(seconds=config.comm.timeout_seconds)
        self._store = store = self._find_store(timeout)
        self._side_store = store.clone()  # a connection of its own: whoever waits on one keeps it
        ranks = roll_call(store, self._here, self.size, timeout)
        self._signs = self._signs_of_life(config, EndTheJob(ranks, _launcher_hosts_store()))
        self._signs.start()
        with peers_may_be_lost(), self._signs.expects_connections(config.comm.timeout_seconds):
            self._join(store, config.comm, ranks)

    def _signs_of_life(self, config: Config, policy: Policy) -> SignsOfLife:
        assert self._store is not None
        store, end = self._store.clone(), partial(leave, hosts_store=self._hosts_store)
        return SignsOfLife(
            store, self._here, config.comm.timeout_seconds, lambda: self.activity(), policy, end
        )

    def _find_store(self, timeout: timedelta) -> dist.Store:
        """The job's key-value store, its keys apart from those of earlier attempts of the same job.

        Raises:
            ConnectionLost: it cannot be reached.
        """
        if on_one_host():  # and so is the store; the host's name, which torchrun takes, may not resolve
            os.environ["MASTER_ADDR"] = LOOPBACK  # which init_rpc reads
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            # torch's own listens on all interfaces.
            own = self._hosts_store and on_one_host()
            listener = socket.create_server((address, port)).detach() if own else None
            store = dist.TCPStore(
                address,
                port,
                is_master=self._hosts_store,
                timeout=timeout,
                wait_for_workers=False,  # the roll call does, and knows who is missing
                multi_tenant=True,  # init_rpc opens it once more
                master_listen_fd=listener,
            )
        except (OSError, RuntimeError) as error:
            host = "the launcher" if _launcher_hosts_store() else "rank 0"
            reason = str(error).partition("\n")[0]
            raise ConnectionLost(
                f"{host} did not open the job's store at {address}, port {port}, within "
                f"{timeout.total_seconds():g} s ({reason})"
            ) from None
        return dist.PrefixStore(f"fslsage_rpc/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    def _join(self, store: dist.Store, keys: Comm, ranks: Sequence[Presence]) -> None:
        """Form the process groups and the RPC agents.

        Raises:
            InputError: the ranks cannot be joined as configured.
        """
        places = [rank.place for rank in ranks]
        self._device_maps = device_maps([torch.device(rank.device) for rank in ranks], keys.device_maps)
        self._averaging = choose_averaging(keys.averaging, places[1:], dist.is_nccl_available())
        chosen = choose_channels(keys.channels, places, self._device_maps)
        self._channels = [name for name in chosen if has_channel(name)]  # not every build of torch has all
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size, timeout=FOREVER)
        options = rpc.TensorPipeRpcBackendOptions(
            rpc_timeout=keys.timeout_seconds,
            _transports=self._transports,
            _channels=self._channels,
        )
        if self.rank in self._device_maps:  # answers take the same way back; torch tells the server
            options.set_device_map(self._worker(0), dict([self._device_maps[self.rank]]))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are using a Backend")  # torch's own doing
            self._init_rpc(store, options)
        # new_group is called by all ranks, also by rank 0, which is in neither group.
        clients = list(range(1, self.size))
        self._clients: Any = dist.new_group(clients, timeout=FOREVER, backend="gloo")
        cores: list[Any] = [None] * self.size
        dist.all_gather_object(cores, (os.uname().nodename, usable_cores()))
        if "OMP_NUM_THREADS" not in os.environ:  # torchrun and our launchers set it; plain srun does not
            torch.set_num_threads(fair_threads(self.rank, cores))
        nccl = self._averaging == "nccl"
        self._averaging_group: Any = (
            dist.new_group(clients, timeout=FOREVER, backend="nccl") if nccl else self._clients
        )

    def _init_rpc(self, store: dist.Store, options: rpc.TensorPipeRpcBackendOptions) -> None:
        name = self._worker(self.rank)
        rpc.init_rpc(name, rank=self.rank, world_size=self.size, rpc_backend_options=options)

    def connect(
        self, server: Server | FinishedServer | None, ledger: WireLedger, log: RequestLog
    ) -> ServerLink | None:
        with peers_may_be_lost():
            self.barrier()  # nobody still uses the last one
            synchronise(self.device)  # calls have streams of their own: what they find must be there
            offer(None if server is None else ServerEndpoint(server, self.device))
            self.barrier()
            if self.rank == 0:
                return None
            return RpcLink(self._reference(), ledger, log, self.device, self.rank in self._device_maps)

    def _reference(self) -> rpc.RRef | NamedServer:
        """To the server, on a client rank."""
        found: rpc.RRef = rpc.rpc_sync(SERVER, reference)
        return found

    def start(self, kind: str, number: int, work: Callable[[], None]) -> None:
        self._workers.start(kind, number, work)

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

    def gather_beside(self, name: str, value: Any) -> list[Any] | None:
        return self._gather_in_store(self._side_store, name, value)

    def _gather_in_store(
        self, store: dist.Store, name: str, value: Any, never: Callable[[int], bool] | None = None
    ) -> list[Any] | None:
        """`gather` through the store; None on rank 0 too, where a rank's value will never come."""
        keys = [f"{name}/{rank}" for rank in range(self.size)]
        with peers_may_be_lost():
            store.set(keys[self.rank], pickle.dumps(value))  # type: ignore[arg-type]  # bytes will do
            if self.rank != 0:
                return None
            if never is None:
                store.wait(keys, FOREVER)
            else:
                while not store.check(keys):
                    gone = [key for rank, key in enumerate(keys) if never(rank)]
                    if not all(store.check([key]) for key in gone):  # what came before it was gone counts
                        return None
                    time.sleep(POLL_SECONDS)
            values = [pickle.loads(store.get(key)) for key in keys]
            for key in keys:
                store.delete_key(key)
        return values

    def broadcast(self, value: Any) -> Any:
        box = [value]
        with peers_may_be_lost():
            dist.broadcast_object_list(box)
        return box[0]

    def all_reduce(self, weights: Weights, ledger: WireLedger) -> None:
        assert self.client_rank is not None
        if self.client_ranks == 1:
            return
        travelling = weights if self._averaging == "nccl" else weights.to(CPU)
        with peers_may_be_lost():
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
            "rpc_channels": self._channels,
            "request_tensors": {
                self._worker(rank): "{} to the server's {} and back, by device map".format(
                    *self._device_maps[rank]
                )
                if rank in self._device_maps
                else "through host memory"
                for rank in range(1, self.size)
            },
            "interface": self._interface or "the libraries' own choice",
        }

    def fail(self, error: BaseException) -> NoReturn:
        before, message, status = self._last_words(error)
        if self._speaks() and message:
            print(f"{before}fslsage_rpc: {message}", file=sys.stderr, flush=True)
        leave(status, self._hosts_store)

    def _last_words(self, error: BaseException) -> tuple[str, str, int]:
        """A traceback where there is a use for one, the message, and the exit status."""
        if isinstance(error, InputError):
            return "", str(error), 2
        if isinstance(error, KeyboardInterrupt):
            return "", "interrupted", 130
        if isinstance(error, BrokenPipeError):
            return "", "", NOBODY_READS  # this rank's output: connections fail as RuntimeErrors
        if isinstance(error, ConnectionLost):
            seen = first_line(error)
            return "", self._signs.policy.explain_loss(seen) if self._signs else seen, 1
        where = f"{self._here} failed in {self.activity()}"
        message = f"{where}: {type(error).__name__}: {first_line(error)}"
        return "".join(traceback.format_exception(error)), message, 1

    def _speaks(self) -> bool:
        """Is this rank the one to report a failure?"""
        if self._signs:
            return self._signs.claim()
        with suppress(RuntimeError):
            if self._store is not None:
                return claim_failure(self._store, self.rank)
        if self.rank != 1:
            time.sleep(FIRST_WORD_SECONDS)  # if rank 1 has the same problem, its end ends this rank
        return True

    def close(self) -> None:
        with peers_may_be_lost():
            self.barrier()
            rpc.shutdown()
            if self._signs is not None:
                self._signs.stop()
            self.barrier()  # the rank that hosts the store leaves it only when no thread needs it
            dist.destroy_process_group()
        offer(None)
        self._workers.dissolve()

    def _worker(self, rank: int) -> str:
        """The name of a rank's RPC worker."""
        return SERVER if rank == 0 else f"clients{rank}"

    def _gpu_index(self) -> int:
        """Clients take the GPUs from the first on; the server takes one of its own where one is left."""
        local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
        if self.rank == 0:
            return (
                min(int(os.environ.get("LOCAL_WORLD_SIZE", self.size)), max(torch.cuda.device_count(), 1)) - 1
            )
        on_server_host = self.rank == local_rank
        return local_rank - 1 if on_server_host else local_rank


def first_line(error: BaseException) -> str:
    """What an error says; one that came back from a call begins with a line that names the worker."""
    said = [line for line in str(error).splitlines() if not line.startswith("On WorkerInfo")]
    return said[0] if said else ""


def _launcher_hosts_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _default_transports() -> list[str] | None:
    """uv where cores are few, else None: TensorPipe's own choice, which prefers shm on one host."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    return ["uv"] if len(usable_cores()) < SHM_CORES_PER_RANK * local_ranks else None


def _bind_interface(keys: Comm) -> str | None:
    """Make RPC, Gloo and NCCL use one interface: the configured one, or loopback where all is on one host."""
    interface = keys.interface
    if interface is None and on_one_host():
        interface = next((name for name in ("lo", "lo0") if name in interfaces()), None)
    for variable in ("TP_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if keys.interface is not None:
            os.environ[variable] = keys.interface
        elif interface is not None:
            os.environ.setdefault(variable, interface)  # what the user has set stays
    return os.environ.get("TP_SOCKET_IFNAME")
