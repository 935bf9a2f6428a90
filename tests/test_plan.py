"""Predictions: lower bounds that can be followed with a pencil, exact bytes, and the command."""

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
from fslsage_rpc.config.loading import from_tree, to_tree
from fslsage_rpc.config.variants import bench_variants
from fslsage_rpc.measure.phases import OF_CLIENTS
from fslsage_rpc.parties.client import Client
from fslsage_rpc.parties.requests import ClientStep, Exchange
from fslsage_rpc.plan.calibration import (
    HANDLING,
    SENDING,
    Calibration,
    calibrate_here,
    efficiency,
    measure_costs,
    read_calibration,
)
from fslsage_rpc.plan.prediction import Prediction, predict
from fslsage_rpc.plan.run import link_speed, predictions
from fslsage_rpc.plan.scenario import Costs, Scenario
from support.commands import fslsage_on_ranks, said
from support.rank_program import train_locally
from support.trees import ALGORITHM, BENCH, merged
from support.user_input import mistake

LINK = LinkSpeed(round_trip_seconds=0.2, up_bytes_per_second=100.0, down_bytes_per_second=200.0)
WAN = LinkSpeed(0.04, 2.5e6, 2.5e6)
SAMPLES, BATCHES = 479, 30
"""of each client in `tree`"""


def tree(name: str, **keys: Any) -> dict[str, Any]:
    return {
        "rounds": 4,
        "device": "cpu",
        "clients": {"count": 3, "batch_size": 16},
        "data": {"test_limit": 20, "partition": "iid"},
        "algorithm": {
            "name": name,
            **ALGORITHM,
            "alignment": {"epochs": 2},
            **keys,
        },
    }


HERE = "test_plan"


class Mixed(FslSage):
    """Waits for a true gradient in every third local step, and is FSL-SAGE in the others."""

    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        if step % 3 != 1:
            yield from super().client_step(client, t, step, x, y)
            return
        z = client.forward(x)
        client.backward(z, (yield Exchange(z, y)))


class Seldom(FslSage):
    """Aligns in every fourth round, whatever the configuration says."""

    interval = 4

    def aligns(self, client: int, t: int) -> bool:
        return t % 4 == 3


class Renamed(SplitFedV2):
    """Another name, and nothing else."""


class Adaptive(SplitFedV2):
    """Asks by values: nobody may try."""

    requests_depend_on_values = True

    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        raise AssertionError("it was rehearsed, or trained")


class Idle(Algorithm):
    """Every second local step is left out."""

    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        if step % 2 == 0:
            z = client.forward(x)
            client.backward(z, (yield Exchange(z, y)))


def own(kind: type) -> str:
    return f"{HERE}:{kind.__name__}"


def prediction_of(
    config: dict[str, Any],
    costs: Costs,
    link: LinkSpeed = LINK,
    ranks: int | None = None,
    cores: float = math.inf,
) -> Prediction:
    scenario = Scenario(from_tree(config), link, ranks or from_tree(config).clients.count, cores)
    found = predict(scenario, costs, server_workers=3)
    assert isinstance(found, Prediction)
    return found


def averaging(name: str) -> float:
    """Three ranks average over WAN: four steps of a ring, two links away, and barriers of two hops each."""
    size = Scenario(from_tree(tree(name)), WAN, 3).round(2).averaged_bytes
    assert size > 100_000 * 4
    return 4 * (2 * 0.04 + size / 3 / 2.5e6) + (2 + 2) * 0.04


def test_what_a_rank_computes_is_a_limit() -> None:
    for name in ("fedavg", "cse_fsl"):
        costs = Costs(client=0.01, server=1e-4)
        assert prediction_of(tree(name), costs, NO_LINK).round_seconds == pytest.approx(4.79)
        assert prediction_of(tree(name), costs, NO_LINK, ranks=1).round_seconds == pytest.approx(3 * 4.79)
    asked = prediction_of(tree("cse_fsl"), Costs(client=0.01, sending=0.1), NO_LINK)
    assert asked.round_seconds == pytest.approx(4.79 + 15 * 0.1)  # every second batch is uploaded


