"""Predictions: simulated rounds that can be followed with a pencil, exact bytes, and the command."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from fslsage_rpc.configuration import from_tree
from fslsage_rpc.critical_path import NO_LINK, LinkSpeed
from fslsage_rpc.plan.calibration import on_cores_of_their_own
from fslsage_rpc.plan.cores import Cores
from fslsage_rpc.plan.costs import Costs, measure_costs
from fslsage_rpc.plan.prediction import predict, simulation_of
from fslsage_rpc.plan.run import calibrate_here, link_speed
from fslsage_rpc.plan.scenario import Scenario
from fslsage_rpc.plan.simulation import RoundSimulation, Step
from fslsage_rpc.plan.wire import INITIAL_WINDOW_BYTES, Connection
from support.commands import fslsage_on_ranks, said
from support.rank_program import train_locally
from support.trees import BENCH, merged
from support.user_input import mistake

LINK = LinkSpeed(round_trip_seconds=0.2, up_bytes_per_second=100.0, down_bytes_per_second=200.0)


def with_turns(steps: list[Step]) -> list[Step]:
    """Before each request its turn, as every request here is in a local step of its own."""
    return [s for step in steps for s in ((Step(0.0, "turn", step.turn), step) if step.kind else (step,))]


def simulate(
    *clients: list[Step],
    ranks: int = 1,
    replicas: bool = False,
    workers: int = 1,
    window: int = 4,
    cores: float = math.inf,
) -> float:
    simulation = RoundSimulation(
        steps={client: with_turns(steps) for client, steps in enumerate(clients)},
        lane_of={client: client if replicas else 0 for client in range(len(clients))},
        ranks=ranks,
        link=LINK,
        workers=workers,
        window=window,
        sending_seconds=0.0,
        handling_seconds=0.0,
        shared_cores=cores,
    )
    return max(simulation.run())


def exchange(compute: float, turn: int = 0, server: float = 0.5) -> Step:
    return Step(compute, "exchange", turn, server, up_bytes=10, down_bytes=20)


def push(compute: float, turn: int = 0, server: float = 0.5) -> Step:
    return Step(compute, "push", turn, server, up_bytes=10)


TRIP = 0.1 + 0.1 + 0.5 + 0.1 + 0.1  # half a round trip and 10 bytes up, the server, 20 bytes down


@pytest.mark.parametrize("clients", [34, 100])
def test_a_rank_gets_through_more_clients_than_may_have_steps_open(clients: int) -> None:
    alone = [[Step(1.0)] for _ in range(clients)]
    assert simulate(*alone, ranks=2) == pytest.approx(clients / 2)
    instant = [[exchange(1.0, server=0.0), Step(1.0)] for _ in range(clients)]
    assert simulate(*instant, ranks=2, replicas=True, workers=clients) >= clients


def test_a_client_alone_waits_for_every_answer() -> None:
    assert simulate([exchange(1.0), exchange(2.0, turn=1), Step(1.0)]) == pytest.approx(4.0 + 2 * TRIP)


def test_two_clients_of_a_rank_use_each_others_waits() -> None:
    clients = [[exchange(1.0), Step(1.0)], [exchange(1.0), Step(1.0)]]
    assert simulate(*clients, replicas=True, workers=2) == pytest.approx(
        4.0
    )  # 1's trip is over before 0 ends
    assert simulate(*clients, ranks=2, replicas=True, workers=2) == pytest.approx(2.0 + TRIP)


def test_one_lane_or_one_worker_takes_requests_one_by_one() -> None:
    clients = [[exchange(1.0, server=5.0), Step(1.0)] for _ in range(3)]
    one_by_one = 1.0 + 0.2 + 15.0 + 0.2 + 1.0
    assert simulate(*clients, ranks=3) == pytest.approx(one_by_one)
    assert simulate(*clients, ranks=3, replicas=True, workers=1) == pytest.approx(one_by_one)
    assert simulate(*clients, ranks=3, replicas=True, workers=3) == pytest.approx(one_by_one - 10.0)


def test_a_lane_waits_for_the_turn_that_is_due() -> None:
    late, early = [exchange(9.0), Step(0.0)], [exchange(1.0), Step(0.0)]
    assert simulate(late, early, ranks=2) == pytest.approx(9.0 + 0.2 + 0.5 + 0.5 + 0.2)  # client 0 is first


def test_uploads_overlap_until_the_window_is_full() -> None:
    def uploads(server: float) -> list[Step]:
        return [*(push(1.0, turn, server) for turn in range(3)), Step(1.0)]

    assert simulate(uploads(0.5)) == pytest.approx(4.0)  # the last is trained on before the client ends
    assert simulate(uploads(10.0)) == pytest.approx(1.0 + 0.2 + 30.0)
    # A window of one: each step begins when the upload before it is trained on, and takes a trip of its own.
    assert simulate(uploads(10.0), window=1) == pytest.approx(3 * (1.0 + 0.2 + 10.0) + 2 * 0.1)


def test_a_link_carries_one_transfer_at_a_time() -> None:
    big = [Step(0.0, "push", 0, 0.0, up_bytes=100), Step(0.0)]
    assert simulate(big, big) == pytest.approx(2.0 + 0.1)
    assert simulate(big, big, ranks=2) == pytest.approx(1.0 + 0.1)


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
    assert Connection(rate, trip, lanes=16).carry(0.0, 1e6) == pytest.approx(1.0)


def test_ranks_on_one_machine_share_its_cores() -> None:
    alone = [[Step(1.0)], [Step(2.0)], [Step(4.0)]]
    assert simulate(*alone, ranks=3, cores=3) == pytest.approx(4.0)
    # On 2 cores at 2/3 of full speed until the first ends at 1.5; from then on each has a core.
    assert simulate(*alone, ranks=3, cores=2) == pytest.approx(1.5 + 3.0)
    # On one: 3 until the first ends, 2 more until the second does, the third's last 2.
    assert simulate(*alone, ranks=3, cores=1) == pytest.approx(7.0)
    lane = [[push(1.0, server=2.0), Step(2.0)], [Step(9.0)]]
    assert simulate(*lane, ranks=2, cores=2) > simulate(*lane, ranks=2) == pytest.approx(9.0)


def test_tasks_end_however_coarse_the_clock_has_become() -> None:
    """After a day, a float's next second is further away than what rounding leaves of a task."""
    now, ended = 1e5, []
    events: list[tuple[float, Callable[[], None]]] = []
    cores = Cores(1.0, lambda: now, lambda seconds, happen: events.append((now + seconds, happen)))
    for seconds in (0.1, 0.3):
        cores.run("client", seconds, lambda seconds=seconds: ended.append(seconds))
    for _ in range(9):
        if events:
            now, happen = events.pop(events.index(min(events, key=lambda event: event[0])))
            happen()
    assert ended == [0.1, 0.3]
    assert now == pytest.approx(1e5 + 0.4, abs=1e-9)
    assert cores.work == {"client": pytest.approx(0.4)}


