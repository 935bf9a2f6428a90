"""The lower bound of a round, on pieces small enough to follow with a pencil, and in simulated rounds."""

import dataclasses
import random
from collections.abc import Callable, Sequence

import pytest
import torch

from fslsage_rpc.algorithms.bound import ClientPieces, LinkSpeed, RoundPieces, bound_seconds
from fslsage_rpc.bench.pieces import round_pieces
from fslsage_rpc.data.participation import Federation
from fslsage_rpc.measure.host_load import CoreTimes
from fslsage_rpc.measure.request_times import ByClient, RequestTimes
from fslsage_rpc.parties.requests import KINDS, Ask, BeginStep
from fslsage_rpc.runs.records import RankReport
from support.simulated_round import SimulatedRound, Stretch

LINK = LinkSpeed(round_trip_seconds=0.2, up_bytes_per_second=100.0, down_bytes_per_second=200.0)
# Of one request: the server's seconds, bytes up and down.
PUSH, EXCHANGE, ALIGN = (0.1, 10, 0), (0.1, 10, 10), (1.0, 0, 100)
BEGIN, COLLECT = (0.3, 0, 0), (0.2, 0, 100)


def asks_of(name: str, steps: int, every: int = 1) -> list[Ask]:
    """A client's requests, its uploads `every` so many steps; `aligned` is FSL-SAGE where it aligns."""
    if name == "fedavg":
        return []
    kind = "exchange" if name.startswith("splitfed") else "push"
    uploads = [Ask(step, kind) for step in range(0, steps, every)]
    return [uploads[0], Ask(0, "align", at_once=True), *uploads[1:]] if name == "aligned" else uploads


def client(
    *asks: Ask,
    rank: int = 0,
    steps: int = 4,
    compute: float = 2.0,
    push: tuple[float, int, int] = PUSH,
    exchange: tuple[float, int, int] = EXCHANGE,
    align: tuple[float, int, int] = ALIGN,
    begin: tuple[float, int, int] = BEGIN,
    collect: tuple[float, int, int] = COLLECT,
) -> ClientPieces:
    """A client from what each of its requests takes."""
    of_kind = {}
    asked = {
        "push": push,
        "exchange": exchange,
        "align": align,
        "begin_alignment": begin,
        "collect": collect,
    }
    for kind, (server, up, down) in asked.items():
        if count := sum(ask.kind == kind for ask in asks):
            of_kind[kind] = RequestTimes(
                count, compute_seconds=count * server, up_bytes=count * up, down_bytes=count * down
            )
    return ClientPieces(rank, steps, compute, asks, of_kind)


def pieces(
    *clients: ClientPieces,
    link: LinkSpeed = LINK,
    replicas: bool = False,
    workers: int = 2,
    averaging: float = 0.5,
    server_averaging: float = 0.0,
    targets: float = 0.0,
) -> RoundPieces:
    return RoundPieces(
        clients=dict(enumerate(clients)),
        links={client.rank: link for client in clients},
        replicas=replicas,
        server_workers=workers,
        averaging_seconds=averaging,
        server_averaging_seconds=server_averaging,
        targets_seconds=targets,
    )


def test_clients_that_ask_nothing_compute_and_average() -> None:
    shorter = client(compute=1.0)
    assert bound_seconds(pieces(client(), shorter)) == pytest.approx(3.0 + 0.5)  # two on a rank
    on_two_ranks = pieces(client(), dataclasses.replace(shorter, rank=1))
    assert bound_seconds(on_two_ranks) == pytest.approx(2.0 + 0.5)
    assert bound_seconds(pieces(client(compute=0.1))) == pytest.approx(0.1 + 0.5)  # less than a round trip


def test_a_splitfed_client_waits_for_every_gradient() -> None:
    # computes 2, 4 round trips of 0.2, 40 bytes up at 100/s and down at 200/s, the server's 0.4
    chain = 2.0 + 0.8 + 0.4 + 0.2 + 0.4
    alone = client(*asks_of("splitfed", 4))
    for replicas in (False, True):
        assert bound_seconds(pieces(alone, replicas=replicas)) == pytest.approx(chain + 0.5)


