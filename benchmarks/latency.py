"""Seconds per round on CIFAR-10 images: over loopback, and over emulated links.

    pip install -e '.[plots]'
    sudo .venv/bin/python benchmarks/latency.py --data DIR

Root is for the emulated links (docs/emulated-networks.md).
The variants are those of configs/bench/cifar10.yaml.
A benchmark that is complete in `--runs` is not run again: the same command goes on with an interrupted study.
In the end `fslsage report` of all of them is in `--runs`/report.
Its parts go to the pages of docs/results, with what the benchmark over loopback predicts for the other links.
Nothing else should run meanwhile.
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from marked_page import put
from seeds import described

from fslsage_rpc.bench.table import table
from fslsage_rpc.config.loading import load
from fslsage_rpc.config.variants import bench_variants
from fslsage_rpc.errors import InputError
from fslsage_rpc.plan.calibration import read_calibration
from fslsage_rpc.plan.prediction import predict
from fslsage_rpc.plan.run import link_speed
from fslsage_rpc.plan.scenario import Scenario
from fslsage_rpc.report.comparison import write_report
from fslsage_rpc.report.sources import read
from fslsage_rpc.report.tables import BUSY_HOST, variant_name

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "bench" / "cifar10.yaml"
PAGES = ROOT / "docs" / "results"
CLIENT_RANKS = 2
HEADERS = ("links", "variant", "s / round, median", "*predicted*", "off by")
CLOSE = 0.15
"""share of the measured seconds by which a close prediction is off at most"""


@dataclass(frozen=True)
class Place:
    """Links that the benchmark is run over."""

    title: str
    bandwidth: str | None = None
    rtt: str | None = None
    straggler: str | None = None

    @property
    def name(self) -> str:
        """Its folder."""
        parts = [self.bandwidth or "loopback", self.rtt, "straggler" if self.straggler else None]
        return "-".join(part for part in parts if part)

    @property
    def launcher(self) -> list[str]:
        """The beginning of a command that runs there."""
        if self.bandwidth is None:
            return ["-m", "fslsage_rpc"]
        rates = ["--clients", str(CLIENT_RANKS), "--up", self.bandwidth, "--down", self.bandwidth]
        delay = ["--rtt", self.rtt] if self.rtt else []
        slow = ["--straggler", self.straggler] if self.straggler else []
        return [str(ROOT / "launch" / "wan.py"), *rates, *delay, *slow, "--"]


LOOPBACK = Place("Loopback")
EMULATED = (
    Place("100 Mbit/s", "100mbit"),
    Place("100 Mbit/s, 40 ms", "100mbit", "40ms"),
    Place("20 Mbit/s", "20mbit"),
    Place("20 Mbit/s, 40 ms", "20mbit", "40ms"),
    Place("100 Mbit/s, client rank 2 with a quarter of a core", "100mbit", straggler="2:0.25"),
)


def measure(place: Place, data: Path, runs: Path) -> None:
    """Run the benchmark over a place's links, unless that is done already.

    Raises:
        SystemExit: it failed, and has said why.
    """
    if (runs / place.name / "bench.json").exists():
        return
    print(f"== {place.title} ==", flush=True)
    keys = [f"name={place.name}", f"output={runs}", f"data.root={data}", "data.download=false"]
    keys += ["device=cpu", f"ranks={CLIENT_RANKS + 1}"]
    command = [sys.executable, *place.launcher, "bench", str(CONFIG), *keys]
    if status := subprocess.run(command, cwd=ROOT).returncode:
        raise SystemExit(status)


def predictions(place: Place, runs: Path) -> dict[str, float]:
    """Predicted seconds per round by variant, from what the benchmark over loopback measured.

    Raises:
        InputError: that benchmark cannot predict the one over these links.
    """
    config = load(runs / place.name / "config.yaml")
    calibration = read_calibration(runs / LOOPBACK.name, config)
    link = link_speed(calibration.link, place.bandwidth, place.rtt)
    found = {}
    for name, variant in bench_variants(config).items():
        scenario = Scenario(variant, link, CLIENT_RANKS, calibration.shared_cores)
        costs = calibration.costs[variant.algorithm.name]
        prediction = costs if isinstance(costs, str) else predict(scenario, costs, calibration.server_workers)
        if isinstance(prediction, str):
            raise InputError(f"{runs / place.name}, {name}: cannot be predicted ({prediction})")
        found[name] = prediction.round_seconds
    return found


def predictions_table(places: Sequence[Place], runs: Path) -> str:
    """Predicted beside measured seconds per round, and how many are close."""
    rows, errors = [], []
    for place in places:
        _, (bench,) = read([str(runs / place.name)])
        predicted = predictions(place, runs)
        for variant in bench.variants:
            name = variant_name(variant.name, variant.algorithm)
            measured, seconds = variant.round_seconds.median, predicted[variant.name]
            error, busy = seconds / measured - 1, BUSY_HOST if variant.busy_samples else ""
            rows.append([place.title, name, f"{measured:.2f}{busy}", f"{seconds:.2f}", f"{error:+.0%}"])
            errors.append(error)
    close = sum(abs(error) <= CLOSE for error in errors)
    said = f"{close} of {len(errors)} are within {CLOSE:.0%}, from {min(errors):+.0%} to {max(errors):+.0%}."
    return f"{table(HEADERS, rows)}\n\n{said}"


def sections(report: Path, places: Sequence[Place], runs: Path) -> dict[Place, str]:
    """Each place's part of the report, whose figures are put beside the pages."""
    text = report.with_suffix(".md").read_text(encoding="utf-8")
    found = {}
    parts = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    for number, (place, part) in enumerate(zip(places, parts, strict=False), start=1):
        old, new = f"latency-bench-{number}.png", f"latency-{place.name}.png"
        shutil.copy(report.with_name(old), PAGES / new)
        found[place] = f"## {part.replace(old, new)}{described(runs / place.name)}"
    return found


def main() -> int:
    """Measure what is missing, then write the report and the pages; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "latency-cifar10", help="where runs go")
    options = parser.parse_args()
    runs, places = options.runs.resolve(), (LOOPBACK, *EMULATED)
    for place in places:
        measure(place, options.data.resolve(), runs)
    folders, titles = [str(runs / place.name) for place in places], [place.title for place in places]
    # A prediction is for links and ranks that are all alike.
    alike = [place for place in EMULATED if not place.straggler]
    try:
        report = write_report(folders, str(runs / "report"), titles)
        compared = predictions_table(alike, runs)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    by_place = sections(report, places, runs)
    put(PAGES / "latency-loopback.md", "measured", by_place.pop(LOOPBACK))
    predicted = f"## Predictions from the benchmark over loopback\n\n{compared}"
    put(PAGES / "latency-wan.md", "measured", "\n\n".join([*by_place.values(), predicted]))
    print(f"{compared}\nReport: {report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
