"""Predictions: simulated rounds that can be followed with a pencil, exact bytes, and the command."""

import copy
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import Tensor

from fslsage_rpc.algorithms import ALGORITHMS, Algorithm
from fslsage_rpc.algorithms.bound import NO_LINK, LinkSpeed
from fslsage_rpc.algorithms.fsl_sage import FslSage
from fslsage_rpc.algorithms.splitfed import SplitFedV2
from fslsage_rpc.bench.variants import variant_configs
from fslsage_rpc.config.loading import from_tree, to_tree
from fslsage_rpc.measure.phases import OF_CLIENTS
from fslsage_rpc.parties.client import Client
from fslsage_rpc.parties.requests import Ask, BeginStep, ClientStep, Exchange
from fslsage_rpc.plan.calibration import (
    HANDLING,
    SENDING,
    Calibration,
    _with_once,
    calibrate_here,
    measure_costs,
    read_calibration,
)
from fslsage_rpc.plan.run import link_speed, predictions
from fslsage_rpc.plan.scenario import Costs, Scenario, Work
from fslsage_rpc.plan.simulation import (
    INITIAL_WINDOW_BYTES,
    Connection,
    Machine,
    Prediction,
    RoundSimulation,
    Stretch,
    averaging_seconds,
    predict,
    stretches,
)
from support.commands import fslsage_on_ranks, said
from support.rank_program import train_locally
from support.trees import BENCH, merged
from support.user_input import mistake

LINK = LinkSpeed(round_trip_seconds=0.2, up_bytes_per_second=100.0, down_bytes_per_second=200.0)


def with_turns(mine: list[Stretch]) -> list[Stretch]:
    """Before each request its turn, as every request here is in a local step of its own."""
    return [
        each
        for one in mine
        for each in ((Stretch(0.0, BeginStep(one.then.step)), one) if isinstance(one.then, Ask) else (one,))
    ]


def simulate(
    *clients: list[Stretch],
    ranks: int = 1,
    replicas: bool = False,
    workers: int = 1,
    window: int = 4,
    cores: float = math.inf,
    handling: float = 0.0,
) -> float:
    name = "splitfed_v1" if replicas else "splitfed_v2"
    config = from_tree(merged(tree(name), {"comm": {"upload_window": window}}))
    scenario = Scenario(config, LINK, ranks, cores)
    mine = {client: with_turns(each) for client, each in enumerate(clients)}
    return RoundSimulation(scenario, Costs(handling=handling), workers, mine).run()[0]


def exchange(compute: float, turn: int = 0, server: float = 0.5) -> Stretch:
    return Stretch(compute, Ask(turn, "exchange", smashed_bytes=10, answer_bytes=20), server)


def push(compute: float, turn: int = 0, server: float = 0.5) -> Stretch:
    return Stretch(compute, Ask(turn, "push", smashed_bytes=10), server)


TRIP = 0.1 + 0.1 + 0.5 + 0.1 + 0.1  # half a round trip and 10 bytes up, the server, 20 bytes down


@pytest.mark.parametrize("clients", [34, 100])
def test_a_rank_gets_through_more_clients_than_may_have_steps_open(clients: int) -> None:
    alone = [[Stretch(1.0)] for _ in range(clients)]
    assert simulate(*alone, ranks=2) == pytest.approx(clients / 2)
    instant = [[exchange(1.0, server=0.0), Stretch(1.0)] for _ in range(clients)]
    assert simulate(*instant, ranks=2, replicas=True, workers=clients) >= clients


def test_a_client_alone_waits_for_every_answer() -> None:
    assert simulate([exchange(1.0), exchange(2.0, turn=1), Stretch(1.0)]) == pytest.approx(4.0 + 2 * TRIP)


def test_two_clients_of_a_rank_use_each_others_waits() -> None:
    clients = [[exchange(1.0), Stretch(1.0)], [exchange(1.0), Stretch(1.0)]]
    assert simulate(*clients, replicas=True, workers=2) == pytest.approx(
        4.0
    )  # 1's trip is over before 0 ends
    assert simulate(*clients, ranks=2, replicas=True, workers=2) == pytest.approx(2.0 + TRIP)


