"""The report: runs and benches side by side, as `report.html`, the same as `report.md`, and its figures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fslsage_rpc.errors import InputError
from fslsage_rpc.report import tables
from fslsage_rpc.report.figures import Bar, Curve, Panel, bars_figure, curves_figure, rendered
from fslsage_rpc.report.looks import Look, color_of, looks_of
from fslsage_rpc.report.page import FORMATS, Block, Heading, Page, Picture, to_html, to_markdown
from fslsage_rpc.report.series import Series, assignment, group, value_of
from fslsage_rpc.report.sources import Line, SavedBench, Tree, read
from fslsage_rpc.runs.places import write_whole
from fslsage_rpc.units import unit_of
from fslsage_rpc.version import __version__

SETTING = ("data.name", "data.partition", "model.name", "model.cut", "clients.count", "clients.batch_size")
"""keys that say what was trained, named where all runs agree on them"""
BAR_LABEL = "seconds per round, mean over the client ranks"
BAR_TEXT = (
    "Compute is data, forward and backward passes and gradient estimates; wait is waiting for room in the "
    "upload window, for gradients and for the end of the round; alignment is waiting for a fitted auxiliary "
    "model; averaging is that of the client weights."
)
BENCH_TEXT = (
    "A sample is a whole alignment interval, its value the mean seconds per round within it. A ratio below 1 "
    "is faster than the reference. The lower bound is what the same measured pieces would take with perfect "
    "overlap. On a busy host, where others had more than 5 % of the cores in a sample or more, ratios and "
    "efficiencies are not to be trusted."
)


def write_report(
    paths: Sequence[str], out: str, labels: Sequence[str] = (), formats: Sequence[str] = ("png",)
) -> Path:
    """Compare the runs and benches in these folders; write the report into the folder `out`.

    Args:
        labels: names for the runs and benches, one for each path; none: they are named by what differs.
        formats: those of `FORMATS` in which figures are written.

    Returns:
        The HTML file.

    Raises:
        InputError: a folder is neither of a run nor of a bench, labels are too few, too many or ambiguous, or
            `out` cannot be written.
    """
    runs, benches = read(paths, labels)
    return save(compose(group(runs), benches, formats), out)


def save(page: Page, out: str) -> Path:
    """Write a page and the files of its pictures into a folder.

    Returns:
        The HTML file.

    Raises:
        InputError: the folder cannot be written.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for picture in page.pictures:
            for name, contents in picture.files.items():
                write_whole(folder / name, contents)
        write_whole(folder / "report.md", to_markdown(page))
        write_whole(folder / "report.html", to_html(page))
    except OSError as error:
        raise InputError(
            f"--out: got {out!r}, expected a folder that can be written ({error.strerror})"
        ) from None
    return folder / "report.html"


def compose(
    series: Sequence[Series], benches: Sequence[SavedBench], formats: Sequence[str] = ("png",)
) -> Page:
    """The page with all its figures drawn."""
    blocks: list[Block] = []
    if series:
        blocks += _runs(series, formats)
    for number, bench in enumerate(benches, start=1):
        blocks += _bench(bench, f"latency-bench-{number}" if len(benches) > 1 else "latency-bench", formats)
    blocks += [Heading("Where it was measured"), *environments(series, benches)]
    blocks += [Heading("What was read"), tables.folders_table(series, benches)]
    return Page(f"Report of fslsage_rpc {__version__}", blocks)


def picture(figure: Figure, name: str, formats: Sequence[str], caption: str) -> Picture:
    """A figure as files of this name in the formats."""
    images = {format: rendered(figure, format) for format in {"png", *formats}}
    files = {f"{name}.{format}": images[format] for format in FORMATS if format in formats}
    return Picture(images["png"], files, caption)


