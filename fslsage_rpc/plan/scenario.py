"""A configuration on given links and ranks: what each round has to do, without data and without training."""

from dataclasses import dataclass

import torch

from fslsage_rpc.algorithms import ALGORITHMS
from fslsage_rpc.config import Config
from fslsage_rpc.critical_path import LinkSpeed
from fslsage_rpc.data.datasets import SPECS
from fslsage_rpc.federation import Federation
from fslsage_rpc.models.splitting import PRECISIONS, build
from fslsage_rpc.training.experiment import model_sizes

LABEL_BYTES = 8


@dataclass(frozen=True)
class PlannedRound:
    """What one round has to do."""

    participants: list[int]
    samples: int
    """that the clients train on"""
    aligned: dict[int, int]
    """the samples in the alignment buffer of each client that is aligned"""
    averaged_bytes: int
    """of the models that the clients average"""


def training_samples(config: Config) -> int:
    """How many training samples the clients divide among them."""
    known = SPECS[config.data.name].train_samples
    return min(config.data.train_limit or known, known)


class Scenario:
    """A configuration whose clients all have the same number of samples."""

    def __init__(self, config: Config, link: LinkSpeed, client_ranks: int):
        self.config, self.link, self.client_ranks = config, link, client_ranks
        spec, clients = SPECS[config.data.name], config.clients
        samples, count = training_samples(config), clients.count
        shares = [samples * (i + 1) // count - samples * i // count for i in range(count)]
        self.federation = Federation(
            shares, clients.participation, clients.batch_size, clients.local_epochs, config.seed
        )
        self.algorithm = ALGORITHMS[config.algorithm.name](config.algorithm, self.federation)
        precision = PRECISIONS[config.precision]
        with torch.device("meta"):
            split = build(config.model, spec.classes, spec.image_shape, config.seed, precision.weights)
        self.sizes = model_sizes(split, precision)

    def round(self, round: int) -> PlannedRound:
        """What this round has to do."""
        participants = self.federation.participants(round)
        whole = self.sizes.server if self.algorithm.client_holds_whole_model else 0
        auxiliary = self.sizes.auxiliary if self.algorithm.averages_auxiliary(round) else 0
        return PlannedRound(
            participants=participants,
            samples=sum(sum(self.federation.batch_sizes[client]) for client in participants),
            aligned={c: self._buffered(c, round) for c in participants if self.algorithm.aligns(c, round)},
            averaged_bytes=self.sizes.client + whole + auxiliary,
        )

    def ring_seconds(self, bytes: int) -> float:
        """A ring all-reduce among the n client ranks: 2 (n-1) steps, each of half a round trip and 1/n of the
        bytes, up one link and down another.
        """
        rate = min(self.link.up_bytes_per_second, self.link.down_bytes_per_second)
        steps = 2 * (self.client_ranks - 1)
        return steps * (self.link.round_trip_seconds / 2 + bytes / self.client_ranks / rate)

    def _buffered(self, client: int, round: int) -> int:
        """What the alignment buffer holds at a client's first step of a round, its first upload included."""
        sizes = self.federation.batch_sizes[client]
        earlier = sum(client in self.federation.participants(past) for past in range(round))
        uploaded = sum(sizes[:: self.config.algorithm.upload_every])
        return min(earlier * uploaded + sizes[0], self.config.algorithm.alignment.buffer_size)
