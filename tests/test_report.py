"""`fslsage report`: which runs are one curve, what the tables say, and what the figures look like."""

import html.parser
import json
import re
import sys
from pathlib import Path

import pytest

import fslsage_rpc
from fslsage_rpc.algorithms import ALGORITHMS
from fslsage_rpc.cli import main
from support.report_folders import line, write_bench, write_run

pytest.importorskip("matplotlib")
from matplotlib import image
from matplotlib.colors import to_hex

from fslsage_rpc.report import comparison, tables
from fslsage_rpc.report.figures import Bar, Curve, Panel, bars_figure, curves_figure
from fslsage_rpc.report.looks import ALGORITHMS as LOOKS
from fslsage_rpc.report.looks import look_of
from fslsage_rpc.report.page import Page, Picture, Table, to_html, to_markdown
from fslsage_rpc.report.series import Series, group
from fslsage_rpc.report.sources import parts_of, read


def series_of(*folders: Path) -> list[Series]:
    return group(read([str(folder) for folder in folders])[0])


def cells(table: Table, label: str) -> dict[str, str]:
    """The row of a table under its headers."""
    (row,) = [row for row in table.rows if row[0] == label]
    return dict(zip(table.headers, row, strict=True))


def test_seeds_of_one_configuration_are_one_series(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"run{seed}", [0.5], seed=seed, resume="never") for seed in (2, 0, 1)]
    (one,) = series_of(*folders, folders[0])
    assert one.label == "FSL-SAGE"
    assert tables.runs_table([one]).rows[0][1] == "0, 1, 2"


def test_labels_say_what_differs(tmp_path: Path) -> None:
    labels = [
        one.label
        for one in series_of(
            write_run(tmp_path / "a", [0.5], algorithm={"name": "fedavg"}, clients={"count": 8}),
            write_run(tmp_path / "b", [0.5], algorithm={"align_every": 10}, clients={"count": 20}),
            write_run(tmp_path / "c", [0.5], algorithm={"align_every": 5}, clients={"count": 8}),
            write_run(tmp_path / "d", [0.5], algorithm={"align_every": None}, clients={"count": 8}),
        )
    ]
    assert labels == [
        "FSL-SAGE, align_every=5, count=8",
        "FSL-SAGE, align_every=10, count=20",
        "FSL-SAGE, align_every=null, count=8",
        "FedAvg, count=8",
    ]


def test_keys_that_the_algorithm_does_not_read_make_no_difference(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / f"{every}", [0.5], algorithm={"name": "splitfed_v1", "align_every": every})
        for every in (5, 10)
    ]
    assert [one.label for one in series_of(*folders)] == ["SplitFedV1"]


def test_ranks_are_those_that_there_were(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "a", [0.5], seed=0, ranks=3),
        write_run(tmp_path / "b", [0.5], seed=1, ranks=5),
    ]
    assert [one.label for one in series_of(*folders)] == ["FSL-SAGE, ranks=3", "FSL-SAGE, ranks=5"]


