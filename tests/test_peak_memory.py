"""Peak memory of each kind of rank, in the lines of rounds, in the summary and on the screen."""

import mmap
import sys
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import fslsage_rpc
from fslsage_rpc.algorithms.paper_ledger import PaperBytes
from fslsage_rpc.device.memory import forget_host_peak, physical_memory, status_bytes
from fslsage_rpc.measure.host_load import CoreTimes
from fslsage_rpc.measure.phases import OF_LANES
from fslsage_rpc.parties.server import ServerReport
from fslsage_rpc.runs.records import PeakMemory, RankReport, RoundRecorder
from fslsage_rpc.runs.screen import can_be_shown, summary_table
from fslsage_rpc.units import MIB
from support.trees import tree

BOTH = "server and client"


def bytes_of(host: int | None, device: int | None = None) -> dict[str, int | None]:
    return {"host_bytes": host, "device_bytes": device}


def report(peaks: PeakMemory) -> RankReport:
    """One rank's of a round in which nothing else was measured."""
    phases = None if "server" in peaks else {}
    return RankReport(1.0, phases, CoreTimes("a", 1.0, 1.0), {}, {}, 0.0, 0, {}, {}, [], peaks)


def recorded(recorder: RoundRecorder, t: int, ranks: Sequence[PeakMemory]) -> dict[str, Any]:
    """The line of a round after which each rank says so."""
    server = ServerReport(1.0, 1, dict.fromkeys(OF_LANES, 0.0))
    reports = [report(peaks) for peaks in ranks]
    return recorder.add(t, reports, server, None, 0.0, PaperBytes(0, 0), [], finite=True)


def test_figures_are_the_largest_over_ranks_of_a_kind_and_over_rounds() -> None:
    recorder = RoundRecorder((), "uploads")
    first = recorded(
        recorder,
        0,
        [{"server": bytes_of(50, 7)}, {"client": bytes_of(20, None)}, {"client": bytes_of(30, 4)}],
    )
    assert first["peak_memory"] == {"server": bytes_of(50, 7), "client": bytes_of(30, 4)}
    second = recorded(recorder, 1, [{"server": bytes_of(40, 9)}, {"client": bytes_of(None)}])
    assert second["peak_memory"] == {"server": bytes_of(40, 9), "client": bytes_of(None)}
    most = {"server": bytes_of(50, 9), "client": bytes_of(30, 4)}
    assert recorder.summary("fsl_sage", 1)["peak_memory"] == most

    older = [{key: value for key, value in line.items() if key != "peak_memory"} for line in (first, second)]
    for lines, expected in (
        ([first, second], most),
        ([older[0], second], second["peak_memory"]),
        ([first, older[1]], first["peak_memory"]),
        (older, {}),
    ):
        after = RoundRecorder((), "uploads")
        after.go_on(lines, {})
        assert after.summary("fsl_sage", 1)["peak_memory"] == expected


def test_a_run_that_goes_on_keeps_the_larger_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rounds, now, most in ((1, 5, 5), (2, 3, 5), (3, 8, 8)):
        monkeypatch.setattr("fslsage_rpc.training.trainer.status_bytes", lambda key, now=now: now)
        run = fslsage_rpc.train(tree(tmp_path, rounds=rounds, name="run"))
        assert run.rounds[-1]["peak_memory"] == {BOTH: bytes_of(now)}
        assert run.summary["peak_memory"] == {BOTH: bytes_of(most)}


def test_one_process_that_hosts_both_says_what_it_takes(tmp_path: Path) -> None:
    if status_bytes("VmHWM") is None:
        pytest.skip("the system does not tell")
    run = fslsage_rpc.train(tree(tmp_path, rounds=2, name="run"))
    assert [line["peak_memory"].keys() for line in run.rounds] == [{BOTH}] * 2
    peaks = [line["peak_memory"][BOTH]["host_bytes"] for line in run.rounds]
    weights = torch.load(run.folder / "model.pt", weights_only=True).values()
    assert sum(tensor.nbytes for tensor in weights) < peaks[0] <= peaks[1] <= (physical_memory() or 0)
    assert run.summary["peak_memory"] == {BOTH: bytes_of(peaks[1])}


def test_tensorboard_has_the_figures_that_are_known(tmp_path: Path) -> None:
    if status_bytes("VmHWM") is None:
        pytest.skip("the system does not tell")
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = fslsage_rpc.train(tree(tmp_path, rounds=1, name="run"))
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    (name,) = (tag for tag in events.Tags()["scalars"] if tag.startswith("peak_memory/"))
    (event,) = events.Scalars(name)
    assert event.value == pytest.approx(run.summary["peak_memory"][BOTH]["host_bytes"], rel=1e-6)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no other system can forget a peak")
def test_what_a_process_has_given_back_is_forgotten() -> None:
    passing = mmap.mmap(-1, 256 * MIB)
    for page in range(0, len(passing), mmap.PAGESIZE):
        passing[page] = 1
    passing.close()
    before = status_bytes("VmHWM")
    forget_host_peak()
    after = status_bytes("VmHWM")
    assert before is not None
    assert after is not None
    assert after < before - 200 * MIB


SUMMARY: dict[str, Any] = {
    "algorithm": "fsl_sage",
    "rounds": 2,
    "test_accuracy": {"last": 0.5, "best": 0.5, "best_round": 2},
    "training_seconds": 1.0,
    "phases": {"client": {}, "server": {}},
    "wire_bytes": {"smashed_up": 1},
    "paper_bytes_total": 1,
}


def shown(**keys: Any) -> str:
    console = Console(file=StringIO(), width=78)
    with console.capture() as capture:
        console.print(summary_table("run", {**SUMMARY, **keys}))
    return capture.get()


def test_the_table_has_a_row_for_each_figure_that_is_known() -> None:
    peaks = {"server": bytes_of(3 * MIB, 2 * MIB), "client": bytes_of(MIB)}
    rows = [line.replace("│", " ").split() for line in shown(peak_memory=peaks).splitlines()]
    assert [row for row in rows if row[:1] in (["server,"], ["client,"])] == [
        ["server,", "host", "3.00", "MiB"],
        ["server,", "device", "2.00", "MiB"],
        ["client,", "host", "1.00", "MiB"],
    ]


@pytest.mark.parametrize("keys", [{}, {"peak_memory": {}}, {"peak_memory": {"server": bytes_of(None)}}])
def test_a_summary_that_knows_no_peak_has_no_such_section(keys: dict[str, Any]) -> None:
    assert can_be_shown({**SUMMARY, **keys})
    assert "peak memory" not in shown(**keys)


@pytest.mark.parametrize(
    "nonsense",
    [None, 3, ["server"], {"server": 3}, {"server": {}}, {"server": bytes_of("many")}],  # type: ignore[arg-type]  # so that it is refused
)
def test_a_summary_with_nonsense_is_not_shown(nonsense: Any) -> None:
    assert not can_be_shown({**SUMMARY, "peak_memory": nonsense})
