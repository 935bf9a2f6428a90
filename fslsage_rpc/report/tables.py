"""The tables of a report: what runs and variants of a bench come to, and where they were measured."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fslsage_rpc.algorithms import ALGORITHMS
from fslsage_rpc.bench.table import links_line
from fslsage_rpc.report.looks import display_name
from fslsage_rpc.report.page import Table
from fslsage_rpc.report.series import Series
from fslsage_rpc.report.sources import (
    SavedBench,
    SavedRun,
    Spread,
    TargetReached,
    Tree,
    Variant,
    known_sum,
    parts_of,
)
from fslsage_rpc.units import MIB

if TYPE_CHECKING:  # it needs matplotlib
    from fslsage_rpc.report.figures import Bar

UNKNOWN = "–"
BUSY_HOST = " (busy host)"
"""behind figures that others' work on the host has changed"""


def runs_table(series: Sequence[Series]) -> Table:
    """Accuracy, seconds and bytes of each series: the mean over its runs, and their range."""
    headers = [
        "run",
        "seeds",
        "rounds",
        "last test accuracy",
        "best test accuracy",
        "last train loss, over",
        "seconds per round, median",
        "training seconds",
        "wire, MiB",
        "paper ledger (modelled), MiB",
    ]
    rows = [
        [
            one.label,
            ", ".join(str(seed) for seed in sorted(run.config["seed"] for run in one.runs)),
            _over_seeds([run.lines[-1]["round"] for run in one.runs], show_count),
            _over_seeds([last_accuracy(run) for run in one.runs], "{:.4f}".format) + diverged(one),
            _over_seeds([best_accuracy(run) for run in one.runs], "{:.4f}".format),
            _train_loss(one),
            _over_seeds([median_round_seconds(run) for run in one.runs], show_seconds)
            + (BUSY_HOST if any(run.busy for run in one.runs) else ""),
            _over_seeds([run.lines[-1]["elapsed_seconds"] for run in one.runs], show_seconds),
            _over_seeds([run.lines[-1]["wire_bytes_total"] for run in one.runs], show_mib),
            _over_seeds([run.lines[-1]["paper_bytes_total"] for run in one.runs], show_mib),
        ]
        for one in series
    ]
    return Table(headers, rows)


def settings_table(series: Sequence[Series]) -> Table | None:
    """Algorithm and settings, a column for each series; None where their names say both, with whole keys."""
    if all(one.name == ", ".join([display_name(one.algorithm), *one.settings]) for one in series):
        return None
    settings = [dict(setting.split("=", 1) for setting in one.settings) for one in series]
    rows = [["algorithm.name", *(one.algorithm for one in series)]]
    for key in sorted({key for each in settings for key in each}):
        rows.append([key, *(each.get(key, UNKNOWN) for each in settings)])
    return Table(["", *(one.label for one in series)], rows, facts=True)


def bench_table(bench: SavedBench) -> Table:
    """Seconds per round of each variant, against the reference and the lower bound, and bytes per round."""
    headers = [
        "variant",
        "samples",
        "seconds per round, median (quartiles)",
        "ratio to the reference (quartiles)",
        "lower bound, s",
        "efficiency (bound / measured)",
        "wire per round, MiB",
        "paper ledger (modelled) per round, MiB",
    ]
    rows = [
        [
            variant_label(bench, variant)
            + (f", diverged in round {variant.diverged:g}" if variant.diverged else ""),
            _or_unknown(variant.round_seconds.n, show_count),
            _quartiles(variant.round_seconds, show_seconds),
            _quartiles(variant.ratio_to_reference, "{:.3f}".format)
            + (BUSY_HOST if variant.busy_samples else ""),
            _or_unknown(variant.bound_seconds, show_seconds),
            _or_unknown(variant.efficiency, "{:.3f}".format) + (BUSY_HOST if variant.busy_samples else ""),
            _or_unknown(variant.wire_bytes, show_mib),
            _or_unknown(variant.paper_bytes, show_mib),
        ]
        for variant in bench.variants
    ]
    return Table(headers, rows)


def target_table(bench: SavedBench) -> Table | None:
    """What each variant took to reach the target accuracy; None where none reached one."""
    targets = [(variant, variant.target or TargetReached()) for variant in bench.variants]
    rows = [
        [
            variant_label(bench, variant),
            _or_unknown(target.accuracy, "{:.4g}".format),
            _or_unknown(target.rounds, show_count),
            _or_unknown(target.seconds, show_seconds),
            _or_unknown(target.wire_bytes, show_mib),
            _or_unknown(target.paper_bytes, show_mib),
        ]
        for variant, target in targets
    ]
    headers = [
        "variant",
        "test accuracy",
        "rounds",
        "seconds",
        "wire, MiB",
        "paper ledger (modelled), MiB",
    ]
    return Table(headers, rows) if any(variant.target for variant in bench.variants) else None


def parts_table(bars: Sequence["Bar"]) -> Table:
    """Seconds per round by part, their sum, and the lower bound where one is known: one row for each bar."""
    parts = list(bars[0].parts)
    bounded = any(bar.bound_seconds is not None for bar in bars)
    rows = [
        [
            bar.label,
            *(_or_unknown(bar.parts[part], show_seconds) for part in parts),
            _or_unknown(known_sum(list(bar.parts.values())), show_seconds),
            *([_or_unknown(bar.bound_seconds, show_seconds)] if bounded else []),
        ]
        for bar in bars
    ]
    return Table(["seconds per round", *parts, "sum", *(["lower bound"] if bounded else [])], rows)


