"""The ranks of a job: who is there; what travels between them is its transport's."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from fslsage_rpc.config.schema import Config
from fslsage_rpc.transport.base import Transport


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

    transport: Transport
    """among the ranks that are there now; another one after they have met anew"""
    device: torch.device
    works_beside: bool
    """pieces of the server's work started one after the other run at the same time"""
    homes: int
    """how many ranks hosted clients when the job was started: the clients are dealt out over them for good"""
    home: int | None
    """this rank's place among those, from 0; None where it hosts no clients"""
    generation: int = 0
    """how often the ranks have met anew, after a loss or with a newcomer"""

    activity: Callable[[], str] = staticmethod(lambda: "the start")
    """what this rank is doing, in words; told to the other ranks with its signs of life"""

    @property
    def rank(self) -> int:
        """This rank's place among those that are there now."""
        return self.transport.rank

    @property
    def hosts_server(self) -> bool:
        """Does this rank own the server?"""
        return self.rank == 0

    @abstractmethod
    def start(self, kind: str, number: int, work: Callable[[], None]) -> None:
        """Run a piece of the server's work: on a thread for its kind and number (`Workers`), or at once."""

    @abstractmethod
    def gather_beside(self, name: str, value: Any) -> list[Any] | None:
        """`Transport.gather` from a thread beside the main one, out of step with it. Only rank 0 waits for
        the others.

        Args:
            name: of what is gathered, the same on every rank; not used again before rank 0 has got it.
        """

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
    def fail(self, error: BaseException) -> NoReturn:
        """Report this rank's error, once per job, and end the process (or, in one process, raise it)."""

    @abstractmethod
    def close(self) -> None:
        """Collective: leave in order."""


def job_ranks(config: Config) -> int:
    """The ranks of the job that this process is one of; 1 with `transport: local`."""
    return 1 if config.transport == "local" else int(os.environ.get("WORLD_SIZE", 1))


def is_first_rank(config: Config) -> bool:
    """Is this the rank that hosts the server and writes the folder? Known before the ranks meet."""
    return config.transport == "local" or int(os.environ.get("RANK", 0)) == 0