def _runs(series: Sequence[Series], formats: Sequence[str]) -> list[Block]:
    looks = _looks(series)
    bars = [
        Bar(one.label + tables.diverged(one), looks[one.name].color, tables.mean_parts(one)) for one in series
    ]
    caption = f"Where a round's time goes. {BAR_TEXT} Lower bounds come from a bench."
    blocks: list[Block] = [Heading("Runs"), tables.runs_table(series), _reading(series)]
    if settings := tables.settings_table(series):
        blocks += [Heading("Settings that set them apart", 3), settings]
    return [
        *blocks,
        *_accuracy(series, looks, formats),
        Heading("Seconds per round", 3),
        picture(bars_figure(bars, BAR_LABEL), "latency", formats, caption),
        tables.parts_table(bars),
        *drift(series, looks, formats),
    ]


def _reading(series: Sequence[Series]) -> str:
    """How to read the table of runs."""
    common = [
        assignment(series[0].config, key)
        for key in SETTING
        if len({repr(value_of(one.config, key)) for one in series}) == 1
    ]
    trained = f"The same in all: {', '.join(common)}. " if common else ""
    seeds = "Over several seeds: the mean (lowest to highest). "
    median = (
        "The median is over whole alignment intervals, the first left out, of the mean seconds per round in "
        f"each; {tables.UNKNOWN} where there are too few of them or the run is unfinished. "
    )
    ledgers = (
        "Wire bytes are those of all kinds, evaluation's too; the paper ledger is a model, not a measurement."
    )
    busy = "On a busy host, where others had more than 5 % of the cores, seconds are not to be trusted. "
    losses = (
        "Train losses over all batches and over the server's uploads are not to be compared. Accuracies are "
        "of rounds in which losses and weights are finite. "
    )
    return trained + seeds + losses + median + busy + ledgers


def _accuracy(series: Sequence[Series], looks: Mapping[str, Look], formats: Sequence[str]) -> list[Block]:
    heading = Heading("Accuracy", 3)
    scored = [one for one in series if any(map(tables.accuracies, one.runs))]
    if not scored:
        return [heading, "No round has a test accuracy."]
    without = "; ".join(one.label for one in series if one not in scored)
    curves = curves_of(scored, looks)
    seeds = over_seeds(scored)
    wire, wire_unit = unit_along(scored, "wire_bytes_total")
    paper, paper_unit = unit_along(scored, "paper_bytes_total")
    panels = {
        "rounds": [Panel(_round, test_accuracy, "round", "test accuracy", whole_numbers=True)],
        "seconds": [
            Panel(
                lambda line: line["elapsed_seconds"],
                test_accuracy,
                "training clock, seconds",
                "test accuracy",
            )
        ],
        "bytes": [
            Panel(
                lambda line: line["wire_bytes_total"] / wire,
                test_accuracy,
                f"bytes on the wire, {wire_unit}",
                "test accuracy",
                "measured",
            ),
            Panel(
                lambda line: line["paper_bytes_total"] / paper,
                test_accuracy,
                f"paper ledger, {paper_unit}",
                "test accuracy",
                "modelled",
            ),
        ],
    }
    return [
        heading,
        *([f"Without a test accuracy: {without}."] if without else []),
        *coinciding(scored),
        *(
            picture(
                curves_figure(curves, what), f"accuracy-{name}", formats, f"Accuracy against {name}. {seeds}"
            )
            for name, what in panels.items()
        ),
    ]


def over_seeds(series: Sequence[Series]) -> str:
    """How curves of several seeds are to be read."""
    seeds = "Mean over seeds, round by round; the band runs from the lowest to the highest."
    if any(len({len(run.lines) for run in one.runs}) > 1 for one in series):
        seeds += " Beyond the last round that all seeds have, each goes on as a thin line."
    return seeds


def coinciding(series: Sequence[Series]) -> list[str]:
    """A sentence for each set of series that have the same accuracy in all rounds and seeds."""
    labels: dict[str, list[str]] = {}
    for one in series:
        scores = [
            json.dumps([run.config["seed"], [(line["round"], line["test_accuracy"]) for line in run.lines]])
            for run in one.runs
        ]
        labels.setdefault("".join(sorted(scores)), []).append(one.label)
    return [
        f"The same accuracy in every round, so that one curve hides the other: {'; '.join(group)}."
        for group in labels.values()
        if len(group) > 1
    ]


