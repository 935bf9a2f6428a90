"""Who had a host's cores: by hand, from the system's counters, and in what a run, a bench and `check` say."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from fslsage_rpc.bench.table import BUSY_MARK
from fslsage_rpc.bench.table import busy_line as busy_line_of_bench
from fslsage_rpc.device.cores import usable_cores
from fslsage_rpc.measure import host_load as cores
from fslsage_rpc.measure.host_load import CoreTimes, busy_by_host, host_busy, mean_busy
from fslsage_rpc.runs.records import RoundRecorder
from fslsage_rpc.runs.screen import busy_line
from support.commands import fslsage, said
from support.rank_program import train_locally
from support.trees import BENCH, tree


def times(cpu_seconds: float, *worked: float, host: str = "a", first: int = 0) -> CoreTimes:
    """Those of a process in two seconds, on cores that worked so long in them."""
    counted = {first + number: (work, 2.0) for number, work in enumerate(worked)}
    return CoreTimes(host, 2.0, cpu_seconds, counted)


def test_others_have_what_the_ranks_of_a_host_have_not() -> None:
    assert host_busy([times(0.5, 1.0, 2.0), times(0.5, 1.0, 2.0)]) == pytest.approx((3 - 1) / 4)
    assert host_busy([times(2.0, 1.0, 0.9)]) == 0  # ticks are coarser than the process's own clock


def test_ranks_bound_to_cores_of_their_own_share_none() -> None:
    assert host_busy([times(1.0, 1.0), times(1.5, 2.0, first=1)]) == pytest.approx(0.5 / 4)


def test_the_busiest_host_counts_and_one_that_tells_nothing_does_not() -> None:
    quiet, busy, silent = times(1.0, 1.0), times(0.0, 1.0, host="b"), CoreTimes("c", 2.0, 1.0)
    assert host_busy([quiet, busy, silent]) == 0.5
    assert busy_by_host([quiet, silent]) == {"a": 0.0, "c": None}
    assert host_busy([silent]) is None


def test_means_are_over_seconds() -> None:
    lines = [{"round_seconds": s, "host_busy": b} for s, b in ((1.0, 0.0), (3.0, 0.4), (9.0, None))]
    assert mean_busy(lines) == pytest.approx(0.3)
    assert mean_busy(lines[2:]) is None


def test_counters_are_those_of_the_usable_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = tmp_path / "stat"
    # user nice system idle iowait irq softirq steal guest guest_nice
    stat.write_text("cpu  9 9 9 9 9 9 9 9\ncpu0 100 10 20 500 5 6 7 40 50 0\ncpu9 1 1 1 1 1 1 1 1\nintr 5\n")
    monkeypatch.setattr(cores, "STAT", stat)
    monkeypatch.setattr(cores, "usable_cores", lambda: frozenset({0, 1}))
    monkeypatch.setattr(cores.os, "sysconf", lambda name: 100)
    assert CoreTimes.now().cores == {0: (pytest.approx(1.7), pytest.approx(6.88))}
    stat.unlink()
    assert CoreTimes.now().cores == {}


def test_a_run_says_what_each_rank_and_others_took(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fslsage_rpc.runs.records.host_busy", lambda ranks: 0.3)
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tree(tmp_path, name="run", rounds=2)))
    out = said(capsys, "train", config).stdout
    warning = "others took 30% of the host's cores meanwhile: do not trust these seconds"
    assert warning in " ".join(out.split())
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    (mine,) = line["cpu_seconds"]["ranks"]
    assert 0 < sum(line["cpu_seconds"]["client"].values()) <= mine
    assert line["cpu_seconds"]["client"]["forward_backward"] > 0
    assert all(times["cpu_seconds"] > 0 for times in line["requests"].values())
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["host_busy"] == pytest.approx(0.3)
    assert summary["cpu_seconds"] > mine


@pytest.mark.parametrize(("share", "said"), [(None, False), (0.05, False), (0.06, True)])
def test_little_is_not_worth_a_line(share: float | None, said: bool) -> None:
    assert bool(busy_line(share)) == said


def test_samples_of_a_busy_host_are_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fslsage_rpc.runs.records.host_busy", lambda ranks: 0.3)
    config = tmp_path / "bench.yaml"
    keys = {"output": str(tmp_path), "transport": "local"}
    config.write_text(yaml.safe_dump({**BENCH, **keys, "bench": {**BENCH["bench"], "repeats": 1}}))
    out = " ".join(said(capsys, "bench", config).stdout.split())
    result = json.loads((tmp_path / "small/bench.json").read_text())
    samples = sum(record["round_seconds"]["n"] for record in result["variants"].values())
    found = f"* others took up to 30% of the host's cores in {samples} of {samples} samples"
    assert f"warning: {found}: these ratios and efficiencies cannot be trusted" in out
    page = (tmp_path / "small/bench.md").read_text()
    assert f"\\{found}" in page
    for record in result["variants"].values():
        assert record["busy_samples"] == len(record["samples"]) == record["round_seconds"]["n"]
        assert all(sample["busy"] for sample in record["samples"])
        assert {round(sample["host_busy"], 9) for sample in record["samples"]} == {0.3}
    efficiencies = [row.split("|")[-2].strip() for row in page.splitlines() if row.startswith("| fsl_sage")]
    assert efficiencies[0].endswith(f"%{BUSY_MARK}")
    report = tmp_path / "report"
    assert said(capsys, "report", tmp_path / "small", "--out", report).returncode == 0
    assert "(busy host)" in (report / "report.md").read_text()


@contextmanager
def busy_cores() -> Iterator[None]:
    """As many foreign processes as there are cores, each busy with nothing, and gone afterwards."""
    program = "import time\nend = time.monotonic() + 120\nwhile time.monotonic() < end: pass"
    others = [subprocess.Popen([sys.executable, "-c", program]) for _ in usable_cores()]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


@pytest.mark.gate
def test_foreign_jobs_are_seen_by_check_and_train(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    keys = {"transport": "rpc", "ranks": 3, "rounds": 10}
    config.write_text(yaml.safe_dump(tree(tmp_path, name="run", **keys)))
    with busy_cores():
        check = fslsage("check", config)
        train = fslsage("train", config)
    assert "of its cores, so seconds measured now are not to be trusted" in check.stdout
    assert "of the host's cores meanwhile: do not trust these seconds" in " ".join(train.stdout.split())
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["host_busy"] > 0.1
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert len(line["cpu_seconds"]["ranks"]) == 3


@pytest.mark.parametrize(("busy", "untrusted"), [(1, False), (2, False), (3, True)])
def test_few_busy_samples_leave_the_quartiles_alone(busy: int, untrusted: bool) -> None:
    samples = [{"busy": number < busy, "host_busy": 0.2} for number in range(8)]
    line = busy_line_of_bench({"variants": {"a": {"samples": samples, "busy_samples": busy}}})
    assert line is not None
    assert line.startswith(f"* others took up to 20% of the host's cores in {busy} of 8 samples")
    assert ("cannot be trusted" in line) == untrusted


def test_the_report_marks_runs_of_a_busy_host(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, share in (("quiet", 0.01), ("busy", 0.3)):
        monkeypatch.setattr("fslsage_rpc.runs.records.host_busy", lambda ranks, share=share: share)
        config = tmp_path / f"{name}.yaml"
        config.write_text(yaml.safe_dump(tree(tmp_path, name=name, seed=len(name))))
        assert said(capsys, "train", config).returncode == 0
    labels = ["--label", "a", "--label", "b"]
    report = ["report", tmp_path / "quiet", tmp_path / "busy", *labels, "--out", tmp_path / "report"]
    assert said(capsys, *report).returncode == 0
    rows = (tmp_path / "report/report.md").read_text().splitlines()
    marked = [row.split("|")[1].strip() for row in rows if "(busy host)" in row]
    assert marked == ["b"]


def test_totals_are_those_of_all_rounds_or_null() -> None:
    """A run may have been begun by a version that did not count CPU seconds."""
    known = train_locally({**tree(Path("nowhere")), "rounds": 2}).lines
    older = [{k: v for k, v in line.items() if k not in ("cpu_seconds", "host_busy")} for line in known]
    for lines, told in ((known, True), ([*older[:1], *known[1:]], False)):
        recorder = RoundRecorder((), "uploads")
        recorder.go_on([{**line, "host_busy": 0.1} if "cpu_seconds" in line else line for line in lines], {})
        summary = recorder.summary("fsl_sage", 2)
        assert (summary["cpu_seconds"] is not None, summary["host_busy"] is not None) == (told, told)