@pytest.mark.parametrize("name", ["fsl_sage", "splitfed_v1", "splitfed_v2", "fedavg"])
def test_costs_on_cores_of_their_own_give_what_was_measured_on_shared_ones(name: str) -> None:
    config = from_tree(tree(name))
    scenario = Scenario(config, LinkSpeed(1e-3, 1e9, 1e9), client_ranks=3, shared_cores=2.0)
    true = Costs(2e-3, 1e-3, 1e-3, 0.0, 0.0, 0.0)
    work: dict[str, float] = {}
    spent: dict[str, float] = {}
    for round in (2, 3) if name == "fsl_sage" else (1,):  # as the program would measure them
        simulation = simulation_of(scenario, true, 2, round)
        simulation.run()
        for kind, seconds in simulation.cores.work.items():
            work[kind] = work.get(kind, 0.0) + seconds
            spent[kind] = spent.get(kind, 0.0) + simulation.cores.spent[kind]
    slow = {kind: spent[kind] / work[kind] for kind in work}
    measured = replace(
        true,
        client_per_sample=true.client_per_sample * slow["client"],
        server_per_sample=true.server_per_sample * slow.get("lane", 1.0),
        alignment_per_sample=true.alignment_per_sample * slow.get("fit", 1.0),
    )
    found = on_cores_of_their_own(measured, scenario, 2)
    assert found.client_per_sample == pytest.approx(true.client_per_sample, rel=0.02)
    assert found.server_per_sample == pytest.approx(true.server_per_sample, rel=0.02)
    assert found.alignment_per_sample == pytest.approx(true.alignment_per_sample, rel=0.02)
    assert on_cores_of_their_own(true, Scenario(config, LINK, client_ranks=3), 2) is true


def tree(name: str, **keys: Any) -> dict[str, Any]:
    return {
        "rounds": 4,
        "device": "cpu",
        "clients": {"count": 3, "batch_size": 16},
        "data": {"test_limit": 20, "partition": "iid"},
        "algorithm": {"name": name, "upload_every": 2, "align_every": 2, "alignment": {"epochs": 2}, **keys},
    }


