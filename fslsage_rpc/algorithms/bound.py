"""The lower bound of a round: what a perfect overlap of the pieces that it was made of would reach.

Pieces are measured, in seconds and bytes. Which must follow which is known from what each client asked.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fslsage_rpc.measure.request_times import RequestTimes
from fslsage_rpc.parties.requests import KINDS, Ask, Asked, BeginAlignment


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
    """One participant's part of a round; its steps, and its requests of one kind, count as alike."""

    rank: int
    steps: int
    compute_seconds: float
    """data, forward and backward passes, estimates, codecs and optimizer steps of the client"""
    asks: Sequence[Ask]
    """in the order that it makes them"""
    of_kind: Mapping[str, RequestTimes]
    """all kinds that it asks"""


@dataclass(frozen=True)
class RoundPieces:
    """All participants, their ranks' links, and what is done once per round."""

    clients: Mapping[int, ClientPieces]
    links: Mapping[int, LinkSpeed]
    """per client rank"""
    replicas: bool
    """each client has a lane of its own; else one lane serves all"""
    server_workers: int
    """lanes that the server executes at the same time, and fits likewise"""
    averaging_seconds: float
    """of the client models (and whatever travels with them) among the client ranks"""
    server_averaging_seconds: float
    """of replicas and auxiliary models, on the server"""
    targets_seconds: float
    """the part of all alignments that lanes execute themselves; of a `BeginAlignment` it is all"""


def bound_seconds(pieces: RoundPieces) -> float:
    """The lower bound of a round, in seconds: its longest chain or load, with the averaging behind it.

    docs/latency.md states each of them, and why no schedule of the same pieces is shorter.
    """
    chains = [_chain(client, pieces.links[client.rank]) for client in pieces.clients.values()]
    turns = [[turn for turn in chain.turns if turn.kind.in_order] for chain in chains]
    fitted = [[turn for turn in chain.turns if turn.kind.fits] for chain in chains]
    begun, seconds = 0.0, {True: 0.0, False: 0.0}  # of fits, and of lanes
    for client in pieces.clients.values():
        for kind, sums in client.of_kind.items():
            seconds[KINDS[kind].fits] += sums.compute_seconds
            begun += sums.compute_seconds if kind == BeginAlignment.kind else 0.0
    of_fits = max(0.0, pieces.targets_seconds - begun)  # that lanes execute for them
    seconds[True] -= of_fits
    seconds[False] += of_fits
    lanes = min(pieces.server_workers, len(chains) if pieces.replicas else 1)
    return max(
        *(_averaged(pieces, chain.served, chain.ended) for chain in chains),
        *(_averaged(pieces, 0.0, _rank_seconds(pieces, rank)) for rank in pieces.links),
        _load(pieces, turns, seconds[False] / lanes),
        _load(pieces, fitted, seconds[True] / pieces.server_workers),
    )


@dataclass(frozen=True)
class _Slot:
    """The execution of a request: in its lane's order, if it is in that."""

    kind: type[Asked]
    begins: float
    """at the earliest"""
    rest: float
    """from the end of its execution to the end of its client's round, at the least"""


@dataclass(frozen=True)
class _Chain:
    """The earliest times of a client that has its rank, its link and its lane to itself."""

    turns: list[_Slot]
    served: float
    """the server has executed all its requests"""
    ended: float
    """the client has computed all its steps, and has all answers"""


class _Way:
    """Requests of one client on their way to the server, and their execution there.

    Args:
        delay: half a round trip, in seconds.
    """

    def __init__(self, delay: float):
        self._delay = delay
        self._sent = 0.0
        self._free = 0.0

    def take(self, asked: float, up: float, server: float, kind: type[Asked]) -> tuple[float, float]:
        """When the execution of the next one begins and ends.

        One that is in order comes behind the bytes and turns of those before it, any other behind its own.

        Args:
            asked: when the client makes it.
            up: seconds of its bytes.
            server: seconds of its execution.
        """
        if not kind.in_order:
            begins = asked + up + self._delay
            return begins, begins + server
        self._sent = max(self._sent, asked) + up
        begins = max(self._free, self._sent + self._delay)
        self._free = begins if kind.fits else begins + server
        return begins, begins + server


def _chain(client: ClientPieces, link: LinkSpeed) -> _Chain:
    """Follow a client through its round.

    Where within a step its compute lies is not known, so two clocks run.
    `now` counts none of this step's compute: all of it may come behind the next request.
    `end` is the step's end, where its compute adds to its waits, and earlier requests are in nobody's way.
    """
    compute = client.compute_seconds / client.steps
    delay = link.round_trip_seconds / 2
    way, block = _Way(delay), _Way(delay)
    at, now, end = 0, 0.0, compute
    turns: list[_Slot] = []
    served = answered = 0.0
    for ask in client.asks:
        kind, sums = KINDS[ask.kind], client.of_kind[ask.kind]
        up = sums.up_bytes / sums.count / link.up_bytes_per_second
        server = sums.compute_seconds / sums.count
        back = delay + sums.down_bytes / sums.count / link.down_bytes_per_second
        if ask.step > at:
            now = end + (ask.step - at - 1) * compute
            end = now + compute
        if ask.step > at or not ask.at_once:
            block = _Way(delay)  # of requests between which nothing is computed, so that their waits add up
        at = ask.step
        begins, ends = way.take(now, up, server, kind)
        _, waited = block.take(0.0, up, server, kind)
        served, answered = max(served, ends), max(answered, ends + back)
        behind = 0.0
        if kind.blocks:
            now = ends + back
            end = max(end + waited + back, now)
            behind = (client.steps - 1 - at) * compute
            block = _Way(delay)
        turns.append(_Slot(kind, begins, back + behind))
    return _Chain(turns, served, max(answered, end + (client.steps - 1 - at) * compute))


def _averaged(pieces: RoundPieces, served: float, ended: float) -> float:
    """The server averages once it has executed all requests, clients once they have all answers too."""
    return max(served + pieces.server_averaging_seconds, ended + pieces.averaging_seconds)


def _rank_seconds(pieces: RoundPieces, rank: int) -> float:
    """The longer of two: a rank's compute, for one client at a time, and the way of all bytes over its link.

    All bytes are up before the last request is executed, and none come down before the first is.
    """
    hosted = [client for client in pieces.clients.values() if client.rank == rank]
    sums = [each for client in hosted for each in client.of_kind.values()]
    link = pieces.links[rank]
    up = sum(each.up_bytes for each in sums) / link.up_bytes_per_second
    down = sum(each.down_bytes for each in sums) / link.down_bytes_per_second
    travel = link.round_trip_seconds + max(up, down) if sums else 0.0
    return max(sum(client.compute_seconds for client in hosted), travel)


def _load(pieces: RoundPieces, turns: Sequence[Sequence[_Slot]], seconds: float) -> float:
    """All lanes, or all fits, at work: from the first turn on, and before the least rest of a last one.

    Args:
        turns: per client, in order.
        seconds: that the work takes, evenly shared.
    """
    some = [each for each in turns if each]
    if not some:
        return 0.0
    served = min(each[0].begins for each in some) + seconds
    return _averaged(pieces, served, served + min(each[-1].rest for each in some))
