"""Who takes part: the clients, their samples and steps, and the participants of each round."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fslsage_rpc.data.batches import batch_sizes
from fslsage_rpc.randomness import numpy_stream


class Federation:
    """What every rank knows of all clients, without a message: it follows from the partition and the seed.

    Args:
        samples: n_i, the sample count of each client.
        participation: ceil(participation * m) clients of the m that are there train in each round.
    """

    def __init__(
        self, samples: Sequence[int], participation: float, batch_size: int, local_epochs: int, seed: int
    ):
        self.samples = list(samples)
        self.batch_sizes = [batch_sizes(n, batch_size, local_epochs) for n in samples]
        self.seed = seed
        self._participation = participation
        self._drawn: dict[int, list[int]] = {}
        self._present = {0: list(range(len(samples)))}  # from each of these rounds on

    def present(self, t: int) -> list[int]:
        """The clients that are in the run in a round, ascending: those of ranks that were not lost."""
        return self._present[max(first for first in self._present if first <= t)]

    def follow(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Take in who was lost and who came back, and when: the events of `metrics.jsonl`, all of them."""
        self._present = {0: list(range(len(self.samples)))}
        self._drawn = {}
        for event in events:
            round = event["round"] - 1  # they count from 1
            there, its = set(self.present(round)), set(event["clients"])
            self._present[round] = sorted(there - its if event["event"] == "loss" else there | its)

    def participants(self, t: int) -> list[int]:
        """The clients that train in a round, ascending."""
        present = self.present(t)
        count = _share_of(len(present), self._participation)
        if count == len(present):
            return present
        if t not in self._drawn:  # asked for again and again, by client and round
            drawn = numpy_stream(self.seed, "participants", t).choice(len(present), count, replace=False)
            self._drawn[t] = sorted(present[place] for place in drawn)
        return self._drawn[t]

    def shares(self, t: int) -> dict[int, float]:
        """w_i = n_i / sum(n) over the round's participants; they add up to 1 but for rounding."""
        participants = self.participants(t)
        total = sum(self.samples[client] for client in participants)
        return {client: self.samples[client] / total for client in participants}

    def steps(self, client: int) -> int:
        """K_i, the local steps of a client in a round."""
        return len(self.batch_sizes[client])


def home_of(client: int, homes: int) -> int:
    """Which of so many client ranks hosts a client, by its place among them as the job was started."""
    return client % homes


def hosted_by(home: int, homes: int, clients: int) -> range:
    """The clients that one of them hosts."""
    return range(home, clients, homes)


def _share_of(count: int, share: float) -> int:
    """Rounded up, at least 1."""
    return max(1, math.ceil(round(share * count, 9)))  # 0.1 * 30 is 3, not 4
