"""Reports of unlike runs: labels that fit and differ, colours, legends, and the formats of figures."""

from pathlib import Path

import pytest

from fslsage_rpc.cli import main
from fslsage_rpc.errors import InputError
from support.report_folders import write_bench, write_run

pytest.importorskip("matplotlib")
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from fslsage_rpc.report import comparison, tables
from fslsage_rpc.report.figures import Curve, Panel, curves_figure
from fslsage_rpc.report.labels import fitted
from fslsage_rpc.report.looks import looks_of
from fslsage_rpc.report.page import to_markdown
from fslsage_rpc.report.series import Series, group
from fslsage_rpc.report.sources import read

OKABE_ITO = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}
KEYS = 17
PANEL = Panel(lambda line: line["round"], lambda line: line["test_accuracy"], "round", "accuracy")


def unlike(folder: Path, number: int, *, finished: bool = True) -> Path:
    """A run that differs from those of other numbers in 17 keys."""
    return write_run(
        folder,
        [0.1, 0.2 + number / 100],
        finished=finished,
        rounds=30 + number,
        clients={"count": 4 + number, "batch_size": 16 + number, "participation": 1 - number / 100},
        data={"alpha": 1.0 + number, "train_limit": 200 + number},
        algorithm={
            "upload_every": 1 + number,
            "align_every": 2 + number,
            "alignment": {"epochs": 10 + number, "batch_size": 100 + number, "buffer_size": 200 + number},
        },
        optimizer={part: {"lr": (1 + number) / 1000} for part in ("client", "server", "auxiliary")},
        loss={"label_smoothing": number / 100},
        comm={"upload_window": 1 + number},
        stop={"accuracy": 0.5 + number / 100},
    )


def series_of(*folders: Path, labels: tuple[str, ...] = ()) -> list[Series]:
    return group(read([str(folder) for folder in folders], labels)[0])


def labels_of(*folders: Path, labels: tuple[str, ...] = ()) -> list[str]:
    return [one.label for one in series_of(*folders, labels=labels)]


def test_runs_that_differ_in_many_keys_have_their_folders_names(tmp_path: Path) -> None:
    last = f"a-long-name-of-a-run-that-{'did-not-end-' * 5}b"
    runs = [unlike(tmp_path / "warm", 2), unlike(tmp_path / "cold", 1)]
    series = series_of(*runs, unlike(tmp_path / last, 3, finished=False))
    labels = [one.label for one in series]
    assert labels == ["warm", "cold", "a-long-name-of…did-not-end-b, unfinished"]
    assert max(map(len, labels)) == 40
    table = tables.settings_table(series)
    assert table is not None
    assert table.headers[1:] == labels
    rows = {row[0]: row[1:] for row in table.rows}
    assert len(rows) == 1 + KEYS
    assert rows["algorithm.name"] == ["fsl_sage"] * 3
    assert rows["clients.count"] == ["6", "5", "7"]


def test_runs_that_differ_in_few_keys_keep_their_settings(tmp_path: Path) -> None:
    one_key = [write_run(tmp_path / f"{every}", [0.5], algorithm={"align_every": every}) for every in (2, 3)]
    assert labels_of(*one_key) == [f"FSL-SAGE, algorithm.align_every={every}" for every in (2, 3)]
    assert tables.settings_table(series_of(*one_key)) is None
    more = write_run(tmp_path / "more", [0.5], algorithm={"align_every": 2}, clients={"count": 8})
    series = series_of(one_key[0], more)
    assert [one.label for one in series] == ["FSL-SAGE, clients.count=4", "FSL-SAGE, clients.count=8"]
    series = series_of(one_key[1], more)
    assert [one.label for one in series] == [
        "FSL-SAGE, align_every=2, count=8",
        "FSL-SAGE, align_every=3, count=4",
    ]
    assert tables.settings_table(series) is not None


def test_keys_with_the_same_last_word_are_not_cut_to_it(tmp_path: Path) -> None:
    folders = [
        write_run(
            tmp_path / name,
            [0.5],
            clients={"batch_size": size},
            algorithm={"alignment": {"batch_size": size}},
        )
        for name, size in (("a", 8), ("b", 9))
    ]
    assert labels_of(*folders) == ["a", "b"]


def test_folders_of_the_same_name_are_told_apart_by_their_parents(tmp_path: Path) -> None:
    names = ("x/one/run", "y/one/run", "x/two/run", "x/other")
    folders = [unlike(tmp_path / name, number) for number, name in enumerate(names)]
    assert labels_of(*folders) == ["x/one/run", "y/one/run", "two/run", "other"]
    benches = [write_bench(tmp_path / parent / "bench") for parent in ("x", "y")]
    page = to_markdown(comparison.compose([], read([str(bench) for bench in benches])[1]))
    assert "## Bench x/bench\n" in page
    assert "## Bench y/bench\n" in page


def test_seeds_without_a_name_of_their_own_are_one_curve(tmp_path: Path) -> None:
    seeds = [write_run(tmp_path / f"seed{seed}", [0.5], seed=seed) for seed in range(3)]
    assert labels_of(*seeds, unlike(tmp_path / "else", 1)) == ["seed0 and 2 more", "else"]


@pytest.mark.parametrize(
    "names",
    [
        ["short", "s" * 41],
        [f"{'a' * 60}{number}" for number in range(20)],
        [f"{number}{'a' * 60}" for number in range(20)],
        [f"{'a' * 25}{number}{'b' * 15}" for number in range(10)],
        [f"{'a' * 60}{number}{'b' * 60}" for number in range(200)],
        ["a" * 41, f"{'a' * 20}…{'a' * 19}"],
    ],
)
def test_long_names_are_cut_so_that_they_still_differ(names: list[str]) -> None:
    for ending in ("", ", unfinished"):
        cut = [name + ending for name in fitted(names, [ending] * len(names))]
        assert max(map(len, cut)) <= 40
        assert len(set(cut)) == len(names)
        assert all("…" in label for label, name in zip(cut, names, strict=True) if len(name) > 40)