def test_bytes_over_the_bandwidth_are_a_limit() -> None:
    up = 15 * 16 * (2 * 2 * 64 * 4 + 8)
    found = prediction_of(tree("cse_fsl"), Costs(), WAN)  # every second batch
    assert found.round_seconds == pytest.approx(0.04 + up / 2.5e6 + averaging("cse_fsl"))


def test_a_splitfed_client_waits_for_every_answer() -> None:
    costs = Costs(client=1e-4, server=2e-4, sending=3e-3, handling=4e-3, averaging=0.5)
    smashed = 2 * 2 * 64 * 4
    wire = BATCHES * 0.04 + SAMPLES * (2 * smashed + 8) / 2.5e6
    chain = wire + SAMPLES * 3e-4 + BATCHES * 7e-3
    found = prediction_of(tree("splitfed_v1"), costs, WAN).round_seconds
    assert found == pytest.approx(chain + 0.5 + averaging("splitfed_v1"))
    assert prediction_of(tree("fsl_sage"), costs, WAN).round_seconds < found / 2


def test_an_alignment_adds_its_fit() -> None:
    keys = tree("fsl_sage", alignment={"epochs": 2, "buffer_size": 100})
    without, with_it = (
        prediction_of(keys, Costs(client=1e-2, server=1e-3, alignment=each), WAN).round_seconds
        for each in (0.0, 0.05)
    )
    assert with_it - without >= 100 * 0.05 / 2 - 1e-9  # in one round of two


def test_shared_cores_are_a_limit() -> None:
    costs = Costs(client=0.01, server=0.001, handling=0.1, averaging=0.5)
    work = 3 * (SAMPLES * 0.011 + BATCHES * 0.1)
    for cores in (1, 2):
        found = prediction_of(tree("splitfed_v2"), costs, NO_LINK, cores=cores)
        assert found.round_seconds == pytest.approx(work / cores + 0.5)
    assert prediction_of(tree("splitfed_v2"), costs, NO_LINK, cores=99) == prediction_of(
        tree("splitfed_v2"), costs, NO_LINK
    )


def lagged(lag: int, every: int = 2) -> dict[str, Any]:
    """Its buffers hold 100 samples at each alignment."""
    alignment = {"epochs": 2, "buffer_size": 100, "lag": lag}
    return tree("fsl_sage", align_every=every, alignment=alignment)


def test_fits_behind_the_training_take_a_planned_interval_what_is_longest_of_them() -> None:
    """Rounds of 4.79 s for 3 clients, and fits of `fit` s each."""

    def seconds(
        fit: float,
        workers: int = 3,
        lag: int = 1,
        every: int = 2,
        cores: float = math.inf,
        start: str = "paper",
    ) -> float:
        keys = merged(lagged(lag, every), {"algorithm": {"start": start}})
        scenario = Scenario(from_tree(keys), NO_LINK, 3, cores)
        found = predict(scenario, Costs(client=0.01, alignment=fit / 100), workers)
        assert isinstance(found, Prediction)
        return found.round_seconds

    later = 4.79 * (BATCHES - 1) / BATCHES  # the steps behind the one that collects
    assert seconds(1.0) == pytest.approx(4.79)  # while its client trains on
    assert seconds(1.0, lag=0) == pytest.approx(4.79 + 1.0 / 2)  # while it waits
    assert seconds(20.0) == pytest.approx((20.0 + later) / 2)  # collected in the second round
    assert seconds(20.0, every=4) == pytest.approx((20.0 + later + 2 * 4.79) / 4)
    assert seconds(20.0, lag=3, every=4) == pytest.approx((20.0 + later) / 4)
    assert seconds(8.0, lag=3, every=4) == pytest.approx(4.79)
    assert seconds(20.0, lag=3, every=4, start="warm_start") == pytest.approx((20.0 + later) / 4)
    assert seconds(20.0, workers=1) == pytest.approx(3 * 20.0 / 2)  # one after the other
    assert seconds(1.0, cores=1) == pytest.approx((3 * 2 * 4.79 + 3 * 1.0) / 2)


def test_an_alignment_costs_the_same_whoever_waits_for_it() -> None:
    for kinds, lag in (({"push", "align"}, 1), ({"push", "begin_alignment", "collect"}, 0)):
        prediction_of(lagged(lag), Costs(1e-4, 1e-4, 1e-4, kinds=kinds))
    found = predict(Scenario(from_tree(lagged(1)), LINK, 3), Costs(kinds={"push"}), 3)
    assert found == "it makes requests of a kind that was not measured"