def test_one_lane_or_one_worker_takes_requests_one_by_one() -> None:
    clients = [[exchange(1.0, server=5.0), Stretch(1.0)] for _ in range(3)]
    one_by_one = 1.0 + 0.2 + 15.0 + 0.2 + 1.0
    assert simulate(*clients, ranks=3) == pytest.approx(one_by_one)
    assert simulate(*clients, ranks=3, replicas=True, workers=1) == pytest.approx(one_by_one)
    assert simulate(*clients, ranks=3, replicas=True, workers=3) == pytest.approx(one_by_one - 10.0)


def test_a_lane_waits_for_the_turn_that_is_due() -> None:
    late, early = [exchange(9.0), Stretch(0.0)], [exchange(1.0), Stretch(0.0)]
    assert simulate(late, early, ranks=2) == pytest.approx(9.0 + 0.2 + 0.5 + 0.5 + 0.2)  # client 0 is first


def test_uploads_overlap_until_the_window_is_full() -> None:
    def uploads(server: float) -> list[Stretch]:
        return [*(push(1.0, turn, server) for turn in range(3)), Stretch(1.0)]

    assert simulate(uploads(0.5)) == pytest.approx(4.0)  # the last is trained on before the client ends
    # Else the client has its answer half a round trip later.
    assert simulate(uploads(10.0)) == pytest.approx(1.0 + 0.2 + 30.0 + 0.1)
    # A window of one: each step begins when the upload before it is trained on, and takes a trip of its own.
    assert simulate(uploads(10.0), window=1) == pytest.approx(3 * (1.0 + 0.2 + 10.0 + 0.1))


def test_a_link_carries_one_transfer_at_a_time() -> None:
    big = [Stretch(0.0, Ask(0, "push", smashed_bytes=100)), Stretch(0.0)]
    assert simulate(big, big) == pytest.approx(2.0 + 0.2)
    assert simulate(big, big, ranks=2) == pytest.approx(1.0 + 0.2)


def test_a_connection_begins_with_a_small_window_after_every_rest() -> None:
    window, rate, trip = float(INITIAL_WINDOW_BYTES), 1e6, 0.1  # a round trip holds 100,000 bytes
    connection = Connection(rate, trip)
    assert connection.carry(0.0, window) == pytest.approx(window / rate)
    grown = connection.carry(0.1, 4 * window)  # now of two windows: one round trip, and two windows more
    assert grown == pytest.approx(0.1 + trip + 2 * window / rate)
    assert connection.carry(grown, 1e6) == pytest.approx(grown + trip + (1e6 - 6 * window) / rate)
    rested = connection.carry(10.0, 7 * window)  # 1 + 2 windows, a round trip each, and 4 that cover the rest
    assert rested == pytest.approx(10.0 + 2 * trip + 4 * window / rate)
    assert Connection(rate, 0.0).carry(0.0, 1e6) == pytest.approx(1.0)
    assert Connection(rate, trip, beside=16).carry(0.0, 1e6) == pytest.approx(1.0)


def test_an_averaging_soon_after_the_last_finds_fast_connections() -> None:
    scenario = Scenario(from_tree(tree("fedavg")), LinkSpeed(0.02, 12.5e6, 12.5e6), client_ranks=2)
    soon, late = (averaging_seconds(scenario, 1_000_000, rest) for rest in (0.1, 9.0))
    steps = 2 * (500_000 / 12.5e6 + 0.04)  # half of the bytes up one link and down another, which is 40 ms
    assert soon == pytest.approx(steps)
    assert late > steps + 3 * 0.04  # a connection that has rested begins with a small window


def test_ranks_on_one_machine_share_its_cores() -> None:
    alone = [[Stretch(1.0)], [Stretch(2.0)], [Stretch(4.0)]]
    assert simulate(*alone, ranks=3, cores=3) == pytest.approx(4.0)
    # On 2 cores at 2/3 of full speed until the first ends at 1.5; from then on each has a core.
    assert simulate(*alone, ranks=3, cores=2) == pytest.approx(1.5 + 3.0)
    # On one: 3 until the first ends, 2 more until the second does, the third's last 2.
    assert simulate(*alone, ranks=3, cores=1) == pytest.approx(7.0)
    lane = [[push(1.0, server=2.0), Stretch(2.0)], [Stretch(9.0)]]
    assert simulate(*lane, ranks=2, cores=2) > simulate(*lane, ranks=2) == pytest.approx(9.0)


