"""The lower bounds, on pieces small enough to follow with a pencil."""

import dataclasses
import random

import pytest

from fslsage_rpc.algorithms import ALGORITHMS
from fslsage_rpc.config import AlgorithmKeys
from fslsage_rpc.critical_path import ClientPieces, LinkSpeed, RoundPieces
from fslsage_rpc.federation import Federation
from fslsage_rpc.plan.simulation import RoundSimulation, Step

LINK = LinkSpeed(round_trip_seconds=0.2, up_bytes_per_second=100.0, down_bytes_per_second=200.0)
CLIENT = ClientPieces(
    rank=0,
    steps=4,
    compute_seconds=2.0,
    requests=4,
    server_seconds=0.4,
    alignment_seconds=0.0,
    up_bytes=40,
    down_bytes=40,
    auxiliary_bytes=0,
)


def pieces(
    *clients: ClientPieces, link: LinkSpeed = LINK, workers: int = 2, targets: float = 0.0
) -> RoundPieces:
    return RoundPieces(
        clients=dict(enumerate(clients)),
        links=dict.fromkeys(range(len(clients)), link),
        server_workers=workers,
        averaging_seconds=0.5,
        server_averaging_seconds=0.7,
        targets_seconds=targets,
    )


def bound(name: str, round: RoundPieces) -> float:
    federation = Federation([8] * len(round.clients), 1.0, batch_size=2, local_epochs=1, seed=0)
    return ALGORITHMS[name](AlgorithmKeys(name=name), federation).bound_seconds(round)  # type: ignore[arg-type]


def other(client: ClientPieces = CLIENT, **changes: float) -> ClientPieces:
    return dataclasses.replace(client, **changes)


def test_fedavg_computes_and_averages() -> None:
    two_on_one_rank = pieces(CLIENT, other(compute_seconds=1.0))
    assert bound("fedavg", two_on_one_rank) == pytest.approx(3.0 + 0.5)
    on_two_ranks = pieces(CLIENT, other(compute_seconds=1.0, rank=1))
    assert bound("fedavg", on_two_ranks) == pytest.approx(2.0 + 0.5)


def test_a_splitfed_client_waits_for_every_gradient() -> None:
    # computes 2, 4 round trips of 0.2, 40 bytes up at 100/s and down at 200/s, the server's 0.4
    chain = 2.0 + 0.8 + 0.4 + 0.2 + 0.4
    assert bound("splitfed_v1", pieces(CLIENT)) == pytest.approx(chain + 0.5)
    assert bound("splitfed_v2", pieces(CLIENT)) == pytest.approx(chain + 0.5)


def test_splitfed_v2_has_one_lane_and_v1_as_many_as_the_server_has_cores() -> None:
    clients = [other(server_seconds=3.0, rank=rank) for rank in range(4)]
    first_arrival = 0.1 + 10 / 100
    assert bound("splitfed_v2", pieces(*clients)) == pytest.approx(first_arrival + 12.0)
    # The chain, 2 + 1.4 + 3, and the clients' averaging; the steps of 4 replicas on 2 cores, and theirs.
    assert bound("splitfed_v1", pieces(*clients)) == pytest.approx(max(6.4 + 0.5, 0.2 + 6.0 + 0.7))
    assert bound("splitfed_v1", pieces(*clients, workers=1)) == pytest.approx(0.2 + 12.0 + 0.7)


@pytest.mark.parametrize("name", ["cse_fsl", "fsl_sage"])
def test_uploads_overlap_with_compute(name: str) -> None:
    assert bound(name, pieces(CLIENT)) == pytest.approx(2.0 + 0.5)  # the clients
    busy_server = pieces(other(server_seconds=9.0), other(server_seconds=9.0, rank=1))
    assert bound(name, busy_server) == pytest.approx(0.2 + 18.0)  # the lane, behind the first upload
    slow = LinkSpeed(0.2, up_bytes_per_second=4.0, down_bytes_per_second=200.0)
    assert bound(name, pieces(CLIENT, link=slow)) == pytest.approx(10.0)  # the link