@pytest.mark.parametrize("name", ["fsl_sage", "cse_fsl", "splitfed_v1", "splitfed_v2", "fedavg"])
def test_bytes_are_those_that_a_run_moves(name: str) -> None:
    keys = merged(tree(name), {"data": {"train_limit": 400}})
    lines = train_locally(keys).lines[2:]
    scenario = Scenario(from_tree(keys), NO_LINK, client_ranks=1)
    predicted = predict(scenario, measure_costs(lines, scenario), server_workers=2)
    kinds = ("smashed_up", "labels_up", "gradient_down", "auxiliary_down", "weights_allreduce")
    interval = lines if name == "fsl_sage" else lines[:1]
    moved = sum(line["wire_bytes"][kind] for line in interval for kind in kinds) / len(interval)
    assert predicted.wire_bytes == moved
    assert predicted.paper_bytes == sum(line["paper_bytes"] for line in interval) / len(interval)


def test_a_partition_file_says_how_many_samples_there_are(tmp_path: Path) -> None:
    path = tmp_path / "parts.json"
    path.write_text("[[0, 1, 2], [3, 4, 5], [6, 7]]")
    keys = {"data": {"partition": "file", "partition_file": str(path)}}
    config = from_tree(merged(tree("fedavg"), keys))
    scenario = Scenario(config, LINK, 1)
    assert scenario.round(0).samples == 8 * config.clients.local_epochs


def test_costs_are_per_sample_and_request() -> None:
    scenario = Scenario(from_tree(tree("fsl_sage", average_auxiliary="never")), LINK, client_ranks=2)
    samples = 1437
    uploaded = sum(sum(sizes[::2]) for sizes in scenario.federation.batch_sizes)
    buffered = sum(scenario.round(2).aligned.values())
    size = scenario.sizes.smashed + 8
    line = {
        "round": 3,
        "phases": {
            "client": {"data": 1.0, "forward_backward": 2.0, "estimate": 3.0, "other": 0.5, "averaging": 0.0}
        },
        "requests": {
            "push": {
                "count": 10,
                "compute_seconds": 4.0,
                "wire_seconds": 10 * 0.5 + uploaded * size / 100 + 10 * 0.2,
                "send_seconds": 10 * 0.2,
                "up_bytes": uploaded * size,
                "down_bytes": 0,
            },
            "align": {
                "count": 3,
                "compute_seconds": 6.0,
                "wire_seconds": 3 * 0.5 + 3 * 0.2 + 1.0,
                "send_seconds": 3 * 0.2,
                "up_bytes": 0,
                "down_bytes": 200,
            },
        },
    }
    costs = measure_costs([line], scenario)
    assert costs.client_per_sample == pytest.approx(2 * 6.5 / samples)
    assert costs.server_per_sample == pytest.approx(4.0 / uploaded)
    assert costs.alignment_per_sample == pytest.approx(6.0 / buffered)
    assert (costs.sending, costs.handling) == pytest.approx((0.2, 0.3))


def test_a_slow_link_is_what_splitfed_waits_for() -> None:
    costs = Costs(1e-4, 1e-4, 1e-4, 0.0, 0.0, 0.0)
    slow = LinkSpeed(0.04, 2.5e6, 2.5e6)
    seconds = {
        name: predict(Scenario(from_tree(tree(name)), slow, client_ranks=3), costs, 2).round_seconds
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
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "small.yaml"
    config.write_text("device: cpu\nclients: {batch_size: 16}\nalgorithm: {alignment: {epochs: 2}}\n")
    done = said(
        capsys, "plan", config, "--bandwidth", "100mbit", "--rtt", "20ms", "--clients", "10,100", "seed=1"
    )
    assert done.returncode == 0, done.stderr
    assert "PREDICTED" in done.stdout
    rows = [line.split()[:2] for line in done.stdout.splitlines() if line.strip().startswith(("f", "s", "c"))]
    names = ("fsl_sage", "splitfed_v1", "splitfed_v2", "cse_fsl", "fedavg")
    assert sorted(map(tuple, rows)) == sorted((name, count) for name in names for count in ("10", "100"))


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
    calibration = calibrate_here(config)
    for costs in calibration.costs.values():
        assert costs.sending == costs.handling == 0  # the call that sends holds the server's own work here
        assert 0 < costs.client_per_sample < 0.1
    assert calibration.costs["fsl_sage"].alignment_per_sample > 0
    assert calibration.costs["fedavg"].server_per_sample == 0


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
    assert f"--calibrate: {folder} measured model.name=simple_conv, expected resnet18" in other.stderr
    for key in ("algorithm.alignment.epochs", "data.tokens"):
        other = said(capsys, "plan", config, f"{key}=77", "--calibrate", folder)
        assert (other.returncode, f"{key}=" in other.stderr, "expected 77" in other.stderr) == (2, True, True)
    many = said(capsys, "plan", config, "--calibrate", folder, "--clients", "97")
    assert "--clients: got 97, expected at most 96, the training samples" in many.stderr
    (folder / "rounds" / "fsl_sage-0.jsonl").unlink()
    broken = said(capsys, "plan", config, "--calibrate", folder)
    assert "expected the folder of a complete benchmark" in broken.stderr
