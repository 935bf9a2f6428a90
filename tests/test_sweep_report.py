"""`fslsage report` of a sweep: means and intervals, paired differences, how far it is, and its figures."""

import csv
import importlib
import json
import re
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

import fslsage_rpc.report
from fslsage_rpc.cli import main
from fslsage_rpc.report.estimates import Estimate, estimate, t_quantile
from fslsage_rpc.report.page import Table
from fslsage_rpc.report.sweep_tables import differences_table, results_table, variants_table
from fslsage_rpc.report.sweeps import RunState, SavedSweep, read_sweep
from fslsage_rpc.report.tables import UNKNOWN
from fslsage_rpc.report.terminal import show_sweep
from fslsage_rpc.runs.places import write_whole
from support.report_folders import MIB, write_run, write_sweep
from support.trees import merged
from support.user_input import mistake

COMPARED = {"reference": "splitfed_v1", "target_accuracy": 0.5}
FSL_SAGE = {
    "iid-fsl_sage-seed0": [0.125, 0.25, 0.5, 0.25],
    "iid-fsl_sage-seed1": [0.25, 0.75, 0.5, 0.5],
    "iid-fsl_sage-seed2": [0.125, 0.25, 0.25, 0.375],
}
SPLITFED = {
    "iid-splitfed_v1-seed0": [0.125, 0.5, 0.25, 0.125],
    "iid-splitfed_v1-seed1": [0.125, 0.125, 0.25, 0.5],
}


def cells(table: Table | None, label: str) -> dict[str, str]:
    """The row of a table under its headers."""
    assert table is not None
    (row,) = [row for row in table.rows if row[0] == label]
    return dict(zip(table.headers, row, strict=True))


