"""Round trips: what the caller measures, what the callee tells it, and what is left for the wire."""

import json
from typing import Any

import pytest

from fslsage_rpc.measure.request_times import RequestLog, RequestTimes, by_kind
from support.rank_program import train_locally, train_on_ranks
from support.trees import ALGORITHM


def test_times_add_up_by_client_and_kind_and_start_again() -> None:
    log = RequestLog()
    for client, kind in ((0, "push"), (0, "push"), (1, "push"), (1, "align")):
        log.add(client, kind, RequestTimes(1, 5.0, 0.5, 2.0, 1.0, 0.5, up_bytes=10, down_bytes=1))
    taken = log.take()
    assert taken[0]["push"] == RequestTimes(2, 10.0, 1.0, 4.0, 2.0, 1.0, 20, 2)
    assert taken[0]["push"].wire_seconds == 4.0
    total = by_kind(taken)
    assert total["push"].count == 3
    assert total["align"].record() == {
        "count": 1,
        "round_trip_seconds": 5.0,
        "send_seconds": 0.5,
        "queue_seconds": 2.0,
        "compute_seconds": 1.0,
        "cpu_seconds": 0.5,
        "up_bytes": 10,
        "down_bytes": 1,
        "wire_seconds": 2.0,
    }
    assert taken[0]["push"].count == 2  # adding up left the parts as they were
    assert log.take() == {}


def tree(algorithm: str) -> dict[str, Any]:
    return {
        "rounds": 2,
        "device": "cpu",
        "clients": {"count": 3, "batch_size": 16},
        "data": {"train_limit": 150, "test_limit": 20, "partition": "iid"},
        "algorithm": {
            "name": algorithm,
            **ALGORITHM,
            "alignment": {"epochs": 4},
        },
        "comm": {"transports": ["uv"], "timeout_seconds": 60},
    }


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    names = ["fsl_sage", "splitfed_v1", "fedavg"]
    folder = tmp_path_factory.mktemp("requests") / "job"
    outcomes = train_on_ranks(3, [tree(name) for name in names], folder)
    return {name: outcome.lines for name, outcome in zip(names, outcomes, strict=True)}


@pytest.mark.nightly
def test_every_request_is_timed(lines: dict[str, list[dict[str, Any]]]) -> None:
    sage, splitfed, fedavg = (lines[name] for name in ("fsl_sage", "splitfed_v1", "fedavg"))
    # 50 samples in batches of 16: 4 steps a client, of which 2 upload; 3 clients
    assert [{k: r["count"] for k, r in line["requests"].items()} for line in sage] == [
        {"push": 6, "align": 3},
        {"push": 6},
    ]
    assert [{k: r["count"] for k, r in line["requests"].items()} for line in splitfed] == 2 * [
        {"exchange": 12}
    ]
    assert [line["requests"] for line in fedavg] == [{}, {}]


@pytest.mark.nightly
def test_a_round_trip_is_queue_and_compute_and_wire(lines: dict[str, list[dict[str, Any]]]) -> None:
    for name in ("fsl_sage", "splitfed_v1"):
        for line in lines[name]:
            for times in line["requests"].values():
                assert min(times["queue_seconds"], times["compute_seconds"], times["wire_seconds"]) >= 0
                parts = times["queue_seconds"] + times["compute_seconds"] + times["wire_seconds"]
                assert parts == pytest.approx(times["round_trip_seconds"])
            computed = sum(times["compute_seconds"] for times in line["requests"].values())
            server = line["phases"]["server"]
            lanes = 3 if name == "splitfed_v1" else 1
            executed = lanes * (server["step"] + server["targets"] + server["alignment"] + server["drift"])
            if not line["alignment"]:  # clients are aligned side by side
                assert computed == pytest.approx(executed, rel=0.2, abs=0.01)
            assert computed > 0.8 * executed - 0.01


@pytest.mark.nightly
def test_the_record_is_json_and_local_runs_have_it_too() -> None:
    (line, _) = train_locally(tree("fsl_sage")).lines
    times = json.loads(json.dumps(line["requests"]))["align"]
    assert times["wire_seconds"] < 0.5 * times["round_trip_seconds"]  # there is no wire