def test_work_ends_however_coarse_the_clock_has_become() -> None:
    """After a day, a float's next second is further away than what rounding leaves of the work."""
    machine, ended = Machine(1.0), []

    def begin() -> None:
        for seconds in (0.1, 0.3):
            machine.work(seconds, lambda seconds=seconds: ended.append(seconds))

    machine.wait(1e5, begin)
    machine.run()
    assert ended == [0.1, 0.3]
    assert machine.now == pytest.approx(1e5 + 0.4, abs=1e-9)


def test_handling_a_request_takes_cores_that_others_want() -> None:
    one = [exchange(1.0), Stretch(1.0)]
    assert simulate(one, handling=0.9) == pytest.approx(2.0 + TRIP + 0.9)
    other = [Stretch(9.0)]  # on one core, which it shares with the first client's 2 + 0.5 + 0.9 of work
    assert simulate(one, other, ranks=2, cores=1, handling=0.9) == pytest.approx(9.0 + 2.0 + 0.5 + 0.9)


def tree(name: str, **keys: Any) -> dict[str, Any]:
    return {
        "rounds": 4,
        "device": "cpu",
        "clients": {"count": 3, "batch_size": 16},
        "data": {"test_limit": 20, "partition": "iid"},
        "algorithm": {"name": name, "upload_every": 2, "align_every": 2, "alignment": {"epochs": 2}, **keys},
    }


HERE = "test_plan"