def drift(
    series: Sequence[Series], looks: Mapping[str, Look], formats: Sequence[str], name: str = "drift"
) -> list[Block]:
    """How far the estimated gradients are from the true ones; nothing where no algorithm estimates any.

    Args:
        name: of the figure's files.
    """
    drifting = [
        one
        for one in series
        if any(_drift_of(line, "cosine") is not None for run in one.runs for line in run.lines)
    ]
    if not drifting:
        return []
    panels = [
        Panel(
            _round,
            lambda line: _drift_of(line, "cosine"),
            "round",
            "cosine of estimate and true gradient",
            "direction: 1 is perfect",
            whole_numbers=True,
        ),
        Panel(
            _round,
            lambda line: _drift_of(line, "nmse"),
            "round",
            "squared error / squared true gradient",
            "error: 0 is perfect",
            whole_numbers=True,
            y_over_decades=True,
        ),
    ]
    figure = curves_figure(
        curves_of(drifting, looks), panels, mark=lambda line: line.get("alignment") is not None
    )
    caption = (
        "Drift of the gradient estimate, mean over clients and over seeds, with a band from the lowest to "
        "the highest seed. Markers: rounds in which clients take up a fitted auxiliary model."
    )
    return [Heading("Drift of the estimate", 3), picture(figure, name, formats, caption)]


def _bench(bench: SavedBench, file: str, formats: Sequence[str]) -> list[Block]:
    title = f"Bench {bench.name}"
    blocks: list[Block] = [Heading(title), tables.bench_table(bench), BENCH_TEXT]
    bars = [
        Bar(
            tables.variant_label(bench, variant),
            color_of(variant.algorithm),
            variant.parts,
            variant.bound_seconds,
        )
        for variant in bench.variants
        if any(seconds is not None for seconds in variant.parts.values())
    ]
    if bars:
        caption = f"Mean seconds per round of {title} against the lower bound. {BAR_TEXT}"
        figure = picture(bars_figure(bars, BAR_LABEL), file, formats, caption)
        blocks += [figure, tables.parts_table(bars)]
    if target := tables.target_table(bench):
        reached = f"{tables.UNKNOWN} where a variant did not reach it in every repeat."
        blocks += [Heading("To the target accuracy", 3), target, reached]
    return blocks


def environments(series: Sequence[Series], benches: Sequence[SavedBench]) -> list[Block]:
    """Each environment once, with what was measured in it."""
    measured: dict[str, tuple[Tree, list[str]]] = {}
    same = len({json.dumps(run.environment, sort_keys=True) for one in series for run in one.runs}) == 1
    for label, environment in [
        *(("All runs" if same else one.label, run.environment) for one in series for run in one.runs),
        *((f"bench {bench.name}", bench.environment) for bench in benches),
    ]:
        _, labels = measured.setdefault(json.dumps(environment, sort_keys=True), (environment, []))
        if label not in labels:
            labels.append(label)
    blocks: list[Block] = []
    for environment, labels in measured.values():
        if len(measured) > 1:
            blocks.append(f"{'; '.join(labels)}:")
        blocks.append(
            tables.environment_table(environment) if environment else "The environment is not recorded."
        )
    return blocks


def _looks(series: Sequence[Series]) -> dict[str, Look]:
    """How each series looks, by its name: the finished and the unfinished runs of one look alike."""
    algorithms = {one.name: one.algorithm for one in series}
    return dict(zip(algorithms, looks_of(list(algorithms.values())), strict=True))


def curves_of(series: Sequence[Series], looks: Mapping[str, Look]) -> list[Curve]:
    """A curve for each series, with the look under its name."""
    return [
        Curve(one.label, looks[one.name], [run.lines for run in one.runs], one.finished) for one in series
    ]


def unit_along(series: Sequence[Series], key: str) -> tuple[int, str]:
    """The unit of bytes for the longest curve."""
    return unit_of(max(run.lines[-1][key] for one in series for run in one.runs))


def _round(line: Line) -> float:
    number: float = line["round"]
    return number


def test_accuracy(line: Line) -> float | None:
    """The measure of most figures; None in a round that was not evaluated."""
    accuracy: float | None = line["test_accuracy"]
    return accuracy


def _drift_of(line: Line, key: str) -> Any:
    return (line.get("drift") or {}).get(key)