def rewrite(path: Path, change: Any) -> None:
    """Change the last line of a file of JSON."""
    lines = path.read_text().splitlines()
    lines[-1] = json.dumps({**json.loads(lines[-1]), **change})
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("degrees", "published"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_quantiles_are_those_of_published_tables(degrees: int, published: float) -> None:
    assert round(t_quantile(degrees), 3) == published


def test_an_interval_is_wider_than_the_spread_of_few_seeds() -> None:
    three = estimate([1.0, 2.0, 3.0])
    assert three is not None
    assert (three.mean, three.n) == (2.0, 3)
    assert three.half_width == pytest.approx(4.302653 / 3**0.5)
    assert estimate([1.5]) == Estimate(1.5, None, 1)
    assert estimate([]) is None


def test_a_row_is_the_mean_over_the_complete_runs_of_a_variant(tmp_path: Path) -> None:
    sweep = read_sweep(write_sweep(tmp_path / "study", {**FSL_SAGE, "iid-splitfed_v1-seed1": [0.125] * 4}))
    table = results_table(sweep)
    assert [row[0] for row in table.rows] == [
        *("iid-fsl_sage", "iid-splitfed_v1", "skewed-fsl_sage", "skewed-splitfed_v1")
    ]
    # Of 0.25, 0.5 and 0.375 the standard deviation is 0.125, and 4.3027 * 0.125 / sqrt(3) is 0.3105.
    # Of 0.5, 0.75 and 0.375 it is 0.1909.
    assert cells(table, "iid-fsl_sage") == {
        "variant": "iid-fsl_sage",
        "seeds complete": "3 of 3",
        "last test accuracy": "0.375 ± 0.311",
        "best test accuracy": "0.542 ± 0.474",
        "rounds": "4",
        "training seconds": "22.00",
        "wire, MiB": "12.00",
        "paper ledger (modelled), MiB": "8.00",
    }
    one = cells(table, "iid-splitfed_v1")
    assert (one["seeds complete"], one["last test accuracy"]) == ("1 of 3", "0.1250")
    none = cells(table, "skewed-fsl_sage")
    assert none.pop("seeds complete") == "0 of 3"
    assert set(none.values()) == {"skewed-fsl_sage", UNKNOWN}


def test_what_it_took_to_the_target_is_of_those_seeds_that_reached_it(tmp_path: Path) -> None:
    row = cells(
        results_table(read_sweep(write_sweep(tmp_path / "study", FSL_SAGE, sweep=COMPARED))), "iid-fsl_sage"
    )
    # Reached in rounds 3 and 2, each of 5.5 s, 3 MiB on the wire and 2 MiB of the paper ledger.
    assert row["seeds that reached 0.5"] == "2 of 3"
    half = 12.7062 / 2  # half the width is t * (difference / sqrt(2)) / sqrt(2)
    assert row["training seconds to 0.5"] == f"13.8 ± {5.5 * half:.1f}"
    assert row["wire to 0.5, MiB"] == f"7.5 ± {3 * half:.1f}"
    assert row["paper ledger (modelled) to 0.5, MiB"] == f"5.0 ± {2 * half:.1f}"


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    sweep = read_sweep(write_sweep(tmp_path / "study", {**FSL_SAGE, **SPLITFED}, sweep=COMPARED))
    table = differences_table(sweep)
    assert table is not None
    assert [row[:2] for row in table.rows] == [
        ["iid-fsl_sage", "iid-splitfed_v1"],
        ["skewed-fsl_sage", "skewed-splitfed_v1"],
    ]
    row = cells(table, "iid-fsl_sage")
    assert row["pairs of seeds"] == "2"
    # Last: 0.25 - 0.125 and 0.5 - 0.5. Best: 0.5 - 0.5 and 0.75 - 0.5. Reached in rounds 3 - 2 and 2 - 4.
    assert row["last test accuracy"] == f"+0.062 ± {12.7062 * 0.0625:.3f}"
    assert row["best test accuracy"] == "+0.12 ± 1.59"
    assert row["training seconds"] == "0.0000"
    assert row["wire, MiB"] == row["paper ledger (modelled), MiB"] == "0.00"
    assert row["pairs that reached 0.5"] == "2 of 2"
    assert row["training seconds to 0.5"] == "-3 ± 105"
    assert row["wire to 0.5, MiB"] == "-1.5 ± 57.2"
    assert cells(table, "skewed-fsl_sage")["pairs of seeds"] == "0"
    assert cells(table, "skewed-fsl_sage")["wire, MiB"] == UNKNOWN


def test_without_a_reference_nothing_is_subtracted(tmp_path: Path) -> None:
    assert differences_table(read_sweep(write_sweep(tmp_path / "study", FSL_SAGE))) is None


def half_done(folder: Path) -> SavedSweep:
    """One run of each state, the others not begun."""
    write_sweep(
        folder,
        {
            "iid-fsl_sage-seed0": [0.25] * 4,
            "iid-fsl_sage-seed1": [0.25, 0.5],
            "iid-splitfed_v1-seed0": [0.25, 0.5, 0.5, None],
        },
    )
    rewrite(folder / "iid-splitfed_v1-seed0" / "metrics.jsonl", {"diverged": True})
    (folder / "skewed-fsl_sage-seed0").mkdir()
    (folder / "skewed-fsl_sage-seed0" / "log.txt").write_text("killed\n")
    (folder / "skewed-splitfed_v1-seed0").mkdir()
    return read_sweep(folder)


def test_a_sentence_says_how_far_a_sweep_is(tmp_path: Path) -> None:
    assert half_done(tmp_path / "study").progress == (
        "1 of 12 runs are complete; diverged: iid-splitfed_v1-seed0 (in round 4); unfinished: "
        "skewed-fsl_sage-seed0 (round 0 of 4), iid-fsl_sage-seed1 (round 2 of 4); not begun: "
        "skewed-splitfed_v1-seed0, iid-splitfed_v1-seed1, skewed-fsl_sage-seed1, skewed-splitfed_v1-seed1, "
        "iid-fsl_sage-seed2 and 3 more."
    )
    whole = {"sweep": {"variants": {"a": [], "b": []}, "seeds": [0]}}
    runs: dict[str, list[float | None]] = {"a-seed0": [0.5] * 4, "b-seed0": [0.5] * 4}
    assert read_sweep(write_sweep(tmp_path / "whole", runs, **whole)).progress == "All 2 runs are complete."


def test_a_diverged_run_is_counted_and_in_no_mean(tmp_path: Path) -> None:
    row = cells(results_table(half_done(tmp_path / "study")), "iid-splitfed_v1")
    assert row["seeds complete"] == "0 of 3, 1 diverged"
    assert row["best test accuracy"] == UNKNOWN


def test_a_complete_run_is_unfinished_where_more_rounds_are_asked_for(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "study", FSL_SAGE)
    config = yaml.safe_load((folder / "sweep.yaml").read_text())
    (folder / "sweep.yaml").write_text(yaml.safe_dump({**config, "rounds": 6}))
    assert str(read_sweep(folder).members[0]) == "iid-fsl_sage-seed0 (round 4 of 6)"


@pytest.mark.parametrize(
    ("keys", "state"),
    [
        ({"comm": {"timeout_seconds": 99}, "checkpoint": {"keep": 5}}, RunState.COMPLETE),
        ({"rounds": 6}, RunState.UNFINISHED),
        ({"stop": {"accuracy": 0.9}}, RunState.UNFINISHED),
        ({"clients": {"count": 7}}, RunState.OTHER),
        ({"evaluation": {"every": 2}}, RunState.OTHER),
        ({"comm": {"codec": {"smashed": "int8"}}}, RunState.OTHER),
    ],
)
def test_runs_of_other_settings_are_in_no_mean(keys: dict[str, Any], state: RunState, tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "study", FSL_SAGE)
    config = yaml.safe_load((folder / "sweep.yaml").read_text())
    (folder / "sweep.yaml").write_text(yaml.safe_dump(merged(config, keys)))
    members = [member for member in read_sweep(folder).members if member.planned.config.name in FSL_SAGE]
    assert {member.state for member in members} == {state}


@pytest.mark.parametrize("text", ["{}", '{"rounds": 4}'])
def test_a_run_whose_summary_is_damaged_is_unfinished(text: str, tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "study", FSL_SAGE)
    (folder / "iid-fsl_sage-seed0" / "summary.json").write_text(text)
    assert read_sweep(folder).members[0].state is RunState.UNFINISHED


def test_runs_are_found_where_the_folder_has_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sweep(tmp_path / "study", FSL_SAGE).rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    states = [member.state for member in read_sweep(".").members]
    assert states.count(RunState.COMPLETE) == 3


PEAKS: dict[str, dict[str, Any]] = {
    "ranks": {
        "server": {"host_bytes": 300 * MIB, "device_bytes": 64 * MIB},
        "client": {"host_bytes": 200 * MIB, "device_bytes": None},
    },
    "one process": {"server and client": {"host_bytes": 512 * MIB, "device_bytes": None}},
}


@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        (
            "ranks",
            {
                "peak host memory, server rank, MiB": "300.00",
                "peak device memory, server rank, MiB": "64.00",
                "peak host memory, client rank, MiB": "200.00",
            },
        ),
        ("one process", {"peak host memory, server and client rank, MiB": "512.00"}),
    ],
)
def test_memory_has_columns_where_it_was_measured(kind: str, columns: dict[str, str], tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "study", FSL_SAGE)
    assert not any("memory" in header for header in results_table(read_sweep(folder)).headers)
    for name in FSL_SAGE:
        rewrite(folder / name / "summary.json", {"peak_memory": PEAKS[kind]})
    row = cells(results_table(read_sweep(folder)), "iid-fsl_sage")
    assert {header: cell for header, cell in row.items() if "memory" in header} == columns
    rewrite(folder / "iid-fsl_sage-seed2" / "summary.json", {"peak_memory": {}})
    row = cells(results_table(read_sweep(folder)), "iid-fsl_sage")
    assert {row[header] for header in columns} == {UNKNOWN}


