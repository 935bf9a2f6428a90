"""Traces: spans nest, every request is matched with its execution, clocks agree within their stated error."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

import fslsage_rpc
from fslsage_rpc.device.clock import clock
from fslsage_rpc.measure.trace import Arrow, ClockOffset, Span, TraceFile, estimate_offset
from support.commands import fslsage_on_ranks
from support.trees import ALGORITHM

KEYS: dict[str, Any] = {
    "name": "traced",
    "trace": True,
    "rounds": 2,
    "ranks": 3,
    "device": "cpu",
    "clients": {"count": 3, "batch_size": 16},
    "data": {"train_limit": 150, "test_limit": 20, "partition": "iid"},
    "algorithm": {**ALGORITHM, "alignment": {"epochs": 4}},
    "comm": {"transports": ["uv"], "timeout_seconds": 60},
}
PUSHES, ALIGNMENTS = 2 * 3 * 2, 3  # 4 steps a client and round, of which 2 upload; one round with alignments


def spans(trace: dict[str, Any]) -> list[dict[str, Any]]:
    return [event for event in trace["traceEvents"] if event["ph"] == "X"]


def check(trace: dict[str, Any], requests: int = PUSHES + ALIGNMENTS) -> None:
    """What must hold of any trace: rows of spans one behind the other, arrows that begin and end in spans."""
    rows: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in spans(trace):
        rows.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    named = {(e["pid"], e["tid"]) for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert set(rows) == named
    for row in rows.values():
        for (_, end), (start, _) in itertools.pairwise(sorted(row)):
            assert end <= start + 1e-3  # microseconds, as floats
    ends: dict[str, dict[str, dict[str, Any]]] = {"s": {}, "f": {}}
    for event in trace["traceEvents"]:
        if event["ph"] in ends:
            assert event["id"] not in ends[event["ph"]]
            ends[event["ph"]][event["id"]] = event
            row = rows[event["pid"], event["tid"]]
            assert any(start <= event["ts"] <= end for start, end in row)
    assert ends["s"].keys() == ends["f"].keys()
    assert len(ends["s"]) == requests
    errors = {
        pid: offset["error_seconds"]
        for pid, offset in enumerate(trace["otherData"]["clock_offsets_to_rank_0"].values())
    }
    for id, request in ends["s"].items():
        assert request["ts"] <= ends["f"][id]["ts"] + 1e6 * errors[request["pid"]]


@pytest.mark.nightly
def test_a_trace_of_three_ranks(tmp_path: Path) -> None:
    config = tmp_path / "traced.yaml"
    config.write_text(json.dumps({**KEYS, "output": str(tmp_path)}))
    fslsage_on_ranks(3, tmp_path, "train", config)
    trace = json.loads((tmp_path / "traced" / "trace.json").read_text())
    check(trace)
    offsets = trace["otherData"]["clock_offsets_to_rank_0"].values()
    assert max(offset["error_seconds"] for offset in offsets) < 0.1
    names = {e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    assert names == {"rank 0: server", "rank 1: clients", "rank 2: clients"}
    on_server = [event["name"] for event in spans(trace) if event["pid"] == 0]
    assert on_server.count("step") == PUSHES
    assert on_server.count("alignment") == ALIGNMENTS
    lines = [json.loads(line) for line in (tmp_path / "traced" / "metrics.jsonl").read_text().splitlines()]
    drawn = sum(event["dur"] for event in spans(trace) if event["name"] == "step") / 1e6
    assert drawn == pytest.approx(sum(line["phases"]["server"]["step"] for line in lines))


def test_a_trace_of_one_process(tmp_path: Path) -> None:
    folder = fslsage_rpc.train({**KEYS, "output": str(tmp_path)}).folder
    trace = json.loads((folder / "trace.json").read_text())
    check(trace)
    names = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"]
    assert names == ["rank 0: server and clients"]


LAGGED = {
    **KEYS,
    "rounds": 4,
    "algorithm": {
        "upload_every": 2,
        "align_every": 4,
        "start": "paper",
        "alignment": {"epochs": 4, "lag": 2},
    },
}


def check_lagged(trace: dict[str, Any]) -> None:
    """Uploads and the beginnings of alignments have arrows, collecting has none; each fit has a bar."""
    check(trace, 2 * PUSHES + ALIGNMENTS)
    rows = {
        (e["pid"], e["tid"]): e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"
    }

    def on(row: str, name: str) -> list[dict[str, Any]]:
        found = [event for event in spans(trace) if rows[event["pid"], event["tid"]] == row]
        return [event for event in found if event["name"] == name]

    assert len(on("lane", "targets")) == ALIGNMENTS
    for client in range(3):
        begun, fitted = on(f"alignment of client {client}", "alignment")  # the true gradients, and the fit
        assert begun["args"]["round"] == 1
        assert fitted["ts"] >= begun["ts"] + begun["dur"] - 1e-3
        assert [event["args"]["round"] for event in on(f"client {client}", "collect_wait")] == [3]


def test_a_trace_of_fits_behind_the_training(tmp_path: Path) -> None:
    folder = fslsage_rpc.train({**LAGGED, "output": str(tmp_path)}).folder
    check_lagged(json.loads((folder / "trace.json").read_text()))


@pytest.mark.nightly
def test_a_trace_of_fits_that_go_on_for_rounds(tmp_path: Path) -> None:
    """A bar is handed in with the round in which its fit has ended, and begins in an earlier one."""
    config = tmp_path / "traced.yaml"
    slow = {**LAGGED["algorithm"], "alignment": {"epochs": 600, "lag": 2}}
    config.write_text(json.dumps({**LAGGED, "algorithm": slow, "output": str(tmp_path)}))
    fslsage_on_ranks(3, tmp_path, "train", config)
    trace = json.loads((tmp_path / "traced" / "trace.json").read_text())
    check_lagged(trace)
    passes = [event for event in spans(trace) if event["name"] == "forward_backward"]
    bars = [event for event in spans(trace) if event["name"] == "alignment" and event["args"]["round"] > 1]
    first = min(bars, key=lambda event: event["ts"])
    assert first["ts"] < min(event["ts"] for event in passes if event["args"] == first["args"])


def test_no_trace_unless_it_is_asked_for(tmp_path: Path) -> None:
    folder = fslsage_rpc.train({**KEYS, "trace": False, "output": str(tmp_path)}).folder
    assert not (folder / "trace.json").exists()


def test_an_offset_lies_within_its_error() -> None:
    offset = estimate_offset(lambda: clock() + 1000.0)
    assert abs(offset.seconds - 1000.0) <= offset.error_seconds


def test_clocks_are_laid_on_the_servers() -> None:
    file = TraceFile(["server", "clients"], [ClockOffset(0.0, 0.0), ClockOffset(-50.0, 1e-4)])
    file.add_round(
        7,
        [
            [Span("step", "lane", 10.002, 0.003, Arrow("execution", 1, 0))],
            [Span("upload_wait", "client 1", 60.0, 0.001, Arrow("request", 1, 0))],
        ],
    )
    trace = json.loads(file.text())
    upload, step = sorted(spans(trace), key=lambda event: -event["pid"])
    assert (upload["ts"], upload["dur"]) == pytest.approx((0, 1000))
    assert (step["ts"], step["dur"]) == pytest.approx((2000, 3000))
    assert step["args"] == {"round": 7}
    (begin,), (end,) = ([e for e in trace["traceEvents"] if e["ph"] == kind] for kind in "sf")
    assert begin["id"] == end["id"] == "7.1.0"
    assert end["bp"] == "e"