class Mixed(FslSage):
    """Waits for a true gradient in every third local step, and is FSL-SAGE in the others."""

    def client_step(self, client: Client, round: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        if step % 3 != 1:
            yield from super().client_step(client, round, step, x, y)
            return
        z = client.forward(x)
        client.backward(z, (yield Exchange(z, y)))


class Seldom(FslSage):
    """Aligns in every fourth round, whatever the configuration says."""

    interval = 4

    def aligns(self, client: int, round: int) -> bool:
        return round % 4 == 3


class Renamed(SplitFedV2):
    """Another name, and nothing else."""


class Adaptive(SplitFedV2):
    """Asks by values: nobody may try."""

    requests_depend_on_values = True

    def client_step(self, client: Client, round: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        raise AssertionError("it was rehearsed, or trained")


class Idle(Algorithm):
    """Every second local step is left out."""

    def client_step(self, client: Client, round: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        if step % 2 == 0:
            z = client.forward(x)
            client.backward(z, (yield Exchange(z, y)))


def own(kind: type) -> str:
    return f"{HERE}:{kind.__name__}"


def prediction_of(config: dict[str, Any], costs: Costs, link: LinkSpeed = LINK) -> Prediction:
    ranks = from_tree(config).clients.count
    found = predict(Scenario(from_tree(config), link, ranks), costs, server_workers=3)
    assert isinstance(found, Prediction)
    return found


@pytest.mark.parametrize("name", [*ALGORITHMS, own(Mixed), own(Idle)])
def test_bytes_are_those_that_a_run_moves(name: str) -> None:
    keys = merged(tree(name), {"data": {"train_limit": 400}})
    lines = train_locally(keys).lines[2:]
    scenario = Scenario(from_tree(keys), NO_LINK, client_ranks=1)
    predicted = predict(scenario, measure_costs(lines, scenario, [1]), server_workers=2)
    assert isinstance(predicted, Prediction)
    kinds = ("smashed_up", "labels_up", "gradient_down", "auxiliary_down", "weights_allreduce")
    interval = lines[: scenario.algorithm.interval]
    moved = sum(line["wire_bytes"][kind] for line in interval for kind in kinds) / len(interval)
    assert predicted.wire_bytes == moved
    assert predicted.paper_bytes == sum(line["paper_bytes"] for line in interval) / len(interval)


def test_another_name_changes_no_prediction() -> None:
    costs = Costs(Work(1e-3, 1e-4), Work(0.0, 2e-4), Work(), 3e-4, 4e-4, 5e-4)
    assert prediction_of(tree(own(Renamed)), costs) == prediction_of(tree("splitfed_v2"), costs)


def test_a_local_step_costs_its_mean_whatever_it_calls() -> None:
    scenario = Scenario(from_tree(tree(own(Idle))), LINK, client_ranks=3)
    sizes = scenario.federation.batch_sizes[0]
    found = stretches(scenario, Costs(Work(0.0, 3.0)), 0, scenario.round(0))
    assert [type(each.then) for each in found] == [BeginStep, Ask] * math.ceil(len(sizes) / 2) + [type(None)]
    # A forward pass is a third of a step; its other two thirds and all of the next step come behind.
    before = [0.0, *(2 * done + 3 * left_out for done, left_out in zip(sizes[::2], sizes[1::2], strict=True))]
    computes = [seconds for wait, size in zip(before, sizes[::2], strict=False) for seconds in (wait, size)]
    assert [each.seconds for each in found] == pytest.approx([*computes, before[-1]])


def test_requests_that_nobody_has_measured_cost_nobody_knows_what() -> None:
    config = from_tree(tree("fsl_sage"))
    costs = Costs(Work(1e-4), Work(1e-4), kinds={"push"})
    calibration = Calibration({"fsl_sage": costs, "cse_fsl": costs, "fedavg": "why"}, LINK, 2)
    found = predictions(config, calibration, lambda each: Scenario(each, LINK, 3))
    assert found["fsl_sage"] == "it makes requests of a kind that was not measured"  # there was no alignment
    assert isinstance(found["cse_fsl"], Prediction)
    assert found["fedavg"] == "why"


def test_each_alignment_and_step_costs_something_whatever_it_holds() -> None:
    """Half as large batches are twice as many steps, each with the part that does not grow."""
    costs = Costs(client=Work(once=1.0))
    seconds = [
        prediction_of(merged(tree("fedavg"), {"clients": {"batch_size": size}}), costs, NO_LINK).round_seconds
        for size in (16, 8)
    ]
    assert seconds == [30.0, 60.0]  # 479 samples of a client


def test_a_partition_file_says_how_many_samples_there_are(tmp_path: Path) -> None:
    path = tmp_path / "parts.json"
    path.write_text("[[0, 1, 2], [3, 4, 5], [6, 7]]")
    keys = {"data": {"partition": "file", "partition_file": str(path)}}
    config = from_tree(merged(tree("fedavg"), keys))
    scenario = Scenario(config, LINK, 1)
    assert sum(map(sum, scenario.federation.batch_sizes)) == 8 * config.clients.local_epochs


def test_costs_are_per_sample_and_request() -> None:
    scenario = Scenario(from_tree(tree("fsl_sage", average_auxiliary="never")), LINK, client_ranks=2)
    samples = 1437
    uploaded = sum(sum(sizes[::2]) for sizes in scenario.federation.batch_sizes)
    buffered = sum(sum(each) for each in scenario.round(2).aligned.values())
    size = scenario.sizes.smashed + 8
    client = {"data": 1.0, "forward_backward": 2.0, "estimate": 3.0, "upload_wait": 0.4, "averaging": 5.0}
    line = {
        "round": 3,
        "round_seconds": 1.0,
        "phases": {"client": {"averaging": 0.0}},
        "cpu_seconds": {
            # On two threads an operation: 2 x 10 for requests, 2.6 beside; 2 x 2 x 6, 2 x 0.9 and 1.3 beside.
            "ranks": [22.6, 13.3, 13.8],
            "client": {**client, "averaging": 0.0, "other": 0.5},
        },
        "requests": {
            "push": {"count": 10, "cpu_seconds": 4.0, "up_bytes": uploaded * size},
            "align": {"count": 3, "cpu_seconds": 6.0, "up_bytes": 0},
        },
    }
    costs = measure_costs([line], scenario, [2, 2, 2])
    assert costs.client == pytest.approx((0.0, 2 * 6.0 / samples, 479 / 30))
    assert costs.server.per_sample == pytest.approx(4.0 / uploaded)
    assert costs.alignment.per_sample == pytest.approx(6.0 / buffered)
    assert costs.sending == pytest.approx(2 * 0.9 / 13)
    assert costs.handling == pytest.approx((1.3 + 2.6) / 13)


def test_uploads_and_exchanges_cost_the_server_the_same_a_sample() -> None:
    scenario = Scenario(from_tree(tree(own(Mixed))), NO_LINK, client_ranks=1)
    samples = {
        kind: sum(
            ask.samples
            for client in scenario.round(2).clients.values()
            for ask in client.asks
            if ask.kind == kind
        )
        for kind in ("push", "exchange")
    }
    batches = scenario.federation.batch_sizes
    assert samples["exchange"] == sum(sum(sizes[1::3]) for sizes in batches)
    assert samples["push"] == sum(sum(sizes[::6]) + sum(sizes[2::6]) for sizes in batches)
    size = scenario.sizes.smashed + 8
    phases = dict.fromkeys(("data", "forward_backward", "estimate", "averaging"), 0.0)
    line = {
        "round": 3,
        "round_seconds": 1.0,
        "phases": {"client": phases},
        "cpu_seconds": {"ranks": [13.0], "client": phases},
        "requests": {
            "push": {"count": 10, "cpu_seconds": 4.0, "up_bytes": samples["push"] * size},
            "exchange": {"count": 10, "cpu_seconds": 3.0, "up_bytes": samples["exchange"] * size},
            "align": {"count": 3, "cpu_seconds": 6.0, "up_bytes": 0},
        },
    }
    costs = measure_costs([line], scenario, [1])
    assert costs.server.per_sample == pytest.approx(7.0 / sum(samples.values()))
    aligned = scenario.round(2).aligned
    assert costs.alignment.samples == statistics.fmean(
        samples for each in aligned.values() for samples in each
    )
    assert costs.alignment.per_sample == pytest.approx(6.0 / (3 * costs.alignment.samples))
    assert costs.kinds == {"push", "exchange", "align"}


def test_waiting_for_a_core_is_no_cost() -> None:
    """Rounds in which others had the cores take longer, and come to the same costs."""
    keys = merged(tree("fsl_sage"), {"data": {"train_limit": 400}})
    lines = train_locally(keys).lines[2:]
    scenario = Scenario(from_tree(keys), NO_LINK, client_ranks=1)
    slow = copy.deepcopy(lines)
    for line in slow:
        line["round_seconds"] *= 3
        for seconds in (line["phases"]["client"], line["phases"]["server"], *line["requests"].values()):
            for key in seconds.keys() & {*OF_CLIENTS, "step", "alignment", "compute_seconds"}:
                seconds[key] *= 1 if key == "averaging" else 3
    assert measure_costs(slow, scenario, [1]) == measure_costs(lines, scenario, [1])


def test_a_plan_is_of_the_middle_of_its_run() -> None:
    """By then alignment buffers hold more than in the first rounds."""
    costs = Costs(alignment=Work(0.0, 1.0))
    buffer = {"alignment": {"epochs": 2, "buffer_size": 10_000}}
    first, second, third, last = (
        prediction_of({**tree("fsl_sage", **buffer), "rounds": rounds}, costs, NO_LINK).round_seconds
        for rounds in (1, 4, 5, 8)
    )
    assert first == second == third  # the second interval, or what would be
    uploaded = 15 * 16  # a client's uploads in each round, as its last batch is not uploaded
    assert last - second == pytest.approx(2 * uploaded / 2, rel=1e-6)


def test_a_slow_link_is_what_splitfed_waits_for() -> None:
    costs = Costs(*[Work(0.0, 1e-4)] * 3)
    slow = LinkSpeed(0.04, 2.5e6, 2.5e6)
    seconds = {
        name: prediction_of(tree(name), costs, slow).round_seconds
        for name in ("fsl_sage", "splitfed_v1", "splitfed_v2")
    }
    batches = 30  # of each client
    wire = batches * 0.04 + 2 * 479 * 2 * 2 * 64 * 4 / 2.5e6 + 479 * 8 / 2.5e6
    begun_anew = 3 * 0.08 - 7 * INITIAL_WINDOW_BYTES / 2.5e6  # three windows before one covers a round trip
    ring = begun_anew + 4 * (2 * 0.04 + 103_232 * 4 / 3 / 2.5e6)
    barriers = (2 + 2) * 0.04
    assert seconds["splitfed_v1"] == pytest.approx(wire + 479 * 2e-4 + ring + barriers, rel=0.02)
    assert seconds["fsl_sage"] < seconds["splitfed_v1"] / 2


@pytest.mark.parametrize(
    ("bandwidth", "rtt", "message"),
    [
        ("fast", None, "--bandwidth: got 'fast', expected a number with kbit, mbit, gbit, as 100mbit"),
        ("100mb", None, "--bandwidth: got '100mb', "),
        (None, "20", "--rtt: got '20', expected a number with us, ms, s, as 20ms"),
        (None, "0ms", "--rtt: got '0ms', "),
        (None, "1.2.3ms", "--rtt: got '1.2.3ms', "),
    ],
)
def test_a_wrong_link_is_refused(bandwidth: str | None, rtt: str | None, message: str) -> None:
    assert mistake(link_speed, LINK, bandwidth, rtt).startswith(message)


def test_a_link_is_as_measured_but_for_what_is_asked() -> None:
    assert link_speed(LINK, None, "30ms") == LinkSpeed(0.03, 100.0, 200.0)
    assert link_speed(LINK, "8mbit", None) == LinkSpeed(0.2, 1e6, 1e6)


def test_the_command_calibrates_this_machine_and_says_that_it_predicts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    config = tmp_path / "small.yaml"
    config.write_text("device: cpu\nclients: {batch_size: 16}\nalgorithm: {alignment: {epochs: 2}}\n")
    links = ("--bandwidth", "100mbit", "--rtt", "20ms", "--clients", "10,100")
    done = said(capsys, "plan", config, *links, f"algorithm.name={own(Adaptive)}")
    assert done.returncode == 0, done.stderr
    assert "PREDICTED" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if line.split()[1:2] in (["10"], ["100"])]
    known = [[name, count] for name in ALGORITHMS for count in ("10", "100")]
    assert [row[:2] for row in rows[:-2]] == known
    assert all(float(row[2]) > 0 for row in rows[:-2])
    assert rows[-2:] == [[own(Adaptive), count, *["unknown"] * 3] for count in ("10", "100")]
    assert done.stdout.splitlines()[-1] == f"{own(Adaptive)}: unknown, as its requests depend on values"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clients", "ten"], "--clients: got 'ten', expected whole numbers from 1 on"),
        (["--client-ranks", "2,4"], "--client-ranks: got '2,4', expected a whole number from 1 on"),
        ([], "--bandwidth, --rtt: got none, expected both, or --calibrate with a benchmark"),
        (["--rtt", "20ms"], "--bandwidth, --rtt: got one, expected both, or --calibrate with a benchmark"),
        (["--calibrate", "nowhere"], "--calibrate: got nowhere, expected the folder of a complete benchmark"),
    ],
)
def test_a_wrong_plan_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "small.yaml").write_text("")
    done = said(capsys, "plan", tmp_path / "small.yaml", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"fslsage_rpc: {message}")
    assert len(done.stderr.splitlines()) == 1


