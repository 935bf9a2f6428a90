"""What the runs of a benchmark come to: medians, quartiles and paired ratios."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fslsage_rpc.config.schema import Bench
from fslsage_rpc.config.variants import combinations, references
from fslsage_rpc.measure.host_load import BUSY, mean_busy

Line = dict[str, Any]
"""one line of metrics"""


@dataclass
class BenchRun:
    """One run of one variant: of its rounds the lines, the lower bounds, and what their fits take of all the
    server's workers, in seconds.
    """

    variant: str
    repeat: int
    interval: int
    """rounds of one alignment interval: of one sample"""
    lines: list[Line] = field(default_factory=list)
    bounds: list[float] = field(default_factory=list)
    fits: list[float] = field(default_factory=list)

    def samples(self, warmup_rounds: int) -> list[range]:
        """The rounds of each whole alignment interval behind the warm-up, which is whole intervals too."""
        first = math.ceil(warmup_rounds / self.interval) * self.interval
        starts = range(first, len(self.lines) - self.interval + 1, self.interval)
        return [range(start, start + self.interval) for start in starts]

    def bound_seconds(self, rounds: range) -> float:
        """The lower bound of a sample, per round.

        No single round waits for the fits behind the training, but all are made in the sample's time. Those
        that clients wait for are in their rounds' bounds, too.
        """
        of_rounds = statistics.fmean(self.bounds[round] for round in rounds)
        return max(of_rounds, sum(self.fits[rounds.start : rounds.stop]) / len(rounds))


def summarise(runs: Sequence[BenchRun], keys: Bench) -> dict[str, dict[str, Any]]:
    """Per variant what `bench.json` says of it: one sample is one whole alignment interval."""
    found = combinations(keys.variants, "bench.variants")
    reference = references(found, keys.reference, "bench.reference")
    return {
        name: _variant(
            [run for run in runs if run.variant == name],
            {run.repeat: run for run in runs if run.variant == reference[name]},
            keys,
        )
        for name in found
    }


def _variant(runs: Sequence[BenchRun], reference: Mapping[int, BenchRun], keys: Bench) -> dict[str, Any]:
    samples = [(run, rounds) for run in runs for rounds in run.samples(keys.warmup_rounds)]
    lines = [run.lines[round] for run, rounds in samples for round in rounds]
    seconds = [seconds_of(run, rounds) for run, rounds in samples]
    bounds = [run.bound_seconds(rounds) for run, rounds in samples]
    ratios = [
        typical_seconds(run, keys.warmup_rounds) / typical_seconds(reference[run.repeat], keys.warmup_rounds)
        for run in runs
    ]
    described = [_sample(run, rounds) for run, rounds in samples]
    return {
        "round_seconds": {**quartiles(seconds), "n": len(seconds)},
        "ratio_to_reference": quartiles(ratios),
        "phases": {
            party: _means([line["phases"][party] for line in lines]) for party in ("client", "server")
        },
        "requests": _per_request(lines),
        "wire_bytes": _means([line["wire_bytes"] for line in lines]),
        "paper_bytes": statistics.fmean(line["paper_bytes"] for line in lines),
        "bound_seconds": statistics.median(bounds),
        "efficiency": statistics.median(b / s for b, s in zip(bounds, seconds, strict=True)),
        "cpu_seconds": statistics.fmean(sum(line["cpu_seconds"]["ranks"]) for line in lines),
        "host_busy": mean_busy(lines),
        "samples": described,
        "busy_samples": sum(sample["busy"] for sample in described),
        "target": _target(runs, keys.target_accuracy),
        "diverged": min(
            (line["round"] for run in runs for line in run.lines if line.get("diverged")), default=None
        ),
    }


def _sample(run: BenchRun, rounds: range) -> dict[str, Any]:
    """One sample; `busy` marks those whose seconds others' work on the host has changed."""
    share = mean_busy([run.lines[round] for round in rounds])
    return {
        "repeat": run.repeat,
        "rounds": [run.lines[round]["round"] for round in (rounds[0], rounds[-1])],
        "round_seconds": seconds_of(run, rounds),
        "host_busy": share,
        "busy": share is not None and share > BUSY,
    }


def seconds_of(run: BenchRun, rounds: range) -> float:
    """A sample's value: the mean seconds per round within it."""
    return statistics.fmean(run.lines[round]["round_seconds"] for round in rounds)


def typical_seconds(run: BenchRun, warmup_rounds: int) -> float:
    """The median over a run's samples."""
    return statistics.median(seconds_of(run, rounds) for rounds in run.samples(warmup_rounds))


def quartiles(values: Sequence[float]) -> dict[str, float | None]:
    """Median, lower and upper quartile; one value has no quartiles (None)."""
    if len(values) == 1:
        return {"median": values[0], "q1": None, "q3": None}
    q1, median, q3 = statistics.quantiles(values, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def _means(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: statistics.fmean(record[key] for record in records) for key in records[0]}


def _per_request(lines: Sequence[Line]) -> dict[str, dict[str, float | None]]:
    """Per kind of request: how many a round, the mean seconds of one, and its bytes over its wire seconds."""
    kinds: dict[str, dict[str, float]] = {}
    for line in lines:
        for kind, times in line["requests"].items():
            sums = kinds.setdefault(kind, dict.fromkeys(times, 0.0))
            for key, value in times.items():
                sums[key] += value
    result: dict[str, dict[str, float | None]] = {}
    for kind, sums in kinds.items():
        result[kind] = {"per_round": sums["count"] / len(lines)}
        for key in ("round_trip_seconds", "send_seconds", "queue_seconds", "compute_seconds", "wire_seconds"):
            result[kind][key] = sums[key] / sums["count"]
        moved = sums["up_bytes"] + sums["down_bytes"]
        result[kind]["bytes_per_second"] = moved / sums["wire_seconds"] if sums["wire_seconds"] > 0 else None
    return result


def _target(runs: Sequence[BenchRun], accuracy: float | None) -> dict[str, Any] | None:
    """Medians over the repeats of what it took to reach the accuracy; None where a repeat did not."""
    if accuracy is None:
        return None
    reached = []
    for run in runs:
        ends = [i for i, line in enumerate(run.lines) if (line["test_accuracy"] or 0.0) >= accuracy]
        if not ends:
            return None
        done = run.lines[: ends[0] + 1]
        reached.append(
            {
                "rounds": len(done),
                "seconds": done[-1]["elapsed_seconds"],
                "wire_bytes": sum(sum(line["wire_bytes"].values()) for line in done),
                "paper_bytes": done[-1]["paper_bytes_total"],
            }
        )
    medians = {key: statistics.median(record[key] for record in reached) for key in reached[0]}
    return {"accuracy": accuracy, **medians}