COSTS = Costs(1e-3, 2e-3, 2e-3, 1e-3, 2e-3, 1e-2)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_more_clients_of_a_size_on_the_same_ranks_never_take_less(name: str) -> None:
    found = [
        prediction_of(
            merged(tree(name), {"clients": {"count": count}, "data": {"train_limit": 40 * count}}),
            COSTS,
            WAN,
            ranks=2,
        ).round_seconds
        for count in (2, 3, 4, 8, 16)
    ]
    assert found == sorted(found)
    assert found[-1] > found[0]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_slower_link_never_takes_less(name: str) -> None:
    links = [NO_LINK, *(LinkSpeed(0.001 * more, 1e8 / more, 2e8 / more) for more in (1, 3, 10, 40, 300))]
    found = [prediction_of(tree(name), COSTS, link).round_seconds for link in links]
    assert found == sorted(found)
    assert found[-1] > 2 * found[0]


def test_an_efficiency_is_a_median_and_divides_the_bound() -> None:
    scenario = Scenario(from_tree(tree("fedavg")), NO_LINK, client_ranks=3)
    lines = [{"round": 2 + i, "round_seconds": seconds} for i, seconds in enumerate((20.0, 5.0, 10.0))]
    found = efficiency(lines, scenario, Costs(client=0.01), 2)
    assert found == pytest.approx(0.479)
    costs = Costs(client=0.01, efficiency=found)
    assert prediction_of(tree("fedavg"), costs, NO_LINK).round_seconds == pytest.approx(10.0)
    with pytest.raises(ValueError, match="cannot be"):
        efficiency(lines, scenario, Costs(), 2)


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
    costs = Costs(1e-4, 2e-4, 0.0, 3e-4, 4e-4, 5e-4)
    assert prediction_of(tree(own(Renamed)), costs) == prediction_of(tree("splitfed_v2"), costs)


def test_requests_that_nobody_has_measured_cost_nobody_knows_what() -> None:
    config = from_tree(tree("fsl_sage"))
    costs = Costs(1e-4, 1e-4, kinds={"push"})
    calibration = Calibration({"fsl_sage": costs, "cse_fsl": costs, "fedavg": "why"}, LINK, 2)
    found = predictions(config, calibration, lambda each: Scenario(each, LINK, 3))
    assert found["fsl_sage"] == "it makes requests of a kind that was not measured"  # there was no alignment
    assert isinstance(found["cse_fsl"], Prediction)
    assert found["fedavg"] == "why"


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
    assert costs.client == pytest.approx(2 * 6.0 / samples)
    assert costs.server == pytest.approx(4.0 / uploaded)
    assert costs.alignment == pytest.approx(6.0 / buffered)
    assert costs.sending == pytest.approx(2 * 0.9 / 13)
    assert costs.handling == pytest.approx((1.3 + 2.6) / 13)