def test_an_unfinished_run_is_used_as_far_as_it_goes(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", [0.25, None], finished=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"round": 2, "test_acc')
    series = series_of(write_run(tmp_path / "b", [0.5] * 3, seed=1), folder)
    assert [one.label for one in series] == ["FSL-SAGE", "FSL-SAGE, unfinished"]
    row = cells(tables.runs_table(series), "FSL-SAGE, unfinished")
    assert row["rounds"] == "2"
    assert row["last test accuracy"] == "0.2500"
    assert row["seconds per round, median"] == tables.UNKNOWN


def test_the_tables_of_runs_hold_what_was_written(tmp_path: Path) -> None:
    series = series_of(
        write_run(tmp_path / "a", [0.25, 0.75, None, 0.5], seed=0),
        write_run(tmp_path / "b", [0.25, 0.375, None, 0.25], seed=1),
    )
    assert cells(tables.runs_table(series), "FSL-SAGE") == {
        "run": "FSL-SAGE",
        "seeds": "0, 1",
        "rounds": "4",
        "last test accuracy": "0.3750 (0.2500 to 0.5000)",
        "best test accuracy": "0.5625 (0.3750 to 0.7500)",
        "last train loss, over": "0.2500, uploads",
        "seconds per round, median": "5.250",
        "training seconds": "22.00",
        "wire, MiB": "12.00",
        "paper ledger (modelled), MiB": "8.00",
    }
    assert tables.mean_parts(series[0]) == {
        "compute": 1.75,
        "wait": 0.875,
        "averaging": 0.75,
        "alignment": 2.0,
        "other": 0.125,
    }


def test_the_tables_of_a_bench_hold_what_was_written(tmp_path: Path) -> None:
    (bench,) = read([str(write_bench(tmp_path / "bench"))])[1]
    table = tables.bench_table(bench)
    assert [row[0] for row in table.rows] == ["FSL-SAGE: wide", "SplitFedV1: v1 (reference)"]
    assert table.rows[0][1:] == [
        *("4", "5.500 (5.000 to 6.000)", "0.500 (0.438 to 0.625)", "3.000", "0.546", "3.00", "4.00")
    ]
    assert set(table.rows[1][1:]) == {tables.UNKNOWN}
    target = tables.target_table(bench)
    assert target is not None
    assert target.rows[0][1:] == ["0.8", "9", "12.50", "5.00", "6.00"]
    assert set(target.rows[1][1:]) == {tables.UNKNOWN}


def test_what_was_not_measured_is_not_nought() -> None:
    parts = parts_of({"data": None, "estimate": None, "upload_wait": 1.0, "drain_wait": None, "new": 0.5})
    assert parts == {"compute": None, "wait": 1.0, "averaging": None, "alignment": None, "other": 0.5}


class Outside(html.parser.HTMLParser):
    """Collects everything that a page would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [tag] if tag in ("script", "link", "iframe", "a") else []
        self.found += [
            value or ""
            for name, value in attributes
            if name in ("src", "href") and not (value or "").startswith("data:image/png;base64,")
        ]


def test_a_report_of_real_runs_and_a_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        fslsage_rpc.train(
            {
                "name": f"{algorithm}-{seed}",
                "output": str(tmp_path / "runs"),
                "seed": seed,
                "rounds": 2,
                "device": "cpu",
                "clients": {"count": 2, "batch_size": 64},
                "data": {"train_limit": 200, "test_limit": 50},
                "algorithm": {"name": algorithm, "align_every": 2, "alignment": {"epochs": 2}},
            }
        )
        for algorithm, seed in (("fsl_sage", 0), ("fsl_sage", 1), ("fedavg", 0))
    ]
    bench, out = write_bench(tmp_path / "bench"), tmp_path / "out"
    capsys.readouterr()
    assert main(["report", *(str(run.folder) for run in runs), str(bench), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"Report: {out / 'report.html'}\n"
    pictures = {path.name for path in out.glob("*.png")}
    accuracy = {f"accuracy-{against}.png" for against in ("rounds", "seconds", "bytes")}
    assert pictures == {*accuracy, "latency.png", "drift.png", "latency-bench.png"}
    for name in pictures:
        picture = image.imread(str(out / name))
        assert min(picture.shape[:2]) > 200
        assert picture.std() > 0.01, f"{name} is empty"

    markdown, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    outside = Outside()
    outside.feed(page)
    assert outside.found == []
    assert not re.search(r"https?:|url\(|@import", re.sub('base64,[^"]*', "", page))
    assert set(re.findall(r"\]\((.*?)\)", markdown)) == pictures
    assert page.count("data:image/png;base64,") == len(pictures)

    last = runs[2].summary["test_accuracy"]["last"]
    seconds, wire = runs[2].summary["training_seconds"], sum(runs[2].summary["wire_bytes"].values())
    row = next(text for text in markdown.splitlines() if text.startswith("| FedAvg | 0 | 2 |"))
    for number in (f"{last:.4f}", tables.show_seconds(seconds), tables.show_mib(wire)):
        assert f" {number} |" in row
        assert f"<td>{number}</td>" in page


def test_markdown_and_html_say_the_same() -> None:
    page = Page(
        "A | B",
        ["x < y & *z*", Table(["", "s"], [["a|b", "1.5"]]), Picture(b"p", {"p.png": b"p"}, "Two. More.")],
    )
    markdown, html_text = to_markdown(page), to_html(page)
    assert markdown == (
        "# A \\| B\n\nx \\< y & \\*z\\*\n\n|  | s |\n| :--- | ---: |\n| a\\|b | 1.5 |\n\n"
        "![Two](p.png)\n\nTwo. More.\n"
    )
    for text in ("<h1>A | B</h1>", "<p>x &lt; y &amp; *z*</p>", "<td>a|b</td><td>1.5</td>", 'alt="Two"'):
        assert text in html_text


def test_an_algorithm_has_one_colour_everywhere() -> None:
    assert set(LOOKS) == set(ALGORITHMS)
    assert len({color for _, color in LOOKS.values()}) == len(LOOKS)
    for name, (_, color) in LOOKS.items():
        curve = Curve(name, look_of(name), [[line(0, 0.5), line(1, 0.75)]])
        axes = curves_figure([curve], [ROUNDS]).axes[0]
        assert axes.lines[0].get_color() == color
        bars = bars_figure([Bar(name, curve.look.color, {"compute": 1.0, "wait": 2.0})], "seconds").axes[0]
        assert {to_hex(patch.get_edgecolor()).upper() for patch in bars.patches} == {color}


ROUNDS = Panel(lambda line: line["round"], lambda line: line["test_accuracy"], "round", "accuracy")
SECONDS = Panel(
    lambda line: line["elapsed_seconds"], lambda line: line["test_accuracy"], "seconds", "accuracy"
)


def test_curves_are_means_over_seeds_and_leave_out_what_was_not_evaluated() -> None:
    seeds = [
        [line(0, 0.25), line(1, None), line(2, 0.5)],
        [line(0, 0.75), line(1, None), line(2, 1.0), line(3, 0.5)],
    ]
    axes = curves_figure([Curve("a", look_of("fsl_sage"), seeds)], [ROUNDS]).axes[0]
    mean, tail = axes.lines
    assert mean.get_xydata().tolist() == [[1, 0.5], [3, 0.75]]
    assert tail.get_xydata().tolist() == [[3, 1.0], [4, 0.5]]
    band = axes.collections[0].get_paths()[0].vertices
    assert {(1.0, 0.25), (1.0, 0.75), (3.0, 0.5), (3.0, 1.0)} <= set(map(tuple, band.tolist()))


@pytest.mark.parametrize(("slower", "scale"), [(2, "linear"), (50, "log")])
def test_an_axis_is_logarithmic_only_where_it_has_to_be(slower: int, scale: str) -> None:
    fast = Curve("a", look_of("fsl_sage"), [[line(0, 0.5), line(1, 0.75)]])
    slow = [line(round, 0.5, elapsed_seconds=5.5 * slower * (round + 1)) for round in range(2)]
    axes = curves_figure([fast, Curve("b", look_of("fedavg"), [slow])], [SECONDS]).axes[0]
    assert axes.get_xscale() == scale
    assert ("log scale" in axes.get_xlabel()) == (scale == "log")


def test_drift_is_marked_where_there_was_an_alignment(tmp_path: Path) -> None:
    lines = [line(round, None, aligned=round in (1, 4)) for round in range(6)]
    panel = Panel(lambda line: line["round"], lambda line: line["drift"]["cosine"], "round", "cosine")
    curve = Curve("a", look_of("fsl_sage"), [lines])
    figure = curves_figure([curve], [panel], mark=lambda line: line["alignment"] is not None)
    assert figure.axes[0].lines[0].get_markevery() == [1, 4]


def test_legends_do_not_cover_the_axes() -> None:
    curves = [
        Curve(f"{name}, a.long.dotted.key=$\\{value}$", look_of(name), [[line(0, 0.5), line(1, 0.75)]])
        for name in LOOKS
        for value in range(3)
    ]
    figure = curves_figure(curves, [ROUNDS, SECONDS])
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert legend.y0 >= 0
    assert all(axes.get_tightbbox().y0 >= legend.y1 for axes in figure.axes)


def test_runs_without_an_evaluation_are_compared_too(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", [None, None], finished=False, algorithm={"name": "fedavg"})
    page = to_markdown(comparison.compose(series_of(folder), []))
    assert "No round has a test accuracy." in page
    assert "latency.png" in page


def test_equal_curves_are_named(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / name, [0.25, 0.5], algorithm={"name": name})
        for name in ("splitfed_v1", "fedavg")
    ]
    page = to_markdown(comparison.compose(series_of(*folders), []))
    assert "so that one curve hides the other: SplitFedV1; FedAvg." in page


def damage(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder


REFUSALS = {
    "nowhere": (lambda path: path / "x", "No such file or directory"),
    "a file": (lambda path: damage(path, "x", "") / "x", "Not a directory"),
    "not a run": (lambda path: path, "has neither config.yaml nor bench.json; expected a run folder"),
    "no metrics": (
        lambda path: damage(path, "config.yaml", ""),
        "has no metrics.jsonl; expected a run with rounds in it",
    ),
    "no round": (lambda path: write_run(path / "x", []), "has no finished round; expected one or more"),
    "unknown key": (
        lambda path: damage(write_run(path / "x", [0.5]), "config.yaml", "color: red"),
        "whose config.yaml is not of this version (color: unknown key",
    ),
    "damaged line": (
        lambda path: damage(write_run(path / "x", [0.5]), "metrics.jsonl", '{"round": "one"}\n'),
        "metrics.jsonl: line 1 is damaged, expected the figures of a round",
    ),
    "line without accuracy": (
        lambda path: damage(
            write_run(path / "x", [0.5]),
            "metrics.jsonl",
            json.dumps({k: v for k, v in line(0, 0.5).items() if k != "test_accuracy"}) + "\n",
        ),
        "metrics.jsonl: line 1 is damaged, expected the figures of a round",
    ),
    "damaged environment": (
        lambda path: damage(write_run(path / "x", [0.5]), "environment.json", '{"ranks": [1]}'),
        "ranks is damaged, expected a list of mappings",
    ),
    "no JSON": (lambda path: damage(path, "bench.json", "{"), "bench.json: cannot be read as JSON"),
    "no variants": (lambda path: damage(path, "bench.json", "{}"), "got no variants"),
    "text for a number": (
        lambda path: write_bench(path / "x", bound_seconds="fast"),
        "variants.wide.bound_seconds is 'fast', expected a number or null",
    ),
    "number for a mapping": (
        lambda path: write_bench(path / "x", phases=1),
        "variants.wide.phases is int, expected a mapping",
    ),
    "number for bytes by kind": (
        lambda path: write_bench(path / "x", wire_bytes=5),
        "variants.wide.wire_bytes is int, expected a mapping",
    ),
}


@pytest.mark.parametrize("mistake", REFUSALS)
def test_wrong_input_is_one_line(mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, message = REFUSALS[mistake]
    folder = make(tmp_path)
    assert main(["report", str(folder), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(tmp_path) in error or "variants" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_out_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = write_run(tmp_path / "run", [0.5]), damage(tmp_path, "file", "") / "file"
    assert main(["report", str(run), "--out", str(out)]) == 2
    assert capsys.readouterr().err == (
        f"fslsage_rpc: --out: got '{out}', expected a folder that can be written (File exists)\n"
    )


def test_without_matplotlib_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        "fslsage_rpc: report: needs matplotlib: pip install 'fslsage_rpc[plots]'\n"
    )