def environment_table(environment: Tree) -> Table:
    """What `environment.json` says: versions, ranks and hosts, transports, and whatever else is in it."""
    rows = []
    for key, value in environment.items():
        if key == "versions" and isinstance(value, dict):
            text = ", ".join(f"{name} {version}" for name, version in value.items() if version)
        elif key == "ranks" and isinstance(value, list):
            text = "; ".join(f"{count} x {rank}" for rank, count in Counter(map(_rank, value)).items())
        elif key == "link_speeds":
            text = _links(environment)
        else:
            text = _plain(value)
        rows.append([key.replace("_", " "), text])
    return Table(["", "measured on"], rows, facts=True)


def folders_table(series: Sequence[Series], benches: Sequence[SavedBench]) -> Table:
    """Which folders each row comes from."""
    rows = [[one.label, ", ".join(str(run.folder) for run in one.runs)] for one in series]
    rows += [[f"bench {bench.name}", str(bench.folder)] for bench in benches]
    return Table(["", "folders"], rows, facts=True)


def variant_label(bench: SavedBench, variant: Variant) -> str:
    """Its algorithm, its own name where that says more, and whether the others are measured against it."""
    name = variant_name(variant.name, variant.algorithm)
    return f"{name} (reference)" if variant.name == bench.reference else name


def variant_name(name: str, algorithm: str) -> str:
    """A variant's algorithm, and its own name where that says more."""
    return display_name(algorithm) + ("" if name == algorithm else f": {name}")


def mean_parts(series: Series) -> dict[str, float | None]:
    """Seconds per round by part: the mean over rounds, then over runs."""
    means = []
    for run in series.runs:
        phases = [line["phases"]["client"] for line in run.lines]
        names = dict.fromkeys(name for line in phases for name in line)
        means.append(
            parts_of({name: sum(line.get(name, 0.0) for line in phases) / len(phases) for name in names})
        )
    return {part: _mean([parts[part] for parts in means]) for part in means[0]}


def accuracies(run: SavedRun) -> list[float]:
    """Test accuracy in the rounds that were evaluated."""
    return [line["test_accuracy"] for line in run.lines if line["test_accuracy"] is not None]


def last_accuracy(run: SavedRun) -> float | None:
    """The newest test accuracy; None before the first evaluation."""
    return accuracies(run)[-1] if accuracies(run) else None


def best_accuracy(run: SavedRun) -> float | None:
    """The highest test accuracy; None before the first evaluation."""
    return max(accuracies(run), default=None)


def median_round_seconds(run: SavedRun) -> float | None:
    """Of a finished run, over whole alignment intervals; None where there are too few."""
    value = (run.summary or {}).get("median_round_seconds")
    return value if isinstance(value, int | float) else None


def show_seconds(value: float) -> str:
    """Seconds: at most four decimals, and four digits or more of what is above 0.1."""
    return f"{value:.4f}" if abs(value) < 0.1 else f"{value:#.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def show_count(value: float) -> str:
    """A count, or a mean of counts."""
    return f"{value:,.0f}" if value == round(value) else f"{value:,.1f}"


def show_mib(size: float) -> str:
    """Bytes in MiB."""
    return f"{size / MIB:,.2f}"


def diverged(series: Series) -> str:
    """Behind an accuracy: which of the runs have diverged, and when."""
    return "".join(
        f", diverged in round {run.diverged}" + (f" (seed {run.config['seed']})" if series.runs[1:] else "")
        for run in series.runs
        if run.diverged
    )


def _train_loss(series: Series) -> str:
    """The last round's, and over what it is the mean: older runs do not say, and their algorithm does."""
    known = ALGORITHMS.get(series.algorithm)
    over = series.runs[0].lines[-1].get("train_loss_of") or (known.train_loss_of() if known else "unknown")
    return f"{_over_seeds([run.lines[-1].get('train_loss') for run in series.runs], '{:.4f}'.format)}, {over}"


def _over_seeds(values: Sequence[float | None], show: Callable[[float], str]) -> str:
    """Mean (lowest to highest); unknown where one of the values is."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return UNKNOWN
    mean, lowest, highest = show(fmean(known)), show(min(known)), show(max(known))
    return mean if lowest == highest else f"{mean} ({lowest} to {highest})"


def _quartiles(spread: Spread, show: Callable[[float], str]) -> str:
    if spread.median is None:
        return UNKNOWN
    if spread.q1 is None or spread.q3 is None:
        return show(spread.median)
    return f"{show(spread.median)} ({show(spread.q1)} to {show(spread.q3)})"


def _or_unknown(value: float | None, show: Callable[[float], str]) -> str:
    return UNKNOWN if value is None else show(value)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _rank(rank: Any) -> str:
    """A rank in words."""
    if not isinstance(rank, dict):
        return _plain(rank)
    words = [
        str(rank.get("host", "unknown host")),
        str(rank.get("device", "")),
        str(rank.get("device_name", "")),
    ]
    for key, one in (("cores", "core"), ("threads", "thread")):
        if rank.get(key) is not None:
            words.append(f"{rank[key]} {one if rank[key] == 1 else key}")
    return ", ".join(word for word in words if word)


def _links(environment: Tree) -> str:
    """The slowest of the links' speeds; all of them where one was not measured."""
    try:
        return links_line({"environment": environment}).removeprefix("links, ")
    except (AttributeError, KeyError, TypeError):
        return _plain(environment["link_speeds"])


def _plain(value: Any) -> str:
    """A value of a JSON file in words."""
    if value is None:
        return UNKNOWN
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return value if isinstance(value, str) else json.dumps(value).replace('"', "")
