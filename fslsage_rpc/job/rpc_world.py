"""A job whose ranks are processes: how they meet, and what becomes of the job when one fails."""

import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from fslsage_rpc.config.schema import Comm, Config
from fslsage_rpc.device.cores import fair_threads
from fslsage_rpc.device.placement import gpu_number, open_device
from fslsage_rpc.device.workers import Workers
from fslsage_rpc.errors import FIRST_WORD_SECONDS, ConnectionLost, InputError
from fslsage_rpc.job.launching import LOOPBACK
from fslsage_rpc.job.roll_call import Presence, claim_failure, roll_call
from fslsage_rpc.job.signs_of_life import EndTheJob, Policy, SignsOfLife, leave
from fslsage_rpc.job.stopping import NOBODY_READS
from fslsage_rpc.job.world import World
from fslsage_rpc.transport.choices import on_one_host
from fslsage_rpc.transport.rpc import SERVER, RpcTransport, peers_may_be_lost

POLL_SECONDS = 0.05


class RpcWorld(World):
    """The ranks of a torchrun, srun or self-launched job.

    A rank that dies ends the job: its peers' calls fail or its silence is noticed (`SignsOfLife`), and
    everything since the last complete checkpoint is lost.
    """

    transport: RpcTransport
    works_beside = True
    _meets_anew = False

    def __init__(self, config: Config):
        self.number, self._started = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.homes = self._started - 1
        self.home = self.number - 1 if self.number > 0 else None
        self.device = open_device(config, gpu_number(self.number, self._started))
        self._here = Presence.here(self.number, self.device)
        self._workers = Workers(self.device)
        self._launcher_hosts_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._hosts_store = self.number == 0 and not self._launcher_hosts_store
        self._store: dist.Store | None = None
        self._signs: SignsOfLife | None = None
        try:
            self._start(config)
        except BaseException as error:
            self.fail(error)

    def _start(self, config: Config) -> None:
        """Meet the other ranks."""
        timeout = timedelta(seconds=config.comm.timeout_seconds)
        self._store = store = self._find_store(timeout)
        self._beside: dist.Store = store.clone()  # for the thread that writes checkpoints
        ranks = roll_call(store, self._here, self._started, timeout)
        self._signs = self._signs_of_life(config, EndTheJob(ranks, self._launcher_hosts_store))
        self._signs.start()
        with peers_may_be_lost(), self._signs.expects_connections(config.comm.timeout_seconds):
            self._open_transport(store, config.comm, ranks)

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
            host = "the launcher" if self._launcher_hosts_store else "rank 0"
            reason = str(error).partition("\n")[0]
            raise ConnectionLost(
                f"{host} did not open the job's store at {address}, port {port}, within "
                f"{timeout.total_seconds():g} s ({reason})"
            ) from None
        return dist.PrefixStore(f"fslsage_rpc/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    def _open_transport(self, store: dist.Store, keys: Comm, ranks: Sequence[Presence]) -> None:
        """Open it among those that have met, given by rank."""
        rank = [each.rank for each in ranks].index(self.number)
        if "OMP_NUM_THREADS" not in os.environ:  # torchrun and our launchers set it; plain srun does not
            torch.set_num_threads(fair_threads(rank, [(each.host, frozenset(each.cores)) for each in ranks]))
        # Names of its own in each generation: torch counts what workers of the same names have gathered.
        suffix = f"-{self.generation}" if self.generation else ""
        workers = [SERVER, *(f"clients{each.rank}{suffix}" for each in ranks[1:])]
        devices, places = [torch.device(each.device) for each in ranks], [each.place for each in ranks]
        number = self.number if self._meets_anew else None
        self.transport = RpcTransport(store, rank, keys, devices, places, workers, number)

    def start(self, kind: str, number: int, work: Callable[[], None]) -> None:
        self._workers.start(kind, number, work)

    def gather_beside(self, name: str, value: Any) -> list[Any] | None:
        """See `World`: through the store; None on rank 0 too, where a rank's value will never come."""
        store, never, mine = self._beside, self._never(), self.rank
        keys = [f"{name}/{rank}" for rank in range(self.transport.size)]
        with peers_may_be_lost():
            store.set(keys[mine], pickle.dumps(value))  # type: ignore[arg-type]  # bytes will do
            if mine != 0:
                return None
            while not store.check(keys):
                gone = [key for rank, key in enumerate(keys) if never(rank)]
                if not all(store.check([key]) for key in gone):  # what came before it was gone counts
                    return None
                time.sleep(POLL_SECONDS)
            values = [pickle.loads(store.get(key)) for key in keys]
            for key in keys:
                store.delete_key(key)
        return values

    def _never(self) -> Callable[[int], bool]:
        """Tells of a rank of this generation whether what it has not given by now will never come."""
        return lambda rank: False

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
            seen = said_by(error)
            return "", self._signs.policy.explain_loss(seen) if self._signs else seen, 1
        where = f"{self._here} failed in {self.activity()}"
        message = f"{where}: {type(error).__name__}: {said_by(error)}"
        return "".join(traceback.format_exception(error)), message, 1

    def _speaks(self) -> bool:
        """Is this rank the one to report a failure?"""
        if self._signs:
            return self._signs.claim()
        with suppress(RuntimeError):
            if self._store is not None:
                return claim_failure(self._store, self.number)
        if self.number != 1:
            time.sleep(FIRST_WORD_SECONDS)  # if rank 1 has the same problem, its end ends this rank
        return True

    def close(self) -> None:
        assert self._signs is not None
        self.transport.close(at_rest=self._signs.stop)
        self._workers.dissolve()


def said_by(error: BaseException) -> str:
    """What an error says; one that came back from a call begins with a line that names the worker."""
    said = [line for line in str(error).splitlines() if not line.startswith("On WorkerInfo")]
    return said[0] if said else ""
