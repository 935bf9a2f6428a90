"""The report of a sweep: its tables, and figures that a paper takes as they are, their data beside them."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fslsage_rpc.report import comparison
from fslsage_rpc.report.figures import COLUMN, Curve, Panel, curves_figure
from fslsage_rpc.report.looks import display_name, looks_side_by_side
from fslsage_rpc.report.page import Block, Heading, Page, Picture
from fslsage_rpc.report.series import Series
from fslsage_rpc.report.sources import Line, SavedRun
from fslsage_rpc.report.sweep_tables import (
    READING_DIFFERENCES,
    differences_table,
    reading,
    results_table,
    variants_table,
)
from fslsage_rpc.report.sweeps import SavedSweep, read_sweep
from fslsage_rpc.report.tables import accuracies, folders_table

FORMATS = ("png", "pdf")
"""of figures, where none are asked for"""
AGAINST = {
    "rounds": ("round", "round", "rounds"),
    "paper-bytes": ("paper_bytes_total", "paper ledger (modelled)", "modelled bytes of the paper ledger"),
    "wire-bytes": ("wire_bytes_total", "bytes on the wire (measured)", "measured bytes on the wire"),
    "seconds": ("elapsed_seconds", "training clock, seconds", "seconds of the training clock"),
}
"""by the ending of a figure's files: key of a metrics line, label of the x axis, and its words"""


@dataclass(frozen=True)
class DrawnTogether:
    """Variants in one set of figures: those that are compared with one reference."""

    name: str
    """what they share, with which their files begin; empty where that is nothing"""
    series: list[Series]
    """under their labels in these figures, the complete runs of each"""

    def stem(self, ending: str) -> str:
        """The name of a figure's files."""
        return f"{self.name}-{ending}" if self.name else ending


def write_sweep_report(
    folder: str | Path, out: str | Path | None = None, formats: Sequence[str] = ()
) -> Path:
    """Write the report of the sweep in a folder, also of one that is half done.

    Args:
        out: a folder for it; None: `report` in that of the sweep.
        formats: of figures; none: PNG and PDF.

    Returns:
        The HTML file.

    Raises:
        InputError: the folder is not of a sweep, or is damaged, or `out` cannot be written.
    """
    sweep = read_sweep(folder)
    page = compose(sweep, formats or FORMATS)
    return comparison.save(page, str(Path(folder) / "report" if out is None else out))


def compose(sweep: SavedSweep, formats: Sequence[str]) -> Page:
    """The page with all its figures drawn."""
    blocks: list[Block] = [sweep.progress, Heading("Results"), results_table(sweep), reading(sweep)]
    if differences := differences_table(sweep):
        blocks += [Heading("Differences to the reference"), differences, READING_DIFFERENCES]
    for together in drawn_together(sweep):
        blocks += _figures(together, formats)
    blocks += [Heading("Variants"), variants_table(sweep)]
    there = _series(sweep, [(name, _there(sweep, name)) for name in sweep.variants])
    if there:
        blocks += [Heading("Where it was measured"), *comparison.environments(there, [])]
        blocks += [Heading("What was read"), folders_table(there, [])]
    return Page(f"Sweep {sweep.config.name}", blocks)


def drawn_together(sweep: SavedSweep) -> list[DrawnTogether]:
    """The sets of figures: variants with one reference in each, and those that have none in another."""
    compared = sweep.references
    groups: dict[str | None, list[str]] = {}
    for variant in sweep.variants:
        if sweep.complete(variant):
            groups.setdefault(compared.get(variant), []).append(variant)
    names = {reference: _shared_name(sweep, reference) for reference in groups}
    if len(set(names.values())) < len(names):
        names = {reference: reference or "others" for reference in groups}
    together = []
    for reference, variants in groups.items():
        labels = _labels(sweep, variants)
        runs = [list(sweep.complete(variant).values()) for variant in variants]
        together.append(DrawnTogether(names[reference], _series(sweep, list(zip(labels, runs, strict=True)))))
    return together