def test_replicas_have_as_many_lanes_as_the_server_has_cores() -> None:
    clients = [client(*asks_of("splitfed", 4), rank=rank, exchange=(0.75, 10, 10)) for rank in range(4)]
    first, last = 0.1 + 10 / 100, 0.1 + 10 / 200
    assert bound_seconds(pieces(*clients)) == pytest.approx(first + 12.0 + last + 0.5)

    def replicas(workers: int) -> float:
        return bound_seconds(pieces(*clients, replicas=True, workers=workers, server_averaging=0.7))

    # The server averages behind the last step, clients behind the last answer.
    assert replicas(1) == pytest.approx(first + 12.0 + max(0.7, last + 0.5))
    # The chain is 2 + 1.4 + 3, and as long as the steps of 4 replicas on 2 cores.
    assert replicas(2) == pytest.approx(6.4 + 0.5) == pytest.approx(first + 6.0 + 0.7)
    assert replicas(4) == pytest.approx(6.4 + 0.5)


def test_the_server_averages_replicas_while_clients_still_compute() -> None:
    one = pieces(client(Ask(0, "exchange")), replicas=True, server_averaging=3.0)
    assert bound_seconds(one) == pytest.approx(0.1 + 0.1 + 0.1 + 3.0)
    assert bound_seconds(dataclasses.replace(one, server_averaging_seconds=1.0)) == pytest.approx(
        2.0 + 0.45 + 0.5
    )


def test_uploads_overlap_with_compute() -> None:
    uploads = asks_of("cse_fsl", 4)
    assert bound_seconds(pieces(client(*uploads))) == pytest.approx(2.0 + 0.5)  # the clients
    busy = [client(*uploads, rank=rank, push=(2.25, 10, 0)) for rank in range(2)]
    # The lane, behind the first upload; then the last one's answer, and averaging.
    assert bound_seconds(pieces(*busy)) == pytest.approx(0.2 + 18.0 + 0.1 + 0.5)
    # Its clients go on to the end of their steps meanwhile.
    early = [client(Ask(0, "push"), rank=rank, push=(5.0, 10, 0)) for rank in range(2)]
    assert bound_seconds(pieces(*early)) == pytest.approx(0.2 + 10.0 + 0.1 + 0.5)
    slow = LinkSpeed(0.2, up_bytes_per_second=4.0, down_bytes_per_second=200.0)
    # The bytes, then the last one's way, server step, answer, and averaging.
    assert bound_seconds(pieces(client(*uploads), link=slow)) == pytest.approx(10.0 + 0.1 + 0.1 + 0.1 + 0.5)
    # Of two clients on one link: the bytes, a round trip, and averaging.
    both = pieces(client(*uploads), client(*uploads), link=slow)
    assert bound_seconds(both) == pytest.approx(20.0 + 0.2 + 0.5)


def test_an_alignment_blocks_its_client_and_each_worker_takes_one_at_a_time() -> None:
    asks = asks_of("aligned", 4)
    # round trip 0.2, an upload's bytes 0.1, its server step 0.1, alignment 1, down 0.5
    alone = 0.2 + 0.1 + 0.1 + 1.0 + 0.5 + 2.0 + 0.5
    assert bound_seconds(pieces(client(*asks))) == pytest.approx(alone)
    # Behind the first upload's step come five fits, the last one's way down, 3 of its 4 steps, averaging.
    five = [client(*asks, rank=rank) for rank in range(5)]
    around = 0.1 + 0.1 + 0.1 + 0.1 + 0.5 + 1.5 + 0.5
    assert bound_seconds(pieces(*five, workers=1)) == pytest.approx(around + 5.0)
    assert bound_seconds(pieces(*five, workers=2)) == pytest.approx(around + 2.5)
    # Of the alignments the lane computes 1.0 itself, whatever else runs.
    assert bound_seconds(pieces(*five, targets=1.0)) == pytest.approx(around + 2.0)
    assert bound_seconds(pieces(*five, targets=4.9)) == pytest.approx(0.2 + 4.9 + 5 * 0.4 + 0.1 + 0.5)


