"""The round trips and rates of the ways that a run's tensors take, measured on the ranks as they are."""

import math
import statistics
from dataclasses import dataclass

import torch
from torch import nn

from fslsage_rpc.algorithms.bound import LinkSpeed
from fslsage_rpc.device.clock import clock, synchronise
from fslsage_rpc.job.world import World
from fslsage_rpc.measure.request_times import RequestLog
from fslsage_rpc.models.flat import Weights, flatten
from fslsage_rpc.parties.context import Context
from fslsage_rpc.parties.server import Server
from fslsage_rpc.transport import link
from fslsage_rpc.transport.link import PROBE_BYTES, PROBE_SECONDS
from fslsage_rpc.transport.wire_ledger import WireLedger


@dataclass(frozen=True)
class CollectiveSpeed:
    """An all-reduce over the client ranks, as averaging does it."""

    round_trip_seconds: float
    """of one with next to nothing in it"""
    bytes_per_second: float
    """of the model that is averaged, not of what the ring moves for it"""


def measure_links(world: World) -> dict[int, LinkSpeed]:
    """Collective: the speed of each client rank's link to a server that has nothing to do.

    Returns:
        By client rank, on the server's rank; elsewhere nothing.
    """
    server = _idle_server(world) if world.hosts_server else None
    mine = link.connect(world.transport, server, WireLedger(), RequestLog())
    return link.measure_links(world.transport, mine)


def measure_averaging(world: World) -> CollectiveSpeed | None:
    """Collective: how fast the client ranks average.

    The round trip is the median of 21 all-reduces of one number. The rate is that of the fastest of 3, of
    256 KiB, or of more until one takes 0.1 s.

    Returns:
        On the server's rank, the slowest rank's; None elsewhere, and where there is one client rank only.
    """
    mine = None
    if world.transport.client_ranks > 1 and world.transport.client_rank is not None:
        round_trip = statistics.median(_all_reduce_seconds(world, 1) for _ in range(21))
        size, seconds = 2**16, 0.0  # numbers of 4 bytes
        while seconds < PROBE_SECONDS and 4 * size < PROBE_BYTES:
            size *= 4
            seconds = _mean(world, min(_all_reduce_seconds(world, size) for _ in range(3)) - round_trip)
        mine = CollectiveSpeed(round_trip, 4 * size / seconds if seconds > 0 else math.inf)
    speeds = [speed for speed in world.transport.gather(mine) or [] if speed is not None]
    return max(speeds, key=lambda speed: speed.round_trip_seconds, default=None)


def _all_reduce_seconds(world: World, numbers: int) -> float:
    weights = _numbers(torch.zeros(numbers), world)
    world.transport.client_barrier()
    started = clock()
    world.transport.all_reduce(weights)
    synchronise(world.device)
    return clock() - started


def _mean(world: World, mine: float) -> float:
    """The mean of the client ranks' values: the same on all, so that all decide alike."""
    sums = _numbers(torch.tensor([mine]), world)
    world.transport.all_reduce(sums)
    return float(sums.floats) / world.transport.client_ranks


def _numbers(floats: torch.Tensor, world: World) -> Weights:
    floats = floats.to(world.device)
    return Weights(floats, torch.empty(0, dtype=torch.int64, device=world.device))


def _idle_server(world: World) -> Server:
    """A server without models, lanes or clients: the far end of a link."""
    nothing = nn.Identity()
    return Server(
        initial=(flatten(nothing), None),
        averaged=nothing,
        lanes={},
        fits={},
        measure_drift=False,
        start=world.start,
        context=Context(world.device),
    )