def test_costs_of_fits_behind_the_training_are_in_no_request() -> None:
    scenario = Scenario(from_tree(lagged(1)), NO_LINK, client_ranks=1)
    buffered = sum(sum(each) for each in scenario.round(2).aligned.values())
    assert buffered == 3 * 100
    phases = {"forward_backward": 1.0, "averaging": 0.0}
    line = {
        "round": 3,
        "phases": {"client": phases},
        "cpu_seconds": {
            "ranks": [10.0, 1.0],  # 4 + (0.3 + 2 + 0.4) beside 1 on the client rank, and 3.3 are left
            "client": phases,
            "server": {"step": 4.0, "targets": 0.3, "alignment": 2.0},
        },
        "requests": {
            "push": {"count": 10, "cpu_seconds": 4.0, "up_bytes": 0},
            "begin_alignment": {"count": 3, "cpu_seconds": 0.3, "up_bytes": 0},
            "collect": {"count": 3, "cpu_seconds": 0.4, "up_bytes": 0},
        },
    }
    costs = measure_costs([line], scenario, [1, 1])
    assert costs.alignment == pytest.approx((0.3 + 2.0 + 0.4) / buffered)
    assert costs.handling == pytest.approx(3.3 / 16)
    on_gpu = {**line, "device_seconds": {"server": {"targets": 0.03, "alignment": 0.2}}}
    on_gpu["requests"] = {kind: {**each, "compute_seconds": 0.1} for kind, each in line["requests"].items()}
    costs = measure_costs([on_gpu], scenario, [1, 1])
    assert costs.alignment == pytest.approx((0.03 + 0.2 + 0.1) / buffered)
    assert costs.handling == pytest.approx(3.3 / 16)


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
        "phases": {"client": phases},
        "cpu_seconds": {"ranks": [13.0], "client": phases},
        "requests": {
            "push": {"count": 10, "cpu_seconds": 4.0, "up_bytes": samples["push"] * size},
            "exchange": {"count": 10, "cpu_seconds": 3.0, "up_bytes": samples["exchange"] * size},
            "align": {"count": 3, "cpu_seconds": 6.0, "up_bytes": 0},
        },
    }
    costs = measure_costs([line], scenario, [1])
    assert costs.server == pytest.approx(7.0 / sum(samples.values()))
    buffered = sum(sum(each) for each in scenario.round(2).aligned.values())
    assert costs.alignment == pytest.approx(6.0 / buffered)
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
    costs = Costs(alignment=1.0)
    buffer = {"alignment": {"epochs": 2, "buffer_size": 10_000}}
    first, second, third, last = (
        prediction_of({**tree("fsl_sage", **buffer), "rounds": rounds}, costs, NO_LINK).round_seconds
        for rounds in (1, 4, 5, 8)
    )
    assert first == second == third  # the second interval, or what would be
    uploaded = 15 * 16  # a client's uploads in each round, as its last batch is not uploaded
    assert last - second == pytest.approx(2 * uploaded / 2, rel=1e-6)


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
    assert "Seconds are the lower bound of a round; no such round was measured." in done.stdout
    assert rows[-2:] == [[own(Adaptive), count, *["unknown"] * 3] for count in ("10", "100")]
    assert (
        done.stdout.splitlines()[-1]
        == f"{own(Adaptive)}: unknown, as its requests, or their bytes, depend on values"
    )


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
            "algorithm": {"alignment": {"epochs": 5, "lag": 2}},  # which only a user's own page must have
        }
    )
    names = [*ALGORITHMS, own(Mixed), own(Seldom), own(Adaptive)]
    costs = calibrate_here(config, names).costs
    assert list(costs) == names
    assert costs.pop(own(Adaptive)) == "its requests, or their bytes, depend on values"
    for each in costs.values():
        assert (each.sending, each.handling) == (SENDING, HANDLING)  # here a call holds the server's work
        assert 0 < each.client < 0.1
        assert each.efficiency == 1.0
    for name in ("fsl_sage", own(Mixed), own(Seldom)):
        assert costs[name].alignment > 0
    assert costs["fsl_sage"].kinds == {"push", "align"}
    assert costs[own(Mixed)].kinds == {"push", "exchange", "begin_alignment", "collect"}
    assert costs["fedavg"].server == 0


NOT_READ = (own(Adaptive), "nowhere:Away")
SMALL_BATCHES = {"clients": {"batch_size": 8}}