def test_an_alignment_behind_the_training_takes_its_round_no_more_than_its_turn() -> None:
    asks = [Ask(0, "push"), Ask(0, "begin_alignment", at_once=True), *(Ask(k, "push") for k in (1, 2, 3))]
    assert bound_seconds(pieces(client(*asks), targets=0.3)) == pytest.approx(2.0 + 0.5)  # it goes on
    # The lane: twelve turns of uploads and three of alignments, which hold the true gradients.
    three = [client(*asks, rank=rank, begin=(2.0, 0, 0)) for rank in range(3)]
    for targets in (0.0, 5.9, 6.0):
        lane = 0.2 + 12 * 0.1 + 3 * 2.0
        assert bound_seconds(pieces(*three, targets=targets)) == pytest.approx(lane + 0.1 + 0.5)
    # Beside them one that its client waits for, of whose second the lane computes 0.6.
    waits = client(*asks_of("aligned", 4), rank=3)
    assert bound_seconds(pieces(*three, waits, targets=6.6)) == pytest.approx(lane + 0.4 + 0.6 + 0.1 + 0.5)


def test_a_fitted_model_is_collected_behind_no_turn() -> None:
    # The upload takes the lane 9.0; the answer of 100 bytes is there at 0.1 + 0.2 + 0.1 + 0.5.
    asks = [Ask(0, "push"), Ask(0, "collect", at_once=True)]
    alone = pieces(client(*asks), averaging=0.0)
    assert bound_seconds(alone) == pytest.approx(0.9 + 2.0)
    busy = pieces(client(*asks, push=(9.0, 10, 0)), averaging=0.0)
    assert bound_seconds(busy) == pytest.approx(0.2 + 9.0 + 0.1)
    # A client that begins the next alignment has collected the one before.
    both = pieces(client(*asks, Ask(0, "begin_alignment", at_once=True), begin=(3.0, 0, 0)), averaging=0.0)
    assert bound_seconds(both) == pytest.approx(0.9 + 0.1 + 3.0 + 0.1)
    # Codecs of five answers, with one worker; then the last one's way down, and 3 of its 4 steps.
    five = [client(*asks, rank=rank, collect=(1.0, 0, 100)) for rank in range(5)]
    assert bound_seconds(pieces(*five, workers=1)) == pytest.approx(0.1 + 5.0 + 0.1 + 0.5 + 1.5 + 0.5)


def test_a_bound_is_at_least_its_longest_single_load() -> None:
    clients = [client(*asks_of("aligned", 4), rank=rank % 2, align=(0.3, 0, 10)) for rank in range(4)]
    assert bound_seconds(pieces(*clients)) >= 4.0 + 0.5  # two clients on a rank, and averaging


def stretches_of(client: ClientPieces, share: Callable[[], float]) -> list[Stretch]:
    """A simulated client of such pieces.

    Args:
        share: of what is left of a step's compute, that before its next request which is not made at once.
    """
    stretches, compute = [], 0.0  # since the last request or turn
    for k in range(client.steps):
        left = client.compute_seconds / client.steps
        asks = [ask for ask in client.asks if ask.step == k]
        if asks:
            stretches.append(Stretch(compute, BeginStep(k)))
            compute = 0.0
        for ask in asks:
            before = 0.0 if ask.at_once else share() * left
            left -= before
            times = client.of_kind[ask.kind]
            up, down, server = (
                each / times.count for each in (times.up_bytes, times.down_bytes, times.compute_seconds)
            )
            stretches.append(Stretch(before, Ask(k, ask.kind, 0, up, 0, down), server))
        compute += left
    return [*stretches, Stretch(compute)]


def simulated(t: RoundPieces, window: int, share: Callable[[], float]) -> float:
    """Seconds of a round of such pieces by the program's own order, without any overhead."""
    clients = {id: stretches_of(client, share) for id, client in t.clients.items()}
    ended, served = SimulatedRound(t.links, t.replicas, t.server_workers, window, clients).run()
    return max(ended + t.averaging_seconds, served + t.server_averaging_seconds)