def test_costs_of_this_machine_hold_no_transport_and_each_partys_own_seconds() -> None:
    config = from_tree(
        {
            "device": "cpu",
            "clients": {"count": 8, "minimum": 3, "batch_size": 16},
            "algorithm": {"alignment": {"epochs": 5}},
        }
    )
    names = [*ALGORITHMS, own(Mixed), own(Seldom), own(Adaptive)]
    costs = calibrate_here(config, names).costs
    assert list(costs) == names
    assert costs.pop(own(Adaptive)) == "its requests depend on values"
    for each in costs.values():
        assert (each.sending, each.handling) == (SENDING, HANDLING)  # here a call holds the server's work
        assert 0 < each.client.seconds(16) < 1.6
    for name in ("fsl_sage", own(Mixed), own(Seldom)):
        assert costs[name].alignment.seconds(100) > 0
    assert costs[own(Mixed)].kinds == {"push", "exchange", "align"}
    assert costs["fedavg"].server == Work()


def test_small_work_tells_what_does_not_grow_with_the_samples() -> None:
    """Steps of 0.2 s and 0.03 s a sample; what was measured of the whole stays."""
    whole, small = Work(0.0, (0.2 + 0.03 * 40) / 40, 40), Work(0.0, (0.2 + 0.03 * 4) / 4, 4)
    assert _with_once(whole, small) == pytest.approx((0.2, 0.03, 40))
    assert _with_once(whole, Work(0.0, 1.0, 4)) == pytest.approx((1.4, 0.0, 40))  # never less than nothing
    assert _with_once(whole, Work(0.0, 1e-9, 4)) == pytest.approx(whole)  # and never more than all
    assert _with_once(whole, Work()) == _with_once(whole, whole) == whole