def bench_folder(folder: Path, variants: dict[str, list[str]]) -> Path:
    """The folder of a benchmark of these variants, whose rounds were trained in this process."""
    keys = merged(tree("fsl_sage"), {"data": {"train_limit": 400}})
    bench = {"variants": variants, "reference": next(iter(variants)), "repeats": 1, "warmup_rounds": 2}
    config = from_tree({**keys, "bench": bench})
    (folder / "rounds").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_tree(config)))
    for name, variant in bench_variants(config).items():
        if variant.algorithm.name not in NOT_READ:
            lines = train_locally(to_tree(variant)).lines
            (folder / "rounds" / f"{name}-0.jsonl").write_text("\n".join(map(json.dumps, lines)))
    environment = {
        "link_speeds": [{"1": vars(WAN)}],
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
    assert found[own(Adaptive)] == "its requests, or their bytes, depend on values"
    assert found["nowhere:Away"].startswith("algorithm.name: got 'nowhere:Away', which cannot be")
    more = read(own(Mixed), alignment={"epochs": 3})  # of the second variant
    per_sample, per_more = (each[own(Mixed)].alignment for each in (found, more))
    assert per_more != per_sample
    other = f"--calibrate: got {folder}, which measured algorithm.alignment.epochs=2, expected 7 as planned"
    assert mistake(lambda: read(own(Mixed), alignment={"epochs": 7})) == other
    planned = read("splitfed_v2", alignment={"epochs": 7})
    assert planned[own(Mixed)] == other
    assert isinstance(planned["splitfed_v2"], Costs)
    assert read("fedavg")["fedavg"] == f"{folder} has no variant of it"
    smaller = mistake(read_calibration, folder, from_tree(merged(tree("splitfed_v2"), SMALL_BATCHES)))
    assert smaller.endswith(", which measured clients.batch_size=16, expected 8 as planned")
    only = bench_folder(tmp_path / "only", {"adaptive": adaptive})
    assert read_calibration(only, from_tree(tree(own(Adaptive)))).costs == {
        own(Adaptive): "its requests, or their bytes, depend on values"
    }


def test_a_prediction_of_what_was_measured_is_what_was_measured(tmp_path: Path) -> None:
    names = ["fsl_sage", "splitfed_v2", "fedavg"]
    folder = bench_folder(tmp_path, {name: [f"algorithm.name={name}"] for name in names})
    config = from_tree(merged(tree("fsl_sage"), {"data": {"train_limit": 400}}))
    calibration = read_calibration(folder, config)
    assert (calibration.link, calibration.server_workers, calibration.shared_cores) == (WAN, 2, 2.0)
    found = predictions(config, calibration, lambda each: Scenario(each, WAN, 1, calibration.shared_cores))
    for name, rounds in {"fsl_sage": 2, "splitfed_v2": 1, "fedavg": 1}.items():
        text = (folder / "rounds" / f"{name}-0.jsonl").read_text()
        seconds = [json.loads(line)["round_seconds"] for line in text.splitlines()][2:]
        samples = [statistics.fmean(seconds[i : i + rounds]) for i in range(0, 2, rounds)]
        inverse = statistics.median(1 / each for each in samples)
        assert found[name].round_seconds == pytest.approx(1 / inverse)


def test_a_benchmark_with_lag_predicts_itself_and_what_would_be_without(tmp_path: Path) -> None:
    folder = bench_folder(tmp_path, {"lagged": ["algorithm.alignment.lag=1"]})
    lines = [json.loads(line) for line in (folder / "rounds" / "lagged-0.jsonl").read_text().splitlines()]
    seconds = {}
    for lag in (0, 1):
        keys = {"data": {"train_limit": 400}, "algorithm": {"alignment": {"lag": lag}}}
        config = from_tree(merged(tree("fsl_sage"), keys))
        calibration = read_calibration(folder, config)
        costs = calibration.costs["fsl_sage"]
        assert isinstance(costs, Costs)
        assert costs.alignment > 0
        found = predict(Scenario(config, WAN, 1, 2.0), costs, calibration.server_workers)
        assert isinstance(found, Prediction)
        seconds[lag] = found.round_seconds
    assert seconds[1] == pytest.approx(statistics.fmean(line["round_seconds"] for line in lines[2:]))
    assert seconds[0] == pytest.approx(seconds[1], rel=0.3)  # the same work, but for the requests


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
    assert f"Seconds are the lower bound of a round over the efficiency of {folder};" in planned.stdout
    assert sum(line.split()[:1] == ["fsl_sage"] for line in planned.stdout.splitlines()) == 2
    other = said(capsys, "plan", config, "model.name=resnet18", "--calibrate", folder)
    assert other.returncode == 2
    assert (
        f"--calibrate: got {folder}, which measured model.name=simple_conv, expected resnet18" in other.stderr
    )
    for key in ("algorithm.alignment.epochs", "model.auxiliary.width", "clients.batch_size"):
        other = said(capsys, "plan", config, f"{key}=77", "--calibrate", folder)
        assert (other.returncode, f"{key}=" in other.stderr, "expected 77" in other.stderr) == (2, True, True)
    many = said(capsys, "plan", config, "--calibrate", folder, "--clients", "97")
    assert "--clients: got 97, expected at most 96, the training samples" in many.stderr
    (folder / "rounds" / "fsl_sage-0.jsonl").unlink()
    broken = said(capsys, "plan", config, "--calibrate", folder)
    assert "expected the folder of a complete benchmark" in broken.stderr
