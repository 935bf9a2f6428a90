"""The ranks of a job and what they do together; `rpc.py` and `local.py` are its two kinds."""

import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from fslsage_rpc.algorithms.bound import LinkSpeed
from fslsage_rpc.config.schema import Config
from fslsage_rpc.device.memory import one_heap
from fslsage_rpc.device.streams import own_stream
from fslsage_rpc.errors import HostError
from fslsage_rpc.measure.requests import RequestLog
from fslsage_rpc.models.flat import Weights
from fslsage_rpc.parties.predictor import FinishedServer
from fslsage_rpc.parties.server import Server
from fslsage_rpc.transport.base import ServerLink
from fslsage_rpc.transport.wire_ledger import WireLedger


@dataclass(frozen=True)
class Change:
    """A rank, by its number as the job was started, that was lost or has joined.

    `reason`: of a loss; None for a rank that joined. `seconds`: from the news of it until the ranks had met
    anew.
    """

    rank: int
    reason: str | None
    seconds: float


class World(ABC):
    """The ranks: rank 0 hosts the server, the others (or, in one process, the same one) host the clients.

    Methods marked *collective* are called by all ranks in the same order, from the main thread only.
    """

    rank: int
    size: int
    device: torch.device
    client_ranks: int
    """how many ranks host clients"""
    works_beside: bool
    """pieces of the server's work started one after the other run at the same time"""
    client_rank: int | None
    """this rank's place among them, from 0; None where it hosts none"""
    homes: int
    """how many there were when the job was started: the clients are dealt out over them for good"""
    home: int | None
    """this rank's place among those, from 0; None where it hosts no clients"""
    generation: int = 0
    """how often the ranks have met anew, after a loss or with a newcomer"""

    activity: Callable[[], str] = staticmethod(lambda: "the start")
    """what this rank is doing, in words; told to the other ranks with its signs of life"""

    @property
    def hosts_server(self) -> bool:
        """Does this rank own the server?"""
        return self.rank == 0

    @abstractmethod
    def connect(
        self, server: Server | FinishedServer | None, ledger: WireLedger, log: RequestLog
    ) -> ServerLink | None:
        """Collective: offer the server (rank 0) and get a link to it (ranks that host clients)."""

    @abstractmethod
    def start(self, kind: str, number: int, work: Callable[[], None]) -> None:
        """Run a piece of the server's work: on a thread for its kind and number (`Workers`), or at once."""

    @abstractmethod
    def barrier(self) -> None:
        """Collective: wait for all ranks."""

    @abstractmethod
    def client_barrier(self) -> None:
        """Collective among the ranks that host clients: wait for them."""

    @abstractmethod
    def gather(self, value: Any) -> list[Any] | None:
        """Collective: every rank's value, by rank, on rank 0; None elsewhere."""

    @abstractmethod
    def gather_beside(self, name: str, value: Any) -> list[Any] | None:
        """`gather` from a thread beside the main one, out of step with it. Only rank 0 waits for the others.

        Args:
            name: of what is gathered, the same on every rank; not used again before rank 0 has got it.
        """

    @abstractmethod
    def broadcast(self, value: Any) -> Any:
        """Collective: rank 0's value, everywhere."""

    @abstractmethod
    def all_reduce(self, weights: Weights, ledger: WireLedger) -> None:
        """Collective among the ranks that host clients: floats summed, integers' maximum, in place."""

    def measure_links(self, link: ServerLink | None) -> dict[int, LinkSpeed]:
        """Collective: the speed of each client rank's link to the server, one after the other.

        Args:
            link: this rank's, if it hosts clients.

        Returns:
            By client rank, on the server's rank; elsewhere nothing.
        """
        mine = None
        for turn in range(self.client_ranks):
            self.barrier()
            if link and self.client_rank == turn:
                mine = link.measure_speed()
        speeds = self.gather((self.client_rank, mine)) or []
        return {rank: speed for rank, speed in speeds if speed is not None}

    def admit(self, before: Callable[[], None]) -> None:  # noqa: B027  # most worlds stay as they are
        """Called by all ranks between two rounds: where ranks wait to join, those here meet anew with them
        (`accept_loss`, `regroup`), so this or a later collective fails.

        Args:
            before: done on rank 0 first, if any wait.
        """

    def accept_loss(self, error: BaseException) -> None:
        """After an error in a round: return if it comes from a rank that was lost, or joins.

        Raises:
            BaseException: the error, where it does not.
        """
        raise error

    def regroup(self) -> None:  # noqa: B027  # most worlds never meet anew
        """Then meet anew with the ranks that are there now.

        Raises:
            TooFewClients: too few are left.
            RunOver: the run has ended meanwhile.
        """

    def take_changes(self) -> list[Change]:
        """On rank 0: the ranks lost and joined since this was last asked for."""
        return []

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Transports and back ends as they are, for `environment.json`."""

    @abstractmethod
    def fail(self, error: BaseException) -> NoReturn:
        """Report this rank's error, once per job, and end the process (or, in one process, raise it)."""

    @abstractmethod
    def close(self) -> None:
        """Collective: leave in order."""


