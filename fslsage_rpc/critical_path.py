"""The pieces that a round was made of, measured, in seconds and bytes.

An algorithm's lower bound (`Algorithm.bound_seconds`) is the longest of the chains and loads that its
dependencies make of them: what a perfect overlap of the same pieces would reach.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class LinkSpeed:
    """A client rank's link to the server."""

    round_trip_seconds: float
    """of a call with next to nothing in it"""
    up_bytes_per_second: float
    down_bytes_per_second: float


NO_LINK = LinkSpeed(0.0, math.inf, math.inf)
"""of a process that talks to itself"""


@dataclass(frozen=True)
class ClientPieces:
    """One participant's part of a round."""

    rank: int
    steps: int
    compute_seconds: float
    """data, forward and backward passes, estimates and optimizer steps of the client"""
    requests: int
    """uploads or exchanges; an alignment is none"""
    server_seconds: float
    """what the server computed for these"""
    alignment_seconds: float
    """what the server computed to align this client, 0 where it did not"""
    up_bytes: int
    down_bytes: int
    """gradients"""
    auxiliary_bytes: int
    """the aligned auxiliary model"""


@dataclass(frozen=True)
class RoundPieces:
    """All participants, their ranks' links, and what is done once per round."""

    clients: Mapping[int, ClientPieces]
    links: Mapping[int, LinkSpeed]
    """per client rank"""
    server_workers: int
    """lanes that the server executes at the same time, and fits likewise"""
    averaging_seconds: float
    """of the client models (and whatever travels with them) among the client ranks"""
    server_averaging_seconds: float
    """of replicas, on the server"""
    targets_seconds: float
    """the part of all alignments that its lane must execute itself"""

    def busiest_rank(self) -> float:
        """The client compute of the rank that has most of it: a rank computes for one client at a time."""
        return max(self._by_rank("compute_seconds").values())

    def busiest_link(self) -> float:
        """The time that the most loaded link needs for its bytes, up or down, whichever is longer."""
        up, down, auxiliary = map(self._by_rank, ("up_bytes", "down_bytes", "auxiliary_bytes"))
        return max(
            max(
                up[rank] / self.links[rank].up_bytes_per_second,
                (down[rank] + auxiliary[rank]) / self.links[rank].down_bytes_per_second,
            )
            for rank in up
        )

    def first_arrival(self) -> float:
        """The earliest that a request can be at the server: half a round trip and the bytes of one upload."""
        return min(
            self.links[c.rank].round_trip_seconds / 2
            + c.up_bytes / max(c.requests, 1) / self.links[c.rank].up_bytes_per_second
            for c in self.clients.values()
        )

    def server_seconds(self) -> float:
        """What the lanes computed for the round's requests."""
        return self.targets_seconds + sum(client.server_seconds for client in self.clients.values())

    def longest_exchange_chain(self) -> float:
        """A SplitFed client's steps, of which nothing can overlap: forward pass, smashed data up, server
        step, gradient down, backward pass; the longest over the clients.
        """
        chains = []
        for client in self.clients.values():
            link = self.links[client.rank]
            up = client.up_bytes / link.up_bytes_per_second
            down = client.down_bytes / link.down_bytes_per_second
            wire = client.requests * link.round_trip_seconds + up + down
            chains.append(client.compute_seconds + wire + client.server_seconds)
        return max(chains)

    def longest_aligned_chain(self) -> float:
        """An aligned client's first upload and its server step, its alignment, the auxiliary model's way down
        (one round trip in all), and its compute; the longest over the clients.
        """
        chains = []
        for client in self._aligned():
            link = self.links[client.rank]
            upload = client.up_bytes / client.requests / link.up_bytes_per_second
            step = client.server_seconds / client.requests
            down = client.auxiliary_bytes / link.down_bytes_per_second
            wait = link.round_trip_seconds + upload + step + client.alignment_seconds + down
            chains.append(wait + client.compute_seconds)
        return max(chains)

    def all_alignments(self) -> float:
        """The first upload's arrival, all fits, as many at a time as the server has workers, then for
        the client that is served last at least the auxiliary model's way down and all steps but the first.
        """
        rests = [
            client.auxiliary_bytes / self.links[client.rank].down_bytes_per_second
            + client.compute_seconds * (client.steps - 1) / client.steps
            for client in self._aligned()
        ]
        fits = sum(client.alignment_seconds for client in self._aligned()) - self.targets_seconds
        return self.first_arrival() + fits / self.server_workers + min(rests)

    def _aligned(self) -> list[ClientPieces]:
        return [client for client in self.clients.values() if client.alignment_seconds]

    def _by_rank(self, name: str) -> dict[int, float]:
        sums: dict[int, float] = {}
        for client in self.clients.values():
            sums[client.rank] = sums.get(client.rank, 0) + getattr(client, name)
        return sums