def _shared_name(sweep: SavedSweep, reference: str | None) -> str:
    """The parts of a reference but for that which makes it one."""
    if reference is None:
        return "others" if sweep.references else ""
    made_one = sweep.config.sweep.reference
    return (
        "" if reference == made_one else "-".join(p for p in sweep.variants[reference].parts if p != made_one)
    )


def _labels(sweep: SavedSweep, variants: Sequence[str]) -> list[str]:
    """The algorithms, where no other variant has the same, else the parts that not all share."""
    algorithms = [_any_run(sweep, variant).config["algorithm"]["name"] for variant in variants]
    parts = [sweep.variants[variant].parts for variant in variants]
    shared = set(parts[0]).intersection(*parts[1:])
    labels = [
        display_name(algorithm)
        if Counter(algorithms)[algorithm] == 1
        else ", ".join(display_name(part) for part in mine if part not in shared) or variant
        for algorithm, mine, variant in zip(algorithms, parts, variants, strict=True)
    ]
    return labels if len(set(labels)) == len(labels) else list(variants)


def _any_run(sweep: SavedSweep, variant: str) -> SavedRun:
    return next(iter(sweep.complete(variant).values()))


def _there(sweep: SavedSweep, variant: str) -> list[SavedRun]:
    """All that there is of a variant's runs, complete or not."""
    return [member.run for member in sweep.of(variant) if member.run]


def _series(sweep: SavedSweep, runs: Sequence[tuple[str, list[SavedRun]]]) -> list[Series]:
    """The runs under their labels; those that are none are left out."""
    return [
        Series(found[0].config["algorithm"]["name"], (), found[0].config, found, label)
        for label, found in runs
        if found
    ]


def _figures(together: DrawnTogether, formats: Sequence[str]) -> list[Block]:
    heading = Heading(f"Accuracy: {together.name}" if together.name else "Accuracy")
    scored = [one for one in together.series if any(map(accuracies, one.runs))]
    if not scored:
        return [heading, "No round has a test accuracy."]
    scored = [replace(one, runs=[run for run in one.runs if accuracies(run)]) for one in scored]
    all_looks = looks_side_by_side([one.algorithm for one in together.series])
    looks = {one.name: look for one, look in zip(together.series, all_looks, strict=True)}
    curves = comparison.curves_of(scored, looks)
    pictures = [_accuracy(together, scored, curves, ending, formats) for ending in AGAINST]
    drift = comparison.drift(together.series, looks, formats, together.stem("drift"))
    return [heading, *comparison.coinciding(scored), *pictures, *drift]


def _accuracy(
    together: DrawnTogether,
    series: Sequence[Series],
    curves: Sequence[Curve],
    ending: str,
    formats: Sequence[str],
) -> Picture:
    """One figure, and its data."""
    key, x_label, words = AGAINST[ending]
    unit = 1
    if key.endswith("bytes_total"):
        unit, unit_name = comparison.unit_along(series, key)
        x_label += f", {unit_name}"

    def x(line: Line) -> float:
        value: float = line[key]
        return value / unit

    panel = Panel(x, comparison.test_accuracy, x_label, "test accuracy", whole_numbers=key == "round")
    stem = together.stem(f"accuracy-{ending}")
    caption = f"Test accuracy against {words}. {comparison.over_seeds(series)} Its data: {stem}.csv."
    drawn = comparison.picture(curves_figure(curves, [panel], size=COLUMN), stem, formats, caption)
    files = {**drawn.files, f"{stem}.csv": _data(series, key).encode()}
    return replace(drawn, files=files, narrow=True)


def _data(series: Sequence[Series], key: str) -> str:
    """The points of a figure, as CSV: one row for each evaluated round of each run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    keys = dict.fromkeys(["round", key, "test_accuracy"])
    writer.writerow(["variant", "seed", *keys])
    for one in series:
        for run in one.runs:
            scored: list[Line] = [line for line in run.lines if line["test_accuracy"] is not None]
            writer.writerows([run.label, run.config["seed"], *(line[k] for k in keys)] for line in scored)
    return text.getvalue()
