"""The tables of a sweep: what its variants come to over seeds, and how they differ from their reference."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from fslsage_rpc.report.estimates import Estimate, estimate
from fslsage_rpc.report.page import Table
from fslsage_rpc.report.sources import Line, SavedRun
from fslsage_rpc.report.sweeps import RunState, SavedSweep
from fslsage_rpc.report.tables import (
    BUSY_HOST,
    UNKNOWN,
    best_accuracy,
    last_accuracy,
    show_count,
    show_seconds,
)
from fslsage_rpc.units import unit_of

Measurement = Callable[[SavedRun], float | None]
"""what one run comes to; None where it is not known"""
MOST_DECIMALS = 4
READING = (
    "Means are over complete runs, ± half the width of the 95 % confidence interval over seeds, by "
    "Student's t. A value alone is that of one seed, or of all alike. No run that has diverged is in a mean. "
    "Wire bytes are measured, of all kinds, evaluation's too; the paper ledger is a model."
)
READING_BUSY = "On a busy host, where others had more than 5 % of the cores, seconds are not to be trusted."
READING_TARGET = (
    "Seconds and bytes to the target are those up to the first evaluated round that has reached it. Their "
    "means are over the seeds that did."
)
READING_DIFFERENCES = (
    "Each difference is a variant minus its reference with the same seed, over the seeds of which both are "
    "complete. An interval that does not hold 0 tells the two apart, at a level of 5 %. With 2 or 3 seeds "
    "intervals are wide, and among many comparisons about one in 20 does so by chance."
)


@dataclass(frozen=True)
class Quantity:
    """A column of a table: what each run comes to, and how it is written."""

    header: str
    of: Measurement
    show: Callable[[float], str]
    unit: float = 1
    most_decimals: int = MOST_DECIMALS
    in_seconds: bool = False

    def text(self, runs: Sequence[SavedRun]) -> str:
        """The mean over runs; unknown where it is not known of one of them."""
        samples = [self.of(run) for run in runs]
        known = [sample / self.unit for sample in samples if sample is not None]
        if len(known) < len(samples):
            return UNKNOWN
        busy = BUSY_HOST if known and self.in_seconds and any(run.busy for run in runs) else ""
        return self._shown(estimate(known), self.show) + busy

    def difference(self, pairs: Sequence[tuple[SavedRun, SavedRun]]) -> str:
        """The mean over pairs of the first one's minus the second one's."""
        samples = [(self.of(first), self.of(second)) for first, second in pairs]
        known = [(a - b) / self.unit for a, b in samples if a is not None and b is not None]
        if len(known) < len(samples):
            return UNKNOWN
        busy = known and self.in_seconds and any(run.busy for pair in pairs for run in pair)
        shown = self._shown(estimate(known), partial(_signed, show=self.show), "+")
        return shown + (BUSY_HOST if busy else "")

    def _shown(self, found: Estimate | None, alone: Callable[[float], str], sign: str = "") -> str:
        """Two digits or more of the half width, and three of the mean, where that is larger."""
        if found is None:
            return UNKNOWN
        half = found.half_width or 0.0
        if half < 0.5 * 10**-self.most_decimals:
            return alone(found.mean)
        least = max(1 - _magnitude(half), 2 - _magnitude(max(abs(found.mean), half)), 0)
        decimals = min(least, self.most_decimals)
        return f"{found.mean:{sign},.{decimals}f} ± {half:,.{decimals}f}"


def results_table(sweep: SavedSweep) -> Table:
    """A row for each variant: accuracy, seconds, bytes and memory, over its complete runs."""
    target = sweep.config.sweep.target_accuracy
    quantities = [*_accuracies(), _rounds(), *_costs(sweep)]
    to_target = _costs(sweep, target) if target else []
    memory = _memory(sweep)
    headers = ["variant", "seeds complete", *(each.header for each in quantities)]
    if target:
        headers += [f"seeds that reached {target:g}", *(each.header for each in to_target)]
    headers += [each.header for each in memory]
    compared = set(sweep.references.values())
    rows = []
    for variant in sweep.variants:
        runs = list(sweep.complete(variant).values())
        row = [variant + (" (reference)" if variant in compared else ""), _seeds(sweep, variant)]
        row += [each.text(runs) for each in quantities]
        if target:
            reached = [run for run in runs if reaching(run, target)]
            ended = len(runs) + _diverged(sweep, variant)
            row += [f"{len(reached)} of {ended}", *(each.text(reached) for each in to_target)]
        rows.append(row + [each.text(runs) for each in memory])
    return Table(headers, rows)


def differences_table(sweep: SavedSweep) -> Table | None:
    """A row for each variant that has a reference: its differences, paired by seed; None where none has."""
    target = sweep.config.sweep.target_accuracy
    quantities = [*_accuracies(), *_costs(sweep)]
    to_target = _costs(sweep, target)[:2] if target else []
    headers = ["variant", "minus", "pairs of seeds", *(each.header for each in quantities)]
    if target:
        headers += [f"pairs that reached {target:g}", *(each.header for each in to_target)]
    rows = []
    for variant, reference in sweep.references.items():
        if variant == reference:
            continue
        mine, others = sweep.complete(variant), sweep.complete(reference)
        pairs = [(run, others[seed]) for seed, run in mine.items() if seed in others]
        row = [variant, reference, str(len(pairs)), *(each.difference(pairs) for each in quantities)]
        if target:
            both = [pair for pair in pairs if all(reaching(run, target) for run in pair)]
            row += [f"{len(both)} of {len(pairs)}", *(each.difference(both) for each in to_target)]
        rows.append(row)
    return Table(headers, rows) if rows else None


def reading(sweep: SavedSweep) -> str:
    """How to read the table of results."""
    parts = [READING]
    if any(member.run and member.run.busy for member in sweep.members):
        parts.append(READING_BUSY)
    if sweep.config.sweep.target_accuracy:
        parts.append(READING_TARGET)
    return " ".join(parts)


def variants_table(sweep: SavedSweep) -> Table:
    """Each variant and the keys that make it of the sweep's configuration."""
    rows = [[name, ", ".join(made.overrides) or UNKNOWN] for name, made in sweep.variants.items()]
    return Table(["variant", "keys"], rows, facts=True)


