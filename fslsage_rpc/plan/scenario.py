"""A configuration on given links and ranks: what each round has to do, without data and without training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fslsage_rpc.algorithms import create
from fslsage_rpc.algorithms.bound import LinkSpeed
from fslsage_rpc.algorithms.paper_ledger import averaged_bytes, paper_bytes
from fslsage_rpc.algorithms.rehearsal import ClientRehearsal, Rehearsal
from fslsage_rpc.config.loading import from_tree, to_tree
from fslsage_rpc.config.schema import Config
from fslsage_rpc.data.participation import Federation
from fslsage_rpc.data.partitions import divided
from fslsage_rpc.parties.requests import Align
from fslsage_rpc.plan.wire import Connection
from fslsage_rpc.tasks import open_task
from fslsage_rpc.training.experiment import model_sizes


@dataclass(frozen=True)
class PlannedRound:
    """What one round has to do."""

    clients: dict[int, ClientRehearsal]
    """by participant"""
    samples: int
    """that the clients train on"""
    aligned: dict[int, list[int]]
    """the samples in a participant's alignment buffer, at each of its alignments"""
    averaged_bytes: int
    """of the models that the clients average"""
    paper_bytes: int


def with_algorithm(config: Config, name: str, keys: Sequence[str] = ()) -> Config:
    """A configuration as it is with an algorithm; another than its own does not get its arguments.

    Args:
        keys: further changes, as `key=value`.
    """
    own = [] if name == config.algorithm.name else ["algorithm.arguments={}"]
    return from_tree(to_tree(config), [f"algorithm.name={name}", *own, *keys])


class Scenario:
    """A configuration whose clients all have the same number of samples.

    `sample_bytes`: of one sample's smashed data and label.

    Args:
        shared_cores: of the one machine that all ranks are on, over the threads of an operation; infinite
            where each has a machine of its own.
    """

    def __init__(self, config: Config, link: LinkSpeed, client_ranks: int, shared_cores: float = math.inf):
        self.config, self.link, self.client_ranks = config, link, client_ranks
        self.shared_cores = shared_cores
        task, clients = open_task(config), config.clients
        samples, count = divided(config.data, task.train_samples), clients.count
        shares = [samples * (i + 1) // count - samples * i // count for i in range(count)]
        self.federation = Federation(
            shares, clients.participation, clients.batch_size, clients.local_epochs, config.seed
        )
        self.algorithm = create(config.algorithm, self.federation)
        with torch.device("meta"):
            split = task.build()
        self.sizes = model_sizes(split, task.precision)
        self._rehearsal = Rehearsal(self.algorithm, task, split)
        self.sample_bytes = self.sizes.smashed + task.label_bytes

    def round(self, round: int) -> PlannedRound:
        """What this round has to do; not of an algorithm whose requests depend on values."""
        course, clients = self._rehearsal.course(round), self._rehearsal.clients(round)
        assert course is not None
        return PlannedRound(
            clients=clients,
            samples=sum(sum(self.federation.batch_sizes[client]) for client in clients),
            aligned={
                client: self._rehearsal.aligned(client, round)
                for client, rehearsed in clients.items()
                if any(ask.kind == Align.kind for ask in rehearsed.asks)
            },
            averaged_bytes=averaged_bytes(self.algorithm, course, self.sizes),
            paper_bytes=paper_bytes(self.algorithm, course, self.sizes),
        )

    def averaging_seconds(self, bytes: int, rest: float) -> float:
        """Two ring all-reduces among the n client ranks, of floats and of integers: 2 (n-1) steps each, of
        1/n of the bytes up one link and down another, which is as far as a round trip to the server.

        Args:
            rest: seconds since the last averaging, over the same connections.
        """
        rate = min(self.link.up_bytes_per_second, self.link.down_bytes_per_second)
        neighbour = Connection(rate, 2 * self.link.round_trip_seconds)
        began = self._averaged(neighbour, 0.0, bytes) + rest
        return self._averaged(neighbour, began, bytes) - began

    def _averaged(self, neighbour: Connection, began: float, bytes: int) -> float:
        """When an averaging that begins now has ended."""
        ended = began
        for _ in range(2 * (self.client_ranks - 1)):
            ended = neighbour.carry(ended, bytes / self.client_ranks) + 2 * self.link.round_trip_seconds
        return ended

    def barrier_seconds(self) -> float:
        """That of the client ranks before averaging, and the last one of all ranks."""
        hops = sum(math.ceil(math.log2(ranks)) for ranks in (self.client_ranks, self.client_ranks + 1))
        return hops * self.link.round_trip_seconds
