"""Which ranks there are, and where: what each says of itself in the job's store as it starts."""

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
from torch.distributed import Store

from fslsage_rpc.device.cores import usable_cores
from fslsage_rpc.device.placement import GpuPlace
from fslsage_rpc.errors import ConnectionLost
from fslsage_rpc.job import processes

POLL_SECONDS = 0.1
FAILURE = "failure"
"""the store's key of the rank that says why the job ends"""


@dataclass(frozen=True)
class Presence:
    """One rank's process.

    `machine` tells process ids apart: it is the same where the same id means the same process, and None where
    that cannot be known.
    """

    rank: int
    host: str
    process: int
    machine: str | None
    device: str
    gpu: str | None = None
    visible_gpus: Sequence[str] = ()
    cores: Sequence[int] = ()

    @classmethod
    def here(cls, rank: int, device: torch.device) -> "Presence":
        """That of this process."""
        place = GpuPlace.of(device)
        seen, cores, machine = sorted(place.visible), sorted(usable_cores()), processes.machine()
        return cls(rank, platform.node(), os.getpid(), machine, str(device), place.gpu, seen, cores)

    @classmethod
    def read(cls, text: bytes) -> "Presence":
        """What another process has written of itself."""
        return cls(**json.loads(text))

    def written(self) -> str:
        """What `read` reads."""
        return json.dumps(asdict(self))

    @property
    def place(self) -> GpuPlace:
        """Where it is."""
        return GpuPlace(self.host, self.gpu, frozenset(self.visible_gpus))

    def __str__(self) -> str:
        return f"rank {self.rank} ({'server' if self.rank == 0 else 'clients'}, host {self.host})"

    def has_ended(self, machine: str | None) -> bool:
        """Is the process gone, as far as can be seen from a machine?"""
        return machine is not None and machine == self.machine and processes.has_ended(self.process)


def roll_call(store: Store, mine: Presence, size: int, timeout: timedelta) -> list[Presence]:
    """Wait for all ranks to have started.

    Returns:
        What each says of itself, by rank.

    Raises:
        ConnectionLost: some did not, within the time-out.
    """
    store.set(f"here/{mine.rank}", mine.written())
    keys = [f"here/{rank}" for rank in range(size)]
    await_all(store, keys, timeout)
    return [Presence.read(store.get(key)) for key in keys]


def await_all(store: Store, keys: list[str], timeout: timedelta) -> None:
    """Wait until all ranks have started and set their keys, given by rank.

    Raises:
        ConnectionLost: some did not, within the time-out, or another rank has failed meanwhile.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    while not _are_set(store, keys):
        if _are_set(store, [FAILURE]):
            raise ConnectionLost("another rank has failed while the ranks start")
        if time.monotonic() > deadline:
            absent = [str(rank) for rank, key in enumerate(keys) if not _are_set(store, [key])]
            raise ConnectionLost(
                f"rank{'s' if absent[1:] else ''} {', '.join(absent)} did not start within "
                f"{timeout.total_seconds():g} s"
            )
        time.sleep(POLL_SECONDS)


def claim_failure(store: Store, rank: int) -> bool:
    """Is this rank the first to report a failure, so that it should print it?

    Raises:
        RuntimeError: the store is gone.
    """
    return store.compare_set(FAILURE, "", str(rank)).decode() == str(rank)


def _are_set(store: Store, keys: list[str]) -> bool:
    try:
        return store.check(keys)
    except RuntimeError:
        raise ConnectionLost("the job's store is gone while the ranks start") from None
