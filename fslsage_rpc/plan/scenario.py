"""A configuration on given links and ranks: the work of its rounds, without data, and what work costs."""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch

from fslsage_rpc.algorithms import create
from fslsage_rpc.algorithms.bound import LinkSpeed
from fslsage_rpc.algorithms.paper_ledger import averaged_bytes, paper_bytes
from fslsage_rpc.algorithms.rehearsal import ClientRehearsal, Rehearsal
from fslsage_rpc.config.loading import from_tree, to_tree
from fslsage_rpc.config.schema import Config
from fslsage_rpc.data.participation import Federation
from fslsage_rpc.data.partitions import divided
from fslsage_rpc.errors import InputError
from fslsage_rpc.parties.requests import KINDS
from fslsage_rpc.tasks import open_task
from fslsage_rpc.training.experiment import model_sizes

DEPENDS_ON_VALUES = "its requests, or their bytes, depend on values"


class Costs(NamedTuple):
    """The costs of an algorithm; `kinds` of requests are those that were measured."""

    client: float = 0.0
    """seconds of its local steps per sample, on a core of its own or of a GPU"""
    server: float = 0.0
    """seconds of the server's steps per sample, likewise"""
    alignment: float = 0.0
    """seconds of an alignment per sample in the buffer, likewise"""
    sending: float = 0.0
    """seconds of a client's thread, to hand one request over and to take its answer"""
    handling: float = 0.0
    """seconds of the transport's threads on both ranks, for one request and its answer"""
    averaging: float = 0.0
    """seconds of an averaging, beside the links"""
    kinds: Collection[str] = tuple(KINDS)
    efficiency: float = 1.0
    """lower bound, made of these costs, over measured seconds. What is missing to 1 is waiting, and what the
    costs miss; it is more than 1 where they hold too much.
    """


class PlannedRound(NamedTuple):
    """The work of one round, by participant: its rehearsal, and the samples in its alignment buffer at
    each alignment. Then the bytes of the models that a client averages, and those of the paper ledger.
    """

    clients: dict[int, ClientRehearsal]
    aligned: dict[int, list[int]]
    averaged_bytes: int
    paper_bytes: int


def with_algorithm(config: Config, name: str, keys: Sequence[str] = ()) -> Config:
    """The configuration with this algorithm, without the arguments of another, and with `key=value`s."""
    own = [] if name == config.algorithm.name else ["algorithm.arguments={}"]
    return from_tree(to_tree(config), [f"algorithm.name={name}", *own, *keys])


class Scenario:
    """A configuration whose clients all have the same number of samples; it needs no data.

    Args:
        shared_cores: of the one machine that all ranks are on, over the threads of an operation; infinite
            where each has a machine of its own.
    """

    def __init__(self, config: Config, link: LinkSpeed, client_ranks: int, shared_cores: float = math.inf):
        self.config, self.link = config, link
        self.client_ranks, self.shared_cores = client_ranks, shared_cores
        task, keys = open_task(config), config.clients
        samples, count = divided(config.data, task.train_samples), keys.count
        shares = [samples * (i + 1) // count - samples * i // count for i in range(count)]
        self.federation = Federation(
            shares, keys.participation, keys.batch_size, keys.local_epochs, config.seed
        )
        self.algorithm = create(config.algorithm, self.federation)
        with torch.device("meta"):
            split = task.build()
        self.sizes = model_sizes(split, task.precision)
        self._rehearsal = Rehearsal(self.algorithm, task, split)

    def round(self, number: int) -> PlannedRound:
        """The work of this round, from 0.

        Raises:
            InputError: the requests of the algorithm, or the bytes of a codec, depend on values.
        """
        course = self._rehearsal.course(number)
        paid = paper_bytes(self.algorithm, course, self.sizes).coded if course else None
        if course is None or paid is None:
            raise InputError(DEPENDS_ON_VALUES)
        clients = self._rehearsal.clients(number)
        aligned = {client: self._rehearsal.aligned(client, number) for client in clients}
        return PlannedRound(
            clients,
            {client: samples for client, samples in aligned.items() if samples},
            averaged_bytes(self.algorithm, course, self.sizes),
            paid,
        )