def test_an_alignment_blocks_its_client_and_each_worker_takes_one_at_a_time() -> None:
    aligned = other(alignment_seconds=1.0, auxiliary_bytes=100)
    # round trip 0.2, a quarter of the bytes 0.1, a quarter of the server's steps 0.1, alignment 1, down 0.5
    alone = 0.2 + 0.1 + 0.1 + 1.0 + 0.5 + 2.0 + 0.5
    assert bound("fsl_sage", pieces(aligned)) == pytest.approx(alone)
    # behind the first arrival five alignments; then the last one's model down, 3 of its 4 steps, averaging
    five = [other(aligned, rank=rank) for rank in range(5)]
    assert bound("fsl_sage", pieces(*five, workers=1)) == pytest.approx(0.2 + 5.0 + 0.5 + 1.5 + 0.5)
    assert bound("fsl_sage", pieces(*five, workers=2)) == pytest.approx(0.2 + 2.5 + 0.5 + 1.5 + 0.5)
    # of which the lane computes 1.0 itself, whatever else runs
    assert bound("fsl_sage", pieces(*five, targets=1.0)) == pytest.approx(0.2 + 2.0 + 0.5 + 1.5 + 0.5)
    assert bound("fsl_sage", pieces(*five, targets=4.9)) == pytest.approx(0.2 + 4.9 + 5 * 0.4)


def test_a_bound_is_at_least_its_longest_single_load() -> None:
    clients = [other(alignment_seconds=0.3, auxiliary_bytes=10, rank=rank % 2) for rank in range(4)]
    for name in ALGORITHMS:
        assert bound(name, pieces(*clients)) >= 4.0 + 0.5  # two clients on a rank, and averaging


def steps_of(client: ClientPieces, kind: str) -> list[Step]:
    """The steps that such pieces come from: all alike, a third of a step's compute before its request."""
    if not client.requests:
        return [Step(client.compute_seconds)]
    compute = client.compute_seconds / client.steps
    server, up = client.server_seconds / client.requests, client.up_bytes / client.requests
    steps, since_request = [], 0.0
    for k in range(client.steps):
        steps += [Step(since_request, "turn", k)]
        steps.append(Step(compute / 3, kind, k, server, up, client.down_bytes / client.requests))
        if k == 0 and client.alignment_seconds:
            steps.append(Step(0.0, "align", 0, client.alignment_seconds, 0, client.auxiliary_bytes))
        since_request = compute * 2 / 3
    return [*steps, Step(since_request)]


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("seed", range(12))
def test_no_schedule_of_the_same_pieces_is_below_the_bound(name: str, seed: int) -> None:
    """The program's own order without any overhead, on clients, ranks and links drawn at random."""
    draw = random.Random(seed)
    ranks, exchanges = draw.randint(1, 3), name.startswith("splitfed")
    link = LinkSpeed(draw.uniform(0.0, 0.3), draw.uniform(20, 500), draw.uniform(20, 500))
    clients = {}
    for client in range(draw.randint(ranks, 5)):
        count = draw.randint(1, 4)
        requests = 0 if name == "fedavg" else count
        aligned = name == "fsl_sage" and seed % 2 == 1
        clients[client] = ClientPieces(
            rank=client % ranks,
            steps=count,
            compute_seconds=count * draw.uniform(0.1, 1.0),
            requests=requests,
            server_seconds=requests * draw.uniform(0.01, 0.5),
            alignment_seconds=draw.uniform(0.1, 2.0) if aligned else 0.0,
            up_bytes=requests * draw.randint(1, 50),
            down_bytes=requests * draw.randint(1, 50) if exchanges else 0,
            auxiliary_bytes=draw.randint(1, 90) if aligned else 0,
        )
    steps = {id: steps_of(client, "exchange" if exchanges else "push") for id, client in clients.items()}
    lanes = {client: client if name == "splitfed_v1" else 0 for client in clients}
    clients_ended, server_ended = RoundSimulation(steps, lanes, ranks, link, 2, 4, 0.0, 0.0, 0.0).run()
    ended = max(clients_ended + 0.5, server_ended + (0.7 if name == "splitfed_v1" else 0.0))
    round = RoundPieces(clients, dict.fromkeys(range(ranks), link), 2, 0.5, 0.7, 0.0)
    assert bound(name, round) <= ended + 1e-9