def test_seconds_on_a_busy_host_are_marked(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "study", FSL_SAGE)
    rewrite(folder / "iid-fsl_sage-seed1" / "metrics.jsonl", {"host_busy": 0.5})
    row = cells(results_table(read_sweep(folder)), "iid-fsl_sage")
    assert row["training seconds"] == "22.00 (busy host)"
    assert row["wire, MiB"] == "12.00"


def test_variants_are_listed_with_their_keys(tmp_path: Path) -> None:
    table = variants_table(read_sweep(write_sweep(tmp_path / "study", {})))
    assert table.rows[1] == ["iid-splitfed_v1", "data.partition=iid, algorithm.name=splitfed_v1"]


@pytest.mark.parametrize("width", [60, 80, 300])
def test_columns_go_on_below_where_a_terminal_is_narrow(width: int, tmp_path: Path) -> None:
    sweep = read_sweep(write_sweep(tmp_path / "study", {**FSL_SAGE, **SPLITFED}, sweep=COMPARED))
    console = Console(width=width, record=True, file=(tmp_path / "screen").open("w"), highlight=False)
    show_sweep(sweep, console)
    lines = console.export_text().splitlines()
    rows = [line for line in lines if line.lstrip().startswith("iid-fsl_sage ")]
    shown = " ".join(rows)
    tables = [results_table(sweep), differences_table(sweep)]
    assert all(cell in shown for table in tables for cell in cells(table, "iid-fsl_sage").values())
    assert max(map(len, rows)) <= width
    assert len(rows) == 2 or width < 300
    assert any(line.startswith("5 of 12 runs are complete") for line in lines)