def in_step(compute: float, kind: str = "exchange", step: int = 0, server: float = 0.5) -> list[Stretch]:
    """Compute, and a request of 10 bytes up and 20 down in a local step of its own."""
    ask = Ask(step, kind, smashed_bytes=10, answer_bytes=20 if kind == "exchange" else 0)
    return [Stretch(0.0, BeginStep(step)), Stretch(compute, ask, server)]


def run(
    *clients: Sequence[Stretch], ranks: int = 1, replicas: bool = False, workers: int = 1, window: int = 4
) -> float:
    """When all have ended."""
    links = dict.fromkeys(range(ranks), LINK)
    return SimulatedRound(links, replicas, workers, window, dict(enumerate(clients))).run()[0]


TRIP = 0.1 + 0.1 + 0.5 + 0.1 + 0.1  # half a round trip and 10 bytes up, the server, 20 bytes down


def test_simulated_clients_wait_for_answers_and_use_each_others_waits() -> None:
    assert run([*in_step(1.0), *in_step(2.0, step=1), Stretch(1.0)]) == pytest.approx(4.0 + 2 * TRIP)
    two = [[*in_step(1.0), Stretch(1.0)]] * 2
    assert run(*two, replicas=True, workers=2) == pytest.approx(4.0)  # 1's trip is over before 0 ends
    assert run(*two, ranks=2, replicas=True, workers=2) == pytest.approx(2.0 + TRIP)


def test_a_simulated_lane_or_worker_takes_requests_one_by_one_and_in_turn() -> None:
    clients = [[*in_step(1.0, server=5.0), Stretch(1.0)]] * 3
    one_by_one = 1.0 + 0.2 + 15.0 + 0.2 + 1.0
    assert run(*clients, ranks=3) == pytest.approx(one_by_one)
    assert run(*clients, ranks=3, replicas=True, workers=1) == pytest.approx(one_by_one)
    assert run(*clients, ranks=3, replicas=True, workers=3) == pytest.approx(one_by_one - 10.0)
    late, early = [*in_step(9.0), Stretch(0.0)], [*in_step(1.0), Stretch(0.0)]
    assert run(late, early, ranks=2) == pytest.approx(9.0 + 0.2 + 0.5 + 0.5 + 0.2)  # client 0 is first


def test_simulated_uploads_overlap_until_the_window_is_full() -> None:
    def uploads(server: float) -> list[Stretch]:
        return [*(each for step in range(3) for each in in_step(1.0, "push", step, server)), Stretch(1.0)]

    assert run(uploads(0.5)) == pytest.approx(4.0)  # the last is trained on before the client ends
    assert run(uploads(10.0)) == pytest.approx(1.0 + 0.2 + 30.0 + 0.1)
    # A window of one: each step begins when the upload before it is trained on, and takes a trip of its own.
    assert run(uploads(10.0), window=1) == pytest.approx(3 * (1.0 + 0.2 + 10.0 + 0.1))
    big = [Stretch(0.0, Ask(0, "push", smashed_bytes=100)), Stretch(0.0)]  # a link takes one at a time
    assert run(big, big) == pytest.approx(2.0 + 0.2)
    assert run(big, big, ranks=2) == pytest.approx(1.0 + 0.2)


# Four steps of 0.5, an upload at each; the third aligns too. Behind uploads that take the server 1.0 each:
# the third's begins at 2.2, the alignment at 3.2, its answer is there at 4.8; the last upload's at 6.1.
ALIGNS_LATE = client(
    *(Ask(step, "push") for step in range(3)),
    Ask(2, "align", at_once=True),
    Ask(3, "push"),
    push=(1.0, 10, 0),
)
# Three steps of 0.5: uploads that take the server 2.0 each, then an exchange, answered at 4.45.
EXCHANGES_LAST = client(
    Ask(0, "push"), Ask(1, "push"), Ask(2, "exchange"), steps=3, compute=1.5, push=(2.0, 10, 0)
)