NOT_READ = (own(Adaptive), "nowhere:Away")


def bench_folder(folder: Path, variants: dict[str, list[str]]) -> Path:
    """The folder of a benchmark of these variants, whose rounds were trained in this process."""
    keys = merged(tree("fsl_sage"), {"data": {"train_limit": 400}})
    bench = {"variants": variants, "reference": next(iter(variants)), "repeats": 1, "warmup_rounds": 2}
    config = from_tree({**keys, "bench": bench})
    (folder / "rounds").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_tree(config)))
    for name, variant in variant_configs(config).items():
        if variant.algorithm.name not in NOT_READ:
            lines = train_locally(to_tree(variant)).lines
            (folder / "rounds" / f"{name}-0.jsonl").write_text("\n".join(map(json.dumps, lines)))
    environment = {
        "link_speeds": [{"1": vars(LINK)}],
        "ranks": [{"host": "one", "cores": 2, "threads": 1}] * 2,
    }
    (folder / "bench.json").write_text(json.dumps({"environment": environment, "variants": {}}))
    return folder


def test_a_benchmark_calibrates_algorithms_of_the_users_own(tmp_path: Path) -> None:
    mixed = f"algorithm.name={own(Mixed)}"
    adaptive = [f"algorithm.name={own(Adaptive)}", "server.order=arrival"]
    variants = {
        "mixed": [mixed],
        "more_passes": [mixed, "algorithm.alignment.epochs=3"],
        "adaptive": adaptive,
        "away": ["algorithm.name=nowhere:Away"],
        "splitfed": ["algorithm.name=splitfed_v2"],
    }
    folder = bench_folder(tmp_path / "some", variants)

    def read(name: str, **keys: Any) -> dict[str, Costs | str]:
        return dict(read_calibration(folder, from_tree(tree(name, **keys))).costs)

    found = read(own(Mixed))
    assert {*found} == {own(Mixed), *NOT_READ, "splitfed_v2"}
    assert found[own(Mixed)].kinds == {"push", "exchange", "align"}
    assert found[own(Adaptive)] == "its requests depend on values"
    assert found["nowhere:Away"].startswith("algorithm.name: got 'nowhere:Away', which cannot be")
    more = read(own(Mixed), alignment={"epochs": 3})  # of the second variant
    per_sample, per_more = (each[own(Mixed)].alignment.seconds(100) for each in (found, more))
    assert per_more != per_sample
    other = f"--calibrate: got {folder}, which measured algorithm.alignment.epochs=2, expected 7 as planned"
    assert mistake(lambda: read(own(Mixed), alignment={"epochs": 7})) == other
    planned = read("splitfed_v2", alignment={"epochs": 7})
    assert planned[own(Mixed)] == other
    assert isinstance(planned["splitfed_v2"], Costs)
    assert read("fedavg")["fedavg"] == f"{folder} has no variant of it"
    only = bench_folder(tmp_path / "only", {"adaptive": adaptive})
    assert read_calibration(only, from_tree(tree(own(Adaptive)))).costs == {
        own(Adaptive): "its requests depend on values"
    }