def points(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep whose report has been written, by the command line."""
    accuracies: dict[str, list[float | None]] = {
        f"{partition}-{algorithm}-seed{seed}": [0.125, None, 0.25 + seed / 8, 0.5 + seed / 8]
        for partition, algorithm, seeds in (
            ("iid", "fsl_sage", 3),
            ("iid", "splitfed_v1", 2),
            ("skewed", "fsl_sage", 1),
        )
        for seed in range(seeds)
    }
    folder = write_sweep(tmp_path_factory.mktemp("sweep") / "study", accuracies, sweep=COMPARED)
    assert main(["report", str(folder)]) == 0
    return folder


def test_a_report_has_figures_for_each_reference_and_their_data(report: Path) -> None:
    names = {path.name for path in (report / "report").iterdir()}
    accuracy = [f"accuracy-{what}" for what in ("rounds", "paper-bytes", "wire-bytes", "seconds")]
    stems = {f"{partition}-{what}" for partition in ("iid", "skewed") for what in accuracy}
    drift = {f"{partition}-drift" for partition in ("iid", "skewed")}
    assert names == {
        *("report.html", "report.md"),
        *(f"{stem}.{ending}" for stem in stems for ending in ("png", "pdf", "csv")),
        *(f"{stem}.{ending}" for stem in drift for ending in ("png", "pdf")),
    }
    page = (report / "report" / "report.md").read_text()
    assert set(re.findall(r"\]\((.*?)\)", page)) == {f"{stem}.png" for stem in stems | drift}
    assert "6 of 12 runs are complete; not begun: " in page
    for heading in ("Results", "Differences to the reference", "Accuracy: iid", "Variants"):
        assert f"\n## {heading}\n" in page
    html = (report / "report" / "report.html").read_text()
    assert html.count('<figure class="narrow">') == len(stems)


def test_figures_are_as_wide_as_a_column(report: Path) -> None:
    figures = list((report / "report").glob("*accuracy*.png"))
    assert figures
    for path in figures:
        width, height = struct.unpack(">II", path.read_bytes()[16:24])
        assert width == 3.5 * 300
        assert height < width
        boxes = re.findall(rb"/MediaBox \[ 0 0 ([\d.]+) [\d.]+ \]", path.with_suffix(".pdf").read_bytes())
        assert [float(box) for box in boxes] == [3.5 * 72]


@pytest.mark.parametrize(
    ("figure", "key"),
    [
        ("rounds", "round"),
        ("paper-bytes", "paper_bytes_total"),
        ("wire-bytes", "wire_bytes_total"),
        ("seconds", "elapsed_seconds"),
    ],
)
def test_the_data_beside_a_figure_are_those_of_the_runs(figure: str, key: str, report: Path) -> None:
    rows = points(report / "report" / f"iid-accuracy-{figure}.csv")
    assert list(rows[0]) == list(dict.fromkeys(["variant", "seed", "round", key, "test_accuracy"]))
    sweep = read_sweep(report)
    expected = [
        (variant, seed, line["round"], line[key], line["test_accuracy"])
        for variant in ("iid-fsl_sage", "iid-splitfed_v1")
        for seed, run in sweep.complete(variant).items()
        for line in run.lines
        if line["test_accuracy"] is not None
    ]
    assert len(expected) == 5 * 3
    assert [
        (row["variant"], int(row["seed"]), int(row["round"]), float(row[key]), float(row["test_accuracy"]))
        for row in rows
    ] == expected


def test_curves_are_named_by_what_sets_them_apart(tmp_path: Path) -> None:
    sweep_page = importlib.import_module("fslsage_rpc.report.sweep_page")
    variants = {
        "partition": {"iid": ["data.partition=iid"], "skewed": []},
        "algorithm": {"fsl_sage": [], "splitfed_v1": ["algorithm.name=splitfed_v1"]},
        "interval": {"l2": [], "l7": ["algorithm.align_every=7"]},
        "partition x algorithm": [],
        "skewed x fsl_sage x interval": [],
        "alone": ["algorithm.name=fedavg"],
    }
    names = ("iid-fsl_sage", "iid-splitfed_v1", "skewed-splitfed_v1", "skewed-fsl_sage-l2")
    runs: dict[str, list[float | None]] = {
        f"{name}-seed0": [0.5] * 4 for name in (*names, "skewed-fsl_sage-l7", "alone")
    }

    def labels(folder: str, **keys: Any) -> dict[str, list[str]]:
        written = write_sweep(tmp_path / folder, runs, sweep={"variants": variants, "seeds": [0], **keys})
        sets = sweep_page.drawn_together(read_sweep(written))
        return {each.name: [one.name for one in each.series] for each in sets}

    assert labels("with", reference="splitfed_v1") == {
        "iid": ["FSL-SAGE", "SplitFedV1"],
        "skewed": ["SplitFedV1", "FSL-SAGE, l2", "FSL-SAGE, l7"],
        "others": ["FedAvg"],
    }
    (together,) = labels("without").values()
    assert together == [
        *("iid, FSL-SAGE", "iid, SplitFedV1", "skewed, SplitFedV1"),
        *("skewed, FSL-SAGE, l2", "skewed, FSL-SAGE, l7", "FedAvg"),
    ]
    assert list(labels("one", reference="alone")) == [""]


def test_side_by_side_an_algorithm_keeps_its_colour_and_all_differ_without() -> None:
    looks = importlib.import_module("fslsage_rpc.report.looks")
    found = looks.looks_side_by_side(["fsl_sage", "fsl_sage", "cse_fsl", "fsl_sage", "fedavg"])
    for place, algorithm in ((0, "fsl_sage"), (2, "cse_fsl"), (4, "fedavg")):
        assert found[place].color == looks.color_of(algorithm)
    assert len({look.color for look in found}) == len(found)
    assert len({str(look.style) for look in found}) == len({look.marker for look in found}) == len(found)


def test_out_and_format_are_as_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_sweep(tmp_path / "study", FSL_SAGE)
    out = tmp_path / "out"
    assert main(["report", str(folder), "--out", str(out), "--format", "svg"]) == 0
    assert {path.suffix for path in out.iterdir()} == {".html", ".md", ".svg", ".csv"}
    assert not (folder / "report").exists()
    printed = capsys.readouterr().out
    assert "0.375 ± 0.311" in printed
    assert printed.splitlines()[-2].startswith("3 of 12 runs are complete; not begun: iid-splitfed_v1-seed0,")
    assert printed.splitlines()[-1] == f"Report: {out / 'report.html'}"


def test_a_sweep_that_has_not_begun_has_a_report(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "study", {}, sweep=COMPARED)
    assert main(["report", str(folder)]) == 0
    assert "0 of 12 runs are complete" in (folder / "report" / "report.md").read_text()


def test_without_matplotlib_the_terminal_has_its_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = fslsage_rpc.report
    for name in [name for name in sys.modules if name.startswith(f"{package.__name__}.")]:
        monkeypatch.setattr(package, name.rpartition(".")[2], sys.modules[name])  # to be put back
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = write_sweep(tmp_path / "study", FSL_SAGE)
    assert main(["report", str(folder)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert any("0.375 ± 0.311" in line for line in printed)
    assert printed[-2].startswith("3 of 12 runs are complete")
    assert printed[-1] == "The page and its figures need matplotlib: pip install 'fslsage_rpc[plots]'"
    assert not (folder / "report").exists()


def test_a_sweep_is_reported_alone(tmp_path: Path) -> None:
    sweep, run = write_sweep(tmp_path / "study", FSL_SAGE), write_run(tmp_path / "run", [0.5])
    assert (
        refused(str(run), str(sweep))
        == f"RUN: got 2, of which '{sweep}' is a sweep's, expected that one alone"
    )
    assert refused(str(sweep), "--label", "a") == "--label: got 'a' for a sweep, whose variants have names"
    assert refused(str(run)) == ("the following arguments are required: --out (see fslsage report --help)")
    assert refused(str(sweep), "--format", "gif") == (
        "--format: got 'gif', expected one or more of png, svg and pdf, as png,pdf"
    )


def refused(*arguments: str) -> str:
    """The line by which the command refuses these."""
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr("fslsage_rpc.cli._report", lambda error: said.append(str(error)))
        assert main(["report", *arguments]) == 2
    (line,) = said
    return line


def write(path: Path, text: str) -> None:
    path.write_text(text)


DAMAGES = {
    "sweep.yaml": (
        lambda folder: write(folder / "sweep.yaml", "color: red"),
        "whose sweep.yaml cannot be used (color: unknown key",
    ),
    "no variants": (
        lambda folder: write(folder / "sweep.yaml", "name: a"),
        "whose sweep.yaml cannot be used (sweep.variants: got {}",
    ),
    "metrics": (
        lambda folder: write(folder / "iid-fsl_sage-seed0" / "metrics.jsonl", "{}\n"),
        "metrics.jsonl: line 1 is damaged, expected the figures of a round",
    ),
    "summary": (
        lambda folder: write(folder / "iid-fsl_sage-seed0" / "summary.json", "["),
        "summary.json: cannot be read as JSON",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_one_line(damage: str, tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "study", FSL_SAGE)
    change, said = DAMAGES[damage]
    change(folder)
    assert said in mistake(read_sweep, folder)


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    write_whole(tmp_path / "whole", b"\xff")
    write_whole(tmp_path / "whole", "é\udcff")  # part of a path that is no UTF-8
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path / "folder", "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "whole"]
    assert (tmp_path / "whole").read_text() == "é?"
