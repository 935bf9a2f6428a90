"""Who takes part: the clients, their samples and steps, and the participants of each round."""

import math
from collections.abc import Sequence

from fslsage_rpc.data.batches import batch_sizes
from fslsage_rpc.randomness import numpy_stream


class Federation:
    """What every rank knows of all clients, without a message: it follows from the partition and the seed.

    Args:
        samples: n_i, the sample count of each client.
        participation: ceil(participation * m) clients train in each round.
    """

    def __init__(
        self, samples: Sequence[int], participation: float, batch_size: int, local_epochs: int, seed: int
    ):
        self.samples = list(samples)
        self.batch_sizes = [batch_sizes(n, batch_size, local_epochs) for n in samples]
        self.seed = seed
        self._drawn: dict[int, list[int]] = {}
        self._per_round = max(1, math.ceil(round(participation * len(samples), 9)))  # 0.1 * 30 is 3, not 4

    def participants(self, round: int) -> list[int]:
        """The clients that train in a round, ascending."""
        count = len(self.samples)
        if self._per_round == count:
            return list(range(count))
        if round not in self._drawn:  # asked for again and again, by client and round
            drawn = numpy_stream(self.seed, "participants", round).choice(
                count, self._per_round, replace=False
            )
            self._drawn[round] = sorted(int(client) for client in drawn)
        return self._drawn[round]

    def shares(self, round: int) -> dict[int, float]:
        """w_i = n_i / sum(n) over the round's participants; they add up to 1 but for rounding."""
        participants = self.participants(round)
        total = sum(self.samples[client] for client in participants)
        return {client: self.samples[client] / total for client in participants}

    def steps(self, client: int) -> int:
        """K_i, the local steps of a client in a round."""
        return len(self.batch_sizes[client])
