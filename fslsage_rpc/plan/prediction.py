"""Seconds and bytes of a round that nobody has run, from the costs of one that was measured."""

import statistics
from dataclasses import dataclass

from fslsage_rpc.plan.costs import Costs
from fslsage_rpc.plan.scenario import PlannedRound, Scenario
from fslsage_rpc.plan.simulation import RoundSimulation, Step

FORWARD_SHARE = 1 / 3
"""of a client's step, the part before its request: a backward pass costs about two forward passes"""


@dataclass(frozen=True)
class Prediction:
    """Means over the rounds of one alignment interval."""

    round_seconds: float
    wire_bytes: float
    """smashed data, labels, gradients, auxiliary models and averaging"""
    paper_bytes: float


def predict(scenario: Scenario, costs: Costs, server_workers: int) -> Prediction:
    """The alignment interval in the middle of the run: buffers fill as it goes on. Never the first."""
    interval = scenario.algorithm.interval
    first = max(1, scenario.config.rounds // interval // 2) * interval
    rounds = range(first, first + interval)
    return Prediction(
        statistics.fmean(_seconds(scenario, costs, server_workers, round) for round in rounds),
        statistics.fmean(_wire_bytes(scenario, round) for round in rounds),
        statistics.fmean(scenario.algorithm.paper_bytes(scenario.sizes, round) for round in rounds),
    )


def _seconds(scenario: Scenario, costs: Costs, server_workers: int, round: int) -> float:
    """The simulated round; clients average once they have ended and all requests are answered."""
    ended, _ = simulation_of(scenario, costs, server_workers, round).run()
    averaged = scenario.round(round).averaged_bytes
    averaging = costs.averaging + scenario.averaging_seconds(averaged, rest=ended)
    return ended + averaging + scenario.barrier_seconds()


def simulation_of(scenario: Scenario, costs: Costs, server_workers: int, round: int) -> RoundSimulation:
    """A round that is yet to be run in simulated time."""
    planned, algorithm = scenario.round(round), scenario.algorithm
    lanes = {client: client if algorithm.server_replicas else 0 for client in planned.participants}
    return RoundSimulation(
        steps={client: client_steps(scenario, costs, client, planned) for client in planned.participants},
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
    batches, sizes = scenario.federation.batch_sizes[client], scenario.sizes
    if scenario.algorithm.client_holds_whole_model:
        return [Step(costs.client_per_sample * sum(batches))]
    exchanges = scenario.algorithm.auxiliary == "none"
    every = 1 if exchanges else scenario.config.algorithm.upload_every
    steps: list[Step] = []
    compute = 0.0  # since the last request or turn
    for k, samples in enumerate(batches):
        if k % every == 0:
            steps.append(Step(compute, "turn", k))
            compute = 0.0
        compute += FORWARD_SHARE * costs.client_per_sample * samples
        if k % every == 0:
            steps.append(
                Step(
                    compute_seconds=compute,
                    kind="exchange" if exchanges else "push",
                    turn=k,
                    server_seconds=costs.server_per_sample * samples,
                    up_bytes=scenario.sample_bytes * samples,
                    down_bytes=sizes.smashed * samples if exchanges else 0,
                )
            )
            compute = 0.0
        if k == 0 and client in planned.aligned:
            seconds = costs.alignment(planned.aligned[client])
            steps.append(Step(0.0, "align", 0, seconds, down_bytes=sizes.auxiliary))
        compute += (1 - FORWARD_SHARE) * costs.client_per_sample * samples
    return [*steps, Step(compute)]


def _wire_bytes(scenario: Scenario, round: int) -> float:
    """What the wire ledger would count, without evaluation."""
    planned = scenario.round(round)
    no_costs = Costs(0, 0, 0, 0, 0, 0, 0)
    requests = sum(
        step.up_bytes + step.down_bytes
        for client in planned.participants
        for step in client_steps(scenario, no_costs, client, planned)
    )
    return requests + 2 * (scenario.client_ranks - 1) * planned.averaged_bytes
