"""The run folder holds what it promises, and its figures add up."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fslsage_rpc
from fslsage_rpc.measure.phases import OF_CLIENTS
from fslsage_rpc.notebook import Run
from fslsage_rpc.runs.records import interval_median
from fslsage_rpc.transport.wire_ledger import WIRE_KINDS
from support.trees import ALGORITHM


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fslsage_rpc.train(
        {
            "name": "folder",
            "output": str(tmp_path_factory.mktemp("runs")),
            "rounds": 5,
            "device": "cpu",
            "clients": {"count": 3, "batch_size": 64, "participation": 0.6},
            "algorithm": {**ALGORITHM, "alignment": {"epochs": 3}},
            "evaluation": {"every": 2},
        }
    )


def read(run: Any, name: str) -> Any:
    return json.loads((run.folder / name).read_text())


def test_phases_make_up_the_round(run: Any) -> None:
    for line in run.rounds:
        client, server = line["phases"]["client"], line["phases"]["server"]
        assert set(client) == {*OF_CLIENTS, "other"}
        assert sum(client.values()) == pytest.approx(line["round_seconds"])
        assert sum(server.values()) == pytest.approx(line["round_seconds"])
        assert all(seconds >= 0 for seconds in (*client.values(), *server.values()))


@pytest.mark.nightly
def test_little_of_a_round_is_in_no_phase(run: Any) -> None:
    for line in run.rounds:
        assert 0 <= line["phases"]["client"]["other"] <= 0.05 * line["round_seconds"]


def test_totals_are_sums(run: Any) -> None:
    elapsed = np.cumsum([line["round_seconds"] for line in run.rounds])
    assert [line["elapsed_seconds"] for line in run.rounds] == pytest.approx(elapsed)
    paper = np.cumsum([line["paper_bytes"] for line in run.rounds])
    assert [line["paper_bytes_total"] for line in run.rounds] == paper.tolist()
    assert run.summary["training_seconds"] == pytest.approx(elapsed[-1])
    assert run.summary["paper_bytes_total"] == paper[-1]
    for kind in WIRE_KINDS:
        total = sum(line["wire_bytes"][kind] for line in run.rounds)
        assert run.summary["wire_bytes"][kind] == total
        if kind not in ("weights_allreduce", "evaluation"):  # those belong to ranks, not to clients
            assert sum(c[kind] for c in run.summary["wire_bytes_per_client"].values()) == total


def test_absent_clients_cost_nothing(run: Any) -> None:
    assert all(len(line["participants"]) == 2 for line in run.rounds)  # ceil(0.6 * 3)
    by_client = run.summary["wire_bytes_per_client"]
    rounds = {str(c): sum(c in line["participants"] for line in run.rounds) for c in range(3)}
    assert len(set(rounds.values())) > 1, "the seed should leave the clients unequal"
    uploads = {client: by_client[client]["smashed_up"] / rounds[client] for client in rounds}
    assert len(set(uploads.values())) == 1  # equal parts: the same for each round that a client was in


def test_rounds_that_are_not_evaluated_say_null(run: Any) -> None:
    assert [line["test_accuracy"] is None for line in run.rounds] == [True, False, True, False, False]
    assert [line["test_loss"] is None for line in run.rounds] == [True, False, True, False, False]
    assert run.summary["test_accuracy"]["last"] == run.rounds[-1]["test_accuracy"]


def test_the_partition_file_describes_the_parts(run: Any) -> None:
    parts = read(run, "partition.json")
    assert [part["client"] for part in parts] == [0, 1, 2]
    assert [part["samples"] for part in parts] == [479, 479, 479]
    assert all(sum(part["labels"]) == part["samples"] for part in parts)
    assert all(len(part["sha256"]) == len(hashlib.sha256().hexdigest()) for part in parts)


def test_the_environment_names_versions_and_ranks(run: Any) -> None:
    environment = read(run, "environment.json")
    assert environment["versions"]["torch"]
    assert environment["transport"] == "local"
    assert environment["ranks"][0]["device"] == "cpu"


def test_the_median_is_over_whole_intervals_without_the_first() -> None:
    seconds = [9.0, 9.0, 5.0, 1.0, 7.0, 1.0, 5.0, 3.0, 100.0]
    assert interval_median(seconds, 2) == pytest.approx(
        4.0
    )  # means 3, 4, 4; the lone last round is no interval
    assert interval_median([1.0, 2.0], 2) is None


def test_the_resolved_configuration_runs_again(run: Any, tmp_path: Path) -> None:
    again = fslsage_rpc.train(run.folder / "config.yaml", f"output={tmp_path}")
    for old, new in zip(run.rounds, again.rounds, strict=True):
        for key in ("train_loss", "test_loss", "test_accuracy", "wire_bytes", "drift", "alignment"):
            assert old[key] == new[key]


@pytest.mark.nightly
def test_many_tiny_clients_leave_metrics_that_json_can_hold(tmp_path: Path) -> None:
    """Clients of 4 samples: some of their true gradients are exactly 0."""
    tiny = fslsage_rpc.train(
        Path(__file__).parent.parent / "configs" / "quickstart.yaml",
        *(f"output={tmp_path}", "device=cpu", "clients.count=100", "clients.batch_size=2", "rounds=2"),
        *("data.train_limit=400", "algorithm.alignment.epochs=1", "algorithm.start=paper"),
    )
    text = (tiny.folder / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert all(line["drift"]["nmse"] < 1e100 for line in tiny.rounds)
