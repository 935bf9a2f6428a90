"""Seconds and bytes of a planned round: its lower bound, over the efficiency that a benchmark reached."""

import math
import statistics
from dataclasses import replace
from typing import NamedTuple

from fslsage_rpc.algorithms.bound import ClientPieces, RoundPieces, bound_seconds
from fslsage_rpc.data.participation import home_of
from fslsage_rpc.measure.request_times import RequestTimes
from fslsage_rpc.parties.requests import Align
from fslsage_rpc.plan.scenario import Costs, PlannedRound, Scenario


class Prediction(NamedTuple):
    """Means over the rounds of one alignment interval; on the wire are smashed data, labels, gradients,
    auxiliary models and averaging.
    """

    round_seconds: float
    wire_bytes: float
    paper_bytes: float


def predict(scenario: Scenario, costs: Costs, server_workers: int) -> Prediction | str:
    """The alignment interval in the middle of the run: buffers fill as it goes on. Never the first.

    Returns:
        Why it is unknown, where clients make requests of a kind that has no costs.
    """
    interval = scenario.algorithm.interval
    first = max(1, scenario.config.rounds // interval // 2) * interval
    rounds = [scenario.round(number) for number in range(first, first + interval)]
    asks = [ask for each in rounds for client in each.clients.values() for ask in client.asks]
    if not {ask.kind for ask in asks} <= {*costs.kinds}:
        return "it makes requests of a kind that was not measured"
    bounds = [planned_bound(scenario, costs, server_workers, each) for each in rounds]
    asked = sum(ask.up_bytes + ask.down_bytes for ask in asks)
    averaged = sum(2 * (scenario.client_ranks - 1) * each.averaged_bytes for each in rounds)
    return Prediction(
        statistics.fmean(bounds) / costs.efficiency,
        (asked + averaged) / interval,
        statistics.fmean(each.paper_bytes for each in rounds),
    )


def planned_bound(scenario: Scenario, costs: Costs, server_workers: int, planned: PlannedRound) -> float:
    """The lower bound of a planned round, in seconds; where ranks share cores, these are one more load."""
    clients: dict[int, ClientPieces] = {}
    for client, rehearsed in planned.clients.items():
        sizes = scenario.federation.batch_sizes[client]
        buffered = iter(planned.aligned.get(client, ()))
        of_kind: dict[str, RequestTimes] = {}
        for ask in rehearsed.asks:
            aligns = ask.kind == Align.kind
            times = RequestTimes(
                count=1,
                compute_seconds=costs.alignment * next(buffered) if aligns else costs.server * ask.samples,
                up_bytes=ask.up_bytes,
                down_bytes=ask.down_bytes,
            )
            of_kind.setdefault(ask.kind, RequestTimes()).add(times)
        rank, compute = home_of(client, scenario.client_ranks), costs.client * sum(sizes)
        compute += costs.sending * len(rehearsed.asks)
        clients[client] = ClientPieces(rank, len(sizes), compute, rehearsed.asks, of_kind)
    # Of each request the transport's threads take one part on its way up and one on its answer's way down.
    link = replace(scenario.link, round_trip_seconds=scenario.link.round_trip_seconds + costs.handling)
    # The barrier of the client ranks before they average, and the last one of all ranks.
    hops = sum(math.ceil(math.log2(scenario.client_ranks + more)) for more in (0, 1))
    averaging = costs.averaging + averaging_seconds(scenario, planned.averaged_bytes)
    averaging += hops * scenario.link.round_trip_seconds
    pieces = RoundPieces(
        clients,
        links=dict.fromkeys(range(scenario.client_ranks), link),
        replicas=scenario.algorithm.server_replicas,
        server_workers=server_workers,
        averaging_seconds=averaging,
        server_averaging_seconds=0.0,
        targets_seconds=0.0,
    )
    work = sum(client.compute_seconds + costs.handling * len(client.asks) for client in clients.values())
    work += sum(times.compute_seconds for client in clients.values() for times in client.of_kind.values())
    return max(bound_seconds(pieces), work / scenario.shared_cores + averaging)


def averaging_seconds(scenario: Scenario, size: int) -> float:
    """A ring all-reduce of so many bytes among the n client ranks.

    It takes 2 (n-1) steps, of 1/n of the bytes up one link and down another. Each counts the way to a
    neighbour, two links away, and back.
    """
    link, ranks = scenario.link, scenario.client_ranks
    rate = min(link.up_bytes_per_second, link.down_bytes_per_second)
    return 2 * (ranks - 1) * (size / ranks / rate + 2 * link.round_trip_seconds)