@pytest.mark.parametrize(
    ("alone", "shares", "seconds"),
    [
        (ALIGNS_LATE, [0, 0, 1, 0], 6.1),
        (EXCHANGES_LAST, [0, 0, 1], 4.45),
        # A step more.
        (dataclasses.replace(EXCHANGES_LAST, steps=4, compute_seconds=2.0), [0, 0, 1], 4.45 + 0.5),
        # The upload, its step and the alignment, one behind the other; then four steps.
        (client(Ask(0, "push"), Ask(0, "align", at_once=True)), [0.3], 0.2 + 0.1 + 0.1 + 1.0 + 0.5 + 2.0),
        # The same, but that the first step's compute may lie between the upload and the alignment.
        (client(Ask(0, "push"), Ask(0, "align")), [0, 1], 0.2 + 1.0 + 0.5 + 2.0),
        # An exchange at the last step, behind whatever share of its compute.
        (client(Ask(3, "exchange")), [0.7], 2.0 + 0.2 + 0.1 + 0.1 + 0.05),
        # An upload at the end of the round is answered before clients average.
        (client(Ask(3, "push")), [0], 2.0),
        (client(Ask(3, "push"), push=(1.0, 10, 0)), [0], 1.5 + 0.1 + 0.1 + 1.0 + 0.1),
    ],
)
def test_a_client_alone_reaches_its_bound(
    alone: ClientPieces, shares: Sequence[float], seconds: float
) -> None:
    """The bound, by hand, and the schedule of the same pieces that is as short."""
    assert bound_seconds(pieces(alone)) == pytest.approx(seconds + 0.5)
    assert simulated(pieces(alone), 4, iter(shares).__next__) == pytest.approx(seconds + 0.5)


def test_the_documented_example() -> None:
    """The one in docs/latency.md."""

    def bound(name: str, workers: int = 1, replicas: bool = False) -> float:
        clients = [client(*asks_of(name, 4), rank=rank) for rank in range(2)]
        averaging = 0.7 if replicas else 0.0
        return bound_seconds(pieces(*clients, workers=workers, replicas=replicas, server_averaging=averaging))

    assert bound("splitfed_v1", workers=2, replicas=True) == pytest.approx(4.3)
    assert bound("splitfed_v2") == pytest.approx(4.3)
    assert bound("cse_fsl") == pytest.approx(2.5)
    assert bound("aligned") == pytest.approx(4.9)
    assert bound("aligned", workers=2) == pytest.approx(4.4)
    asks = [Ask(0, "push"), Ask(0, "begin_alignment", at_once=True), *(Ask(k, "push") for k in (1, 2, 3))]
    lagged = [client(*asks, rank=rank, begin=(0.1, 0, 0)) for rank in range(2)]
    assert bound_seconds(pieces(*lagged, workers=1, targets=0.2)) == pytest.approx(2.5)


def test_pieces_are_of_what_ranks_report() -> None:
    """Two ranks, three clients of 4, 2 and 2 steps, of which the last made no request."""
    federation = Federation([8, 4, 4], 1.0, batch_size=2, local_epochs=1, seed=0)
    push, align = RequestTimes(2, compute_seconds=0.4, up_bytes=20), RequestTimes(1, compute_seconds=1.0)
    asks = [Ask(0, "push"), Ask(0, "align", at_once=True), Ask(2, "push")]
    end = RequestTimes(1, compute_seconds=9.0)  # of which the bound knows nothing

    def report(phases: dict[str, float] | None, requests: ByClient) -> RankReport:
        return RankReport(1.0, phases, CoreTimes("a", 1.0, 1.0), {}, {}, 0.0, 0, {}, requests, [], {})

    averaging = {"client": {"averaging": 0.1}, "server": {"averaging": 0.2, "targets": 0.3}}
    round = round_pieces(
        line={"participants": [0, 1, 2], "phases": averaging},
        reports=[
            report(None, {}),
            report(
                {"data": 1.0, "forward_backward": 2.0, "averaging": 9.0},
                {0: {"push": push, "align": align, "end": end}},
            ),
            report({"forward_backward": 4.0}, {}),
        ],
        federation=federation,
        asks={0: asks, 1: [], 2: []},
        links={0: LINK, 1: LINK},
        replicas=True,
        device=torch.device("cpu"),
    )
    assert round.clients == {
        0: ClientPieces(0, 4, 2.0, asks, {"push": push, "align": align}),
        1: ClientPieces(1, 2, 4.0, [], {}),
        2: ClientPieces(0, 2, 1.0, [], {}),
    }
    assert (round.averaging_seconds, round.server_averaging_seconds) == (0.1, 0.2)
    assert round.targets_seconds == pytest.approx(0.9)  # the mean of three lanes is measured