def test_a_name_is_one_line_of_text() -> None:
    assert fitted(["two\nlines", "not\udce9UTF-8"], ["", ""]) == ["two lines", "not?UTF-8"]


def test_labels_by_hand_are_those_of_the_runs_in_their_order(tmp_path: Path) -> None:
    runs = [str(write_run(tmp_path / f"{seed}", [0.5, 0.6], seed=seed)) for seed in range(2)]
    other = str(write_run(tmp_path / "other", [0.5, 0.7], algorithm={"name": "fedavg"}))
    bench, out = str(write_bench(tmp_path / "bench")), str(tmp_path / "out")
    names = ["--label", "Fed_Avg", "--label", "Sage", "--label", "Sage"]
    assert main(["report", other, *names, *runs, bench, "--label", "Times", "--out", out]) == 0
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| Fed_Avg | 0 | 2 |" in page
    assert "| Sage | 0, 1 | 2 |" in page
    assert "| algorithm.name | fedavg | fsl_sage |" in page
    assert "## Bench Times\n" in page
    assert "FSL-SAGE |" not in page


def test_seeds_with_unlike_labels_are_several_curves(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"{seed}", [0.5], seed=seed) for seed in range(3)]
    series = series_of(*folders, labels=("b", "a", "b"))
    assert [(one.label, len(one.runs)) for one in series] == [("b", 2), ("a", 1)]


def test_a_folder_that_is_named_twice_has_one_label(tmp_path: Path) -> None:
    run = unlike(tmp_path / "run", 0)
    assert labels_of(run, run, labels=("a", "a")) == ["a"]
    with pytest.raises(InputError, match="--label: got more than one for"):
        labels_of(run, run, labels=("a", "b"))


REFUSALS = {
    "too few": (["--label", "a"], "--label: got 1 for 2 RUNs, expected one for each, in their order"),
    "too many": (["--label", "a"] * 3, "--label: got 3 for 2 RUNs, expected one for each, in their order"),
    "empty": (["--label", "a", "--label", " "], "--label: got an empty one, expected a name"),
    "the same": (["--label", "a", "--label", "a"], "expected different ones for runs that are not seeds"),
    "an unknown format": (
        ["--format", "png,jpg"],
        "--format: got 'png,jpg', expected one or more of png, svg and pdf, as png,pdf",
    ),
    "no format": (["--format", ""], "--format: got '', expected one or more of png, svg and pdf"),
}


@pytest.mark.parametrize("mistake", REFUSALS)
def test_wrong_options_are_one_line(mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, message = REFUSALS[mistake]
    folders = [str(unlike(tmp_path / f"{number}", number)) for number in range(2)]
    assert main(["report", *folders, *options, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", [2, 6, 14, 35])
def test_curves_of_one_algorithm_can_be_told_apart(count: int) -> None:
    looks = looks_of(["fsl_sage"] * count)
    assert {look.color for look in looks} <= OKABE_ITO
    assert len({look.color for look in looks}) == min(count, 7)
    assert len({(look.color, str(look.style)) for look in looks}) == count
    assert len({look.marker for look in looks}) == min(count, 8)


def test_curves_and_bars_of_a_run_have_one_colour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(comparison, "rendered", lambda figure, form: figures.append(figure) or b"")
    series = series_of(*(unlike(tmp_path / f"{number}", number) for number in range(3)))
    comparison.compose(series, [])
    handles = figures[0].legends[0].legend_handles
    curves = [handle.get_color().lower() for handle in handles]
    assert len(set(curves)) == 3
    bars = next(figure for figure in figures if "per round" in figure.axes[0].get_xlabel())
    assert [to_hex(patch.get_facecolor()) for patch in bars.axes[0].patches[::5]] == curves


def test_the_legend_of_14_unlike_runs_is_less_than_a_third(tmp_path: Path) -> None:
    folders = [unlike(tmp_path / f"{'a-long-name-' * 5}{number}", number) for number in range(14)]
    series = series_of(*folders)
    curves = [
        Curve(one.label, look, [run.lines for run in one.runs])
        for one, look in zip(series, looks_of([one.algorithm for one in series]), strict=True)
    ]
    figure = curves_figure(curves, [PANEL])
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert legend.height < figure.bbox.height / 3
    assert legend.x0 >= 0
    assert legend.x1 <= figure.bbox.width


@pytest.mark.parametrize(
    ("formats", "shown"),
    [
        ("png,pdf,svg", "![Where a round's time goes](latency.png)"),
        ("pdf,svg", "![Where a round's time goes](latency.svg)"),
        ("pdf", "\n[Where a round's time goes](latency.pdf)"),
    ],
)
def test_figures_are_written_in_each_format(formats: str, shown: str, tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "run", [None, None], algorithm={"name": "fedavg"}), tmp_path / "out"
    assert main(["report", str(run), "--out", str(out), "--format", formats]) == 0
    beginnings = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}
    files = [path for path in out.iterdir() if path.stem == "latency"]
    assert {path.suffix for path in files} == {f".{format}" for format in formats.split(",")}
    assert all(path.read_bytes().startswith(beginnings[path.suffix]) for path in files)
    assert shown in (out / "report.md").read_text()
    assert 'src="data:image/png;base64,' in (out / "report.html").read_text()
    if "pdf" in formats:
        assert b"/Type3" not in (out / "latency.pdf").read_bytes()
