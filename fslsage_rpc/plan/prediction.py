"""Seconds and bytes of a planned round: its lower bound, over the efficiency that a benchmark reached."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from fslsage_rpc.algorithms.bound import ClientPieces, RoundPieces, bound_seconds
from fslsage_rpc.data.participation import home_of
from fslsage_rpc.measure.request_times import RequestTimes
from fslsage_rpc.parties.requests import ALIGNING, TAKING_UP, BeginAlignment, Collect
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
    measured = {*costs.kinds}
    if measured & ALIGNING:  # an alignment is the same work, whoever waits for it
        measured |= ALIGNING | TAKING_UP
    if not {ask.kind for ask in asks} <= measured:
        return "it makes requests of a kind that was not measured"
    asked = sum(ask.up_bytes + ask.down_bytes for ask in asks)
    averaged = sum(2 * (scenario.client_ranks - 1) * each.averaged_bytes for each in rounds)
    return Prediction(
        planned_bound(scenario, costs, server_workers, rounds) / costs.efficiency,
        (asked + averaged) / interval,
        sum(each.paper_bytes for each in rounds) / interval,
    )


def planned_bound(
    scenario: Scenario, costs: Costs, server_workers: int, rounds: Sequence[PlannedRound]
) -> float:
    """The lower bound of planned rounds that follow each other, in seconds per round.

    It is the mean of the rounds' own bounds, or what fits behind the training make of all rounds.
    These take the server's workers, and each its time before it is collected.
    Where ranks share cores, all work is one more load.
    """
    works = [_work(scenario, costs, server_workers, each) for each in rounds]
    bounds = [work.bound_seconds for work in works]
    fits = [seconds for work in works for seconds in work.fits.values()]
    loads = sum(work.seconds for work in works) + sum(fits)
    terms = [sum(bounds), sum(fits) / server_workers, loads / scenario.shared_cores]
    begun: dict[int, float] = {}  # per client, when a fit has ended that it began in these rounds
    before: dict[int, tuple[float, float]] = {}  # per client, when it collects one that it began before them
    for number, work in enumerate(works):
        for client, rest in work.rests.items():
            if client in begun:
                terms.append(begun.pop(client) + rest + sum(bounds[number + 1 :]))
            else:
                before[client] = sum(bounds[: number + 1]), rest
        begun |= {client: sum(bounds[:number]) + seconds for client, seconds in work.fits.items()}
    for client, (collected, rest) in before.items():
        # As these rounds were, so are the next ones: a fit that is begun in them is collected there.
        if client in begun and all(client in each.clients for each in rounds):
            terms.append(begun[client] - collected + rest)
    return max(terms) / len(rounds)


class _Work(NamedTuple):
    """A planned round, in seconds."""

    bound_seconds: float
    """where ranks share cores, these are one more load"""
    seconds: float
    """of all threads, but for fits behind the training"""
    fits: dict[int, float]
    """by client, those that are begun behind the training"""
    rests: dict[int, float]
    """by client, from when it has collected a fitted model to the end of the round, at the least"""


def _work(scenario: Scenario, costs: Costs, server_workers: int, planned: PlannedRound) -> _Work:
    # Of each request the transport's threads take one part on its way up and one on its answer's way down.
    link = replace(scenario.link, round_trip_seconds=scenario.link.round_trip_seconds + costs.handling)
    # The barrier of the client ranks before they average, and the last one of all ranks.
    hops = sum(math.ceil(math.log2(scenario.client_ranks + more)) for more in (0, 1))
    averaging = costs.averaging + averaging_seconds(scenario, planned.averaged_bytes)
    averaging += hops * scenario.link.round_trip_seconds
    clients: dict[int, ClientPieces] = {}
    fits: dict[int, float] = {}
    rests: dict[int, float] = {}
    for client, rehearsed in planned.clients.items():
        sizes = scenario.federation.batch_sizes[client]
        rank, compute = home_of(client, scenario.client_ranks), costs.client * sum(sizes)
        compute += costs.sending * len(rehearsed.asks)
        buffered = iter(planned.aligned.get(client, ()))
        of_kind: dict[str, RequestTimes] = {}
        for ask in rehearsed.asks:
            seconds = costs.server * ask.samples
            if ask.kind in ALIGNING:
                seconds = costs.alignment * next(buffered)
            if ask.kind == BeginAlignment.kind:
                fits[client], seconds = fits.get(client, 0.0) + seconds, 0.0
            if ask.kind == Collect.kind:
                later = compute * (len(sizes) - 1 - ask.step) / len(sizes)
                back = link.round_trip_seconds / 2 + ask.down_bytes / link.down_bytes_per_second
                rests[client] = back + later + averaging
            times = RequestTimes(
                count=1, compute_seconds=seconds, up_bytes=ask.up_bytes, down_bytes=ask.down_bytes
            )
            of_kind.setdefault(ask.kind, RequestTimes()).add(times)
        clients[client] = ClientPieces(rank, len(sizes), compute, rehearsed.asks, of_kind)
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
    return _Work(max(bound_seconds(pieces), work / scenario.shared_cores + averaging), work, fits, rests)


def averaging_seconds(scenario: Scenario, size: int) -> float:
    """A ring all-reduce of so many bytes among the n client ranks.

    It takes 2 (n-1) steps, of 1/n of the bytes up one link and down another. Each counts the way to a
    neighbour, two links away, and back.
    """
    link, ranks = scenario.link, scenario.client_ranks
    rate = min(link.up_bytes_per_second, link.down_bytes_per_second)
    return 2 * (ranks - 1) * (size / ranks / rate + 2 * link.round_trip_seconds)