def reference_bound(name: str, t: RoundPieces) -> float:
    """A bound of each algorithm's own, which is written from its page and knows no requests.

    The general one may be larger, as it has more in it, and never smaller.
    """
    clients = list(t.clients.values())

    def total(client: ClientPieces, key: str, fits: bool = False) -> float:
        kinds = client.of_kind.items()
        return float(sum(getattr(times, key) for kind, times in kinds if KINDS[kind].fits is fits))

    def link_of(client: ClientPieces) -> LinkSpeed:
        return t.links[client.rank]

    def up_seconds(client: ClientPieces) -> float:
        return total(client, "up_bytes") / link_of(client).up_bytes_per_second

    def down_seconds(client: ClientPieces, fits: bool) -> float:
        return total(client, "down_bytes", fits) / link_of(client).down_bytes_per_second

    ranks = [[client for client in clients if client.rank == rank] for rank in t.links]
    busiest_rank = max(sum(client.compute_seconds for client in hosted) for hosted in ranks)
    if name == "fedavg":
        return busiest_rank + t.averaging_seconds
    count = {id: total(client, "count") for id, client in t.clients.items()}
    busiest_link = max(
        max(
            sum(map(up_seconds, hosted)),
            sum(down_seconds(client, fits) for client in hosted for fits in (False, True)),
        )
        for hosted in ranks
    )
    first_arrival = min(
        link_of(client).round_trip_seconds / 2 + up_seconds(client) / count[id]
        for id, client in t.clients.items()
    )
    lanes = t.targets_seconds + sum(total(client, "compute_seconds") for client in clients)
    if name.startswith("splitfed"):
        chain = max(
            client.compute_seconds
            + count[id] * link_of(client).round_trip_seconds
            + up_seconds(client)
            + down_seconds(client, fits=False)
            + total(client, "compute_seconds")
            for id, client in t.clients.items()
        )
        workers = min(t.server_workers, len(clients)) if t.replicas else 1
        behind = t.server_averaging_seconds if t.replicas else 0.0
        return max(
            max(chain, busiest_rank, busiest_link) + t.averaging_seconds,
            first_arrival + lanes / workers + behind,
        )
    bound = max(busiest_rank + t.averaging_seconds, first_arrival + lanes, busiest_link)
    aligned = {id: client for id, client in t.clients.items() if "align" in client.of_kind}
    if not aligned:
        return bound
    longest = max(
        link_of(client).round_trip_seconds
        + up_seconds(client) / count[id]
        + total(client, "compute_seconds") / count[id]
        + total(client, "compute_seconds", fits=True)
        + down_seconds(client, fits=True)
        + client.compute_seconds
        for id, client in aligned.items()
    )
    rests = [
        down_seconds(client, fits=True) + client.compute_seconds * (client.steps - 1) / client.steps
        for client in aligned.values()
    ]
    fits = sum(total(client, "compute_seconds", fits=True) for client in clients) - t.targets_seconds
    in_turn = first_arrival + fits / t.server_workers + min(rests)
    return max(bound, max(longest, in_turn) + t.averaging_seconds)


