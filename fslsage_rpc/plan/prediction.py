"""Seconds and bytes of a round that nobody has run, from the costs of one that was measured."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fslsage_rpc.parties.requests import Align, Ask
from fslsage_rpc.plan.costs import Costs
from fslsage_rpc.plan.scenario import PlannedRound, Scenario
from fslsage_rpc.plan.simulation import RoundSimulation, Step

BEHIND_FORWARD = 2.0
"""forward passes that the rest of a client's local step costs, which is mostly its backward pass"""


@dataclass(frozen=True)
class Prediction:
    """Means over the rounds of one alignment interval."""

    round_seconds: float
    wire_bytes: float
    """smashed data, labels, gradients, auxiliary models and averaging"""
    paper_bytes: float


def predict(scenario: Scenario, costs: Costs, server_workers: int) -> Prediction | None:
    """The alignment interval in the middle of the run: buffers fill as it goes on. Never the first.

    Returns:
        None where clients make requests of a kind that has no costs.
    """
    interval = scenario.algorithm.interval
    first = max(1, scenario.config.rounds // interval // 2) * interval
    rounds = [scenario.round(round) for round in range(first, first + interval)]
    asks = {ask.kind for each in rounds for client in each.clients.values() for ask in client.asks}
    if not asks <= costs.kinds:
        return None
    return Prediction(
        statistics.fmean(_seconds(scenario, costs, server_workers, planned) for planned in rounds),
        statistics.fmean(_wire_bytes(scenario, planned) for planned in rounds),
        statistics.fmean(planned.paper_bytes for planned in rounds),
    )


def _seconds(scenario: Scenario, costs: Costs, server_workers: int, planned: PlannedRound) -> float:
    """The simulated round; clients average once they have ended and all requests are answered."""
    ended, _ = simulation_of(scenario, costs, server_workers, planned).run()
    averaging = costs.averaging + scenario.averaging_seconds(planned.averaged_bytes, rest=ended)
    return ended + averaging + scenario.barrier_seconds()


def simulation_of(
    scenario: Scenario, costs: Costs, server_workers: int, planned: PlannedRound
) -> RoundSimulation:
    """A round that is yet to be run in simulated time."""
    replicas = scenario.algorithm.server_replicas
    lanes = {client: client if replicas else 0 for client in planned.clients}
    return RoundSimulation(
        steps={client: client_steps(scenario, costs, client, planned) for client in planned.clients},
        lane_of=lanes,
        ranks=scenario.client_ranks,
        link=scenario.link,
        workers=server_workers,
        window=scenario.config.comm.upload_window,
        sending_seconds=costs.sending,
        client_handling_seconds=costs.client_handling,
        server_handling_seconds=costs.server_handling,
        shared_cores=scenario.shared_cores,
    )


def client_steps(scenario: Scenario, costs: Costs, client: int, planned: PlannedRound) -> list[Step]:
    """A client's compute and requests in one round, in order."""
    buffered = iter(planned.aligned.get(client, ()))
    sizes, rehearsed = scenario.federation.batch_sizes[client], planned.clients[client]
    steps: list[Step] = []
    compute = 0.0  # since the last request or turn
    for k, (samples, events) in enumerate(zip(sizes, rehearsed.steps, strict=True)):
        if any(isinstance(event, Ask) for event in events):
            steps.append(Step(compute, "turn", k))
            compute = 0.0
        calls = [event for event in events if isinstance(event, str)]
        seconds, weights = costs.client_per_sample * samples, sum(_weight(call, calls) for call in calls)
        if not calls:
            compute += seconds  # a mean over all local steps, those without a call among them
        for event in events:
            if isinstance(event, str):
                compute += seconds * _weight(event, calls) / weights
                continue
            server = (
                costs.alignment(next(buffered))
                if event.kind == Align.kind
                else costs.server_per_sample * event.samples
            )
            up = event.smashed_bytes + event.label_bytes
            steps.append(Step(compute, event.kind, k, server, up, event.answer_bytes))
            compute = 0.0
    return [*steps, Step(compute)]


def _weight(call: str, calls: Sequence[str]) -> float:
    """How much of a local step's compute one of its calls has, in forward passes."""
    return 1.0 if call == "forward" else BEHIND_FORWARD / (len(calls) - calls.count("forward"))


def _wire_bytes(scenario: Scenario, planned: PlannedRound) -> float:
    """What the wire ledger would count, without evaluation."""
    asked = sum(
        ask.smashed_bytes + ask.label_bytes + ask.answer_bytes
        for client in planned.clients.values()
        for ask in client.asks
    )
    return asked + 2 * (scenario.client_ranks - 1) * planned.averaged_bytes