def rpc_available() -> bool:
    """Does this build of torch have the RPC framework? (On macOS and Windows some have not.)"""
    if not torch.distributed.is_available():
        return False
    from torch.distributed import rpc

    return rpc.is_available()


def has_channel(name: str) -> bool:
    """Does this build of torch, which has the RPC framework, know that channel of TensorPipe?"""
    from torch.distributed import rpc

    try:
        rpc.TensorPipeRpcBackendOptions(_channels=[name])
    except RuntimeError:
        return False
    return True


def nccl_available() -> bool:
    """Could NCCL average here: is it built in, and is there a GPU?"""
    from torch import distributed

    return torch.cuda.is_available() and distributed.is_nccl_available()


def interfaces() -> list[str]:
    """The names of this host's network interfaces."""
    return [name for _, name in socket.if_nameindex()]


def choose_device(keys_device: str, index: int) -> torch.device:
    """The device of a rank that would take GPU number `index` of its host.

    Raises:
        HostError: a GPU is asked for and torch sees none.
    """
    if keys_device == "cuda" and not torch.cuda.is_available():
        raise HostError("device: got 'cuda', expected auto or cpu: torch sees no CUDA device here")
    if keys_device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", index % torch.cuda.device_count())


def open_device(config: Config, index: int) -> torch.device:
    """The device of a rank that would take GPU number `index`, made the current one, TF32 as configured.

    With CUDA graphs the thread gets a stream of its own: on the device's default one none can be captured. It
    keeps that for all its worlds, whose parties find their tensors in it.
    """
    device = choose_device(config.device, index)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        set_tf32(config.tf32)
        if config.graphs == "auto" and torch.cuda.current_stream(device) == torch.cuda.default_stream(device):
            torch.cuda.set_stream(own_stream(device))
    return device


def set_tf32(allowed: bool) -> None:
    """Let GPUs round the factors of fp32 matrix products and convolutions to TF32, or not."""
    rounding = "tf32" if allowed else "ieee"
    torch.backends.cuda.matmul.fp32_precision = rounding
    torch.backends.cudnn.conv.fp32_precision = rounding  # type: ignore[attr-defined]  # only there at run time


def server_workers(device: torch.device) -> int:
    """Lanes that a server here executes at the same time, and fits likewise: cores over threads of each.

    A GPU's work takes one thread of the host, which queues it.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    return max(1, (os.cpu_count() or 1) // threads)


def job_ranks(config: Config) -> int:
    """The ranks of the job that this process is one of; 1 with `transport: local`."""
    return 1 if config.transport == "local" else int(os.environ.get("WORLD_SIZE", 1))


def is_first_rank(config: Config) -> bool:
    """Is this the rank that hosts the server and writes the folder? Known before the ranks meet."""
    return config.transport == "local" or int(os.environ.get("RANK", 0)) == 0


def on_one_host() -> bool:
    """Are all ranks of the job on this host? Known of jobs of torchrun and of our launchers."""
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE", "1")


def open_world(config: Config) -> World:
    """Start (or join) the configured transport."""
    one_heap()
    if config.transport == "local":
        from fslsage_rpc.job.local import LocalWorld

        return LocalWorld(config)
    if config.clients.on_loss == "drop":
        from fslsage_rpc.job.elastic import ElasticWorld

        return ElasticWorld(config)
    from fslsage_rpc.job.rpc import RpcWorld

    return RpcWorld(config)