def reaching(run: SavedRun, accuracy: float) -> Line | None:
    """The line of the first evaluated round with this test accuracy or a better one."""
    scored = (line for line in run.lines if line["test_accuracy"] is not None)
    return next((line for line in scored if line["test_accuracy"] >= accuracy), None)


def _seeds(sweep: SavedSweep, variant: str) -> str:
    diverged = _diverged(sweep, variant)
    more = f", {diverged} diverged" if diverged else ""
    return f"{len(sweep.complete(variant))} of {len(sweep.of(variant))}{more}"


def _diverged(sweep: SavedSweep, variant: str) -> int:
    return sum(member.state is RunState.DIVERGED for member in sweep.of(variant))


def _accuracies() -> list[Quantity]:
    return [
        Quantity("last test accuracy", last_accuracy, "{:.4f}".format),
        Quantity("best test accuracy", best_accuracy, "{:.4f}".format),
    ]


def _rounds() -> Quantity:
    return Quantity("rounds", lambda run: run.lines[-1]["round"], show_count, most_decimals=1)


def _costs(sweep: SavedSweep, target: float | None = None) -> list[Quantity]:
    """Seconds, measured and modelled bytes of whole runs, or of what they took to the target accuracy."""

    def at_end(run: SavedRun, key: str) -> float | None:
        line = reaching(run, target) if target else run.lines[-1]
        return line[key] if line else None

    def in_bytes(name: str, key: str) -> Quantity:
        of = partial(at_end, key=key)
        unit, unit_name = unit_of(_largest(sweep, lambda run: run.lines[-1][key]))
        return Quantity(f"{name}{to}, {unit_name}", of, "{:,.2f}".format, unit, 2)

    to = f" to {target:g}" if target else ""
    seconds = partial(at_end, key="elapsed_seconds")
    return [
        Quantity(f"training seconds{to}", seconds, show_seconds, in_seconds=True),
        in_bytes("wire", "wire_bytes_total"),
        in_bytes("paper ledger (modelled)", "paper_bytes_total"),
    ]


def _memory(sweep: SavedSweep) -> list[Quantity]:
    """Peak memory by kind of rank, and that of devices where one was measured."""
    peaks = [_peaks(run) for run in _all_complete(sweep)]
    kinds = dict.fromkeys(kind for each in peaks for kind in each)
    found = []
    for kind in kinds:
        for place in ("host", "device"):
            key = f"{place}_bytes"
            known = [value for each in peaks if (value := each.get(kind, {}).get(key)) is not None]
            if known or place == "host":
                unit, unit_name = unit_of(max(known, default=0))
                of = partial(_peak, kind=kind, key=key)
                header = f"peak {place} memory, {kind} rank, {unit_name}"
                found.append(Quantity(header, of, "{:,.2f}".format, unit, 2))
    return found


def _peaks(run: SavedRun) -> dict[str, dict[str, float | None]]:
    """Peak memory by kind of rank; empty in older runs."""
    return (run.summary or {}).get("peak_memory") or {}


def _peak(run: SavedRun, kind: str, key: str) -> float | None:
    return _peaks(run).get(kind, {}).get(key)


def _all_complete(sweep: SavedSweep) -> list[SavedRun]:
    return [run for variant in sweep.variants for run in sweep.complete(variant).values()]


def _largest(sweep: SavedSweep, of: Measurement) -> float:
    return max((of(run) or 0.0 for run in _all_complete(sweep)), default=0.0)


def _magnitude(value: float) -> int:
    """The power of ten of its first digit."""
    return math.floor(math.log10(value))


def _signed(value: float, show: Callable[[float], str]) -> str:
    """With a plus or a minus, where it is not nought as it is shown."""
    shown = show(value)
    return f"+{shown}" if value > 0 and shown.strip("0.,") else shown