@pytest.mark.nightly
def test_a_benchmark_calibrates_its_own_model_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(yaml.safe_dump({**BENCH, "output": str(tmp_path)}, sort_keys=False))
    fslsage_on_ranks(2, tmp_path, "bench", config)
    folder = tmp_path / "small"
    planned = said(capsys, "plan", config, "--calibrate", folder, "--clients", "2,8")
    assert planned.returncode == 0, planned.stderr
    assert sum(line.split()[:1] == ["fsl_sage"] for line in planned.stdout.splitlines()) == 2
    other = said(capsys, "plan", config, "model.name=resnet18", "--calibrate", folder)
    assert other.returncode == 2
    assert (
        f"--calibrate: got {folder}, which measured model.name=simple_conv, expected resnet18" in other.stderr
    )
    for key in ("algorithm.alignment.epochs", "model.auxiliary.width"):
        other = said(capsys, "plan", config, f"{key}=77", "--calibrate", folder)
        assert (other.returncode, f"{key}=" in other.stderr, "expected 77" in other.stderr) == (2, True, True)
    many = said(capsys, "plan", config, "--calibrate", folder, "--clients", "97")
    assert "--clients: got 97, expected at most 96, the training samples" in many.stderr
    (folder / "rounds" / "fsl_sage-0.jsonl").unlink()
    broken = said(capsys, "plan", config, "--calibrate", folder)
    assert "expected the folder of a complete benchmark" in broken.stderr