def drawn_round(
    draw: random.Random, asks: Callable[[int], Sequence[Ask]], replicas: bool, targets: bool
) -> RoundPieces:
    """Clients, ranks and links drawn at random.

    Args:
        asks: of a client with so many steps.
        targets: may lanes execute a part of the alignments?
    """
    ranks = draw.randint(1, 3)
    most = draw.choice(("compute", "server", "fits", "bytes"))  # of the round
    bytes = 200 if most == "bytes" else 20
    clients = []

    def heavy(piece: str) -> float:
        return 2.0 if piece == most else 0.2

    for id in range(draw.randint(ranks, 5)):
        steps = draw.randint(1, 5)

        def one(server: float, up: int, down: int) -> tuple[float, int, int]:
            return server * draw.random(), draw.randint(0, up), draw.randint(0, down)

        clients.append(
            client(
                *asks(steps),
                rank=id % ranks,
                steps=steps,
                compute=steps * heavy("compute") * draw.random(),
                push=one(heavy("server"), bytes, 0),
                exchange=one(heavy("server"), bytes, bytes),
                align=one(heavy("fits"), 0, bytes),
                begin=one(heavy("server"), 0, 0),
                collect=one(heavy("fits"), 0, bytes),
            )
        )
    sums = [each.of_kind["align"].compute_seconds for each in clients if "align" in each.of_kind]
    trip = draw.choice((0.0, 0.3))
    link = LinkSpeed(trip * draw.random(), draw.uniform(20, 500), draw.uniform(20, 500))
    return pieces(
        *clients,
        link=link,
        replicas=replicas,
        workers=draw.randint(1, 4),
        averaging=draw.choice((0.0, 0.5)),
        server_averaging=draw.choice((0.0, 2.0)),
        targets=sum(sums) * draw.random() if targets else 0.0,
    )


@pytest.mark.parametrize("name", ["fedavg", "splitfed_v1", "splitfed_v2", "cse_fsl", "fsl_sage"])
def test_it_is_never_below_a_bound_of_the_algorithms_own(name: str) -> None:
    draw = random.Random(name)
    for _ in range(400):
        every = 1 if name.startswith("splitfed") else draw.randint(1, 3)

        def asks(steps: int, every: int = every) -> list[Ask]:
            aligns = name == "fsl_sage" and draw.random() < 0.8
            return asks_of("aligned" if aligns else name, steps, every)

        round = drawn_round(draw, asks, replicas=name == "splitfed_v1", targets=True)
        if draw.random() < 0.5:  # a link of each rank's own
            links = {rank: LinkSpeed(*(draw.uniform(0.1, 90) for _ in range(3))) for rank in round.links}
            round = dataclasses.replace(round, links=links)
        assert bound_seconds(round) >= reference_bound(name, round) - 1e-9


TOGETHER = (
    *("push", "exchange", "align", "push push", "push align", "push exchange", "align push"),
    *("exchange align", "push push push align", "push exchange push"),
    *("push begin_alignment", "push collect", "collect push", "push collect begin_alignment", "collect"),
)
"""kinds that a step may ask"""


def drawn_asks(draw: random.Random, steps: int) -> list[Ask]:
    """Requests of any kind at every so many steps, or many uploads, and an alignment's at the last step."""
    if draw.random() < 0.2:
        last = draw.choice(("align", "begin_alignment", "collect"))
        return [*asks_of("cse_fsl", steps), Ask(steps - 1, last, at_once=draw.random() < 0.5)]
    return [
        Ask(step, kind, at_once=place > 0 and draw.random() < 0.5)
        for step in range(draw.randrange(2), steps, draw.randint(1, 3))
        for place, kind in enumerate(draw.choice(TOGETHER).split())
    ]


@pytest.mark.parametrize("replicas", [False, True])
def test_no_schedule_of_the_same_pieces_is_below_the_bound(replicas: bool) -> None:
    """The program's own order, with each step's compute anywhere before, between and behind its requests."""
    draw = random.Random(replicas)
    for _ in range(300):
        round = drawn_round(draw, lambda steps: drawn_asks(draw, steps), replicas, targets=False)
        share = draw.choice((draw.random, lambda: float(draw.randrange(2))))
        assert bound_seconds(round) <= simulated(round, draw.randint(1, 4), share) + 1e-9
