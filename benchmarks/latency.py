"""Seconds per round of the five algorithms on CIFAR-10 images: over loopback, and over emulated links.

    pip install -e '.[plots]'
    sudo .venv/bin/python benchmarks/latency.py --data DIR

About an hour on 2 idle cores; root is for the emulated links (docs/emulated-networks.md). A benchmark that
is complete in `--runs` is not run again, so an interrupted study goes on with the same command. At the end it
writes the figures and the tables of docs/results/latency-loopback.md and latency-wan.md; the text around the
tables stays. Nothing else should run meanwhile.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fslsage_rpc.bench.table import round_bytes, table
from fslsage_rpc.config.loading import load
from fslsage_rpc.config.variants import bench_variants
from fslsage_rpc.measure.phases import PARTS
from fslsage_rpc.plan.calibration import Calibration, read_calibration
from fslsage_rpc.plan.prediction import predict
from fslsage_rpc.plan.run import link_speed
from fslsage_rpc.plan.scenario import Scenario
from fslsage_rpc.report.figures import Bar, bars_figure, color_of, rendered
from fslsage_rpc.report.sources import SavedBench, read
from fslsage_rpc.report.tables import variant_name

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "bench" / "cifar10.yaml"
CLIENT_RANKS = 2
MIB = 2**20
BAR_LABEL = "seconds per round, mean over the client ranks"


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
    def emulation(self) -> list[str]:
        """What launch/wan.py is asked for."""
        rate = self.bandwidth or ""
        delay = ["--rtt", self.rtt] if self.rtt else []
        slow = ["--straggler", self.straggler] if self.straggler else []
        return ["--clients", str(CLIENT_RANKS), "--up", rate, "--down", rate, *delay, *slow]


LOOPBACK = Place("Loopback")
EMULATED = (
    Place("100 Mbit/s", "100mbit"),
    Place("100 Mbit/s, 40 ms", "100mbit", "40ms"),
    Place("20 Mbit/s", "20mbit"),
    Place("20 Mbit/s, 40 ms", "20mbit", "40ms"),
    Place("100 Mbit/s, client rank 2 with a quarter of a core", "100mbit", straggler="2:0.25"),
)
Result = dict[str, Any]
"""what bench.json holds"""


def measure(place: Place, data: str, runs: Path) -> None:
    """Run the benchmark over a place's links, unless that is done already."""
    if (runs / place.name / "bench.json").exists():
        return
    print(f"== {place.title} ==", flush=True)
    command = [
        *("bench", str(CONFIG), f"name={place.name}", f"output={runs}"),
        *(f"data.root={data}", "data.download=false", "device=cpu", f"ranks={CLIENT_RANKS + 1}"),
    ]
    launcher = (
        ["-m", "fslsage_rpc"]
        if place.bandwidth is None
        else [str(ROOT / "launch" / "wan.py"), *place.emulation, "--"]
    )
    threads = str(max(1, (os.cpu_count() or 1) // (CLIENT_RANKS + 1)))
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
    subprocess.run([sys.executable, *launcher, *command], check=True, cwd=ROOT, env=environment)


def predictions(place: Place, calibration: Calibration) -> dict[str, float]:
    """Seconds per round that `fslsage plan` gives for these links, by variant; none where ranks differ."""
    if place.straggler:
        return {}
    link = link_speed(calibration.link, place.bandwidth, place.rtt)
    scenarios = {
        name: Scenario(config, link, CLIENT_RANKS, calibration.shared_cores)
        for name, config in bench_variants(load(CONFIG)).items()
    }
    return {
        name: predict(
            scenario, calibration.costs[scenario.config.algorithm.name], calibration.server_workers
        ).round_seconds
        for name, scenario in scenarios.items()
    }


@dataclass(frozen=True)
class Measured:
    """The benchmark of one place, and what two calibrations predict for it."""

    place: Place
    result: Result
    bench: SavedBench
    by_itself: dict[str, float]
    """from this benchmark's own costs"""
    by_loopback: dict[str, float]
    """from the costs of the one over loopback"""


def read_place(place: Place, runs: Path, loopback: Calibration) -> Measured:
    """What the benchmark left in its folder."""
    folder = runs / place.name
    _, benches = read([str(folder)])
    return Measured(
        place,
        json.loads((folder / "bench.json").read_text(encoding="utf-8")),
        benches[0],
        predictions(place, read_calibration(folder, load(CONFIG))),
        predictions(place, loopback),
    )


def measured_table(measured: Measured) -> str:
    """The rounds of one place, in Markdown."""
    headers = [
        *(
            "algorithm",
            "s / round, median (quartiles)",
            "ratio to SplitFedV1",
            "compute",
            "wait",
            "alignment",
        ),
        *("averaging", "wire MiB", "lower bound", "efficiency"),
    ]
    rows = []
    for name, record in measured.result["variants"].items():
        seconds, client = record["round_seconds"], record["phases"]["client"]
        rows.append(
            [
                variant_name(name, record["algorithm"]),
                f"{seconds['median']:.2f} ({seconds['q1']:.2f} to {seconds['q3']:.2f})",
                f"{record['ratio_to_reference']['median']:.2f}",
                *(
                    f"{sum(client[phase] for phase in PARTS[part]):.2f}"
                    for part in ("compute", "wait", "alignment")
                ),
                f"{client['averaging']:.2f}",
                f"{round_bytes(record) / MIB:.1f}",
                f"{record['bound_seconds']:.2f}",
                f"{record['efficiency']:.0%}",
            ]
        )
    return table(headers, rows)


def error(predicted: dict[str, float], measured: Measured, name: str) -> float:
    """How far a prediction is off, as a share of what was measured."""
    return predicted[name] / measured.result["variants"][name]["round_seconds"]["median"] - 1


def predictions_table(places: Sequence[Measured]) -> str:
    """All predictions beside what was measured, and how many are within 15 %."""
    headers = ["links", "algorithm", "measured", "*predicted*, own benchmark", "off by"]
    headers += ["*predicted*, loopback benchmark", "off by"]
    rows, errors = [], {"own": [], "loopback": []}
    for one in places:
        for name in one.by_itself:
            record = one.result["variants"][name]
            own, loopback = error(one.by_itself, one, name), error(one.by_loopback, one, name)
            errors["own"].append(own)
            if one.place is not LOOPBACK:  # which that benchmark predicts of itself
                errors["loopback"].append(loopback)
            rows.append(
                [
                    one.place.title,
                    variant_name(name, record["algorithm"]),
                    f"{record['round_seconds']['median']:.2f}",
                    *(f"{one.by_itself[name]:.2f}", f"{own:+.0%}"),
                    *(f"{one.by_loopback[name]:.2f}", f"{loopback:+.0%}"),
                ]
            )
    said = [
        f"From the {kind} benchmark {sum(abs(e) <= 0.15 for e in all)} of {len(all)} are within 15 %, from "
        f"{min(all):+.0%} to {max(all):+.0%}."
        for kind, all in errors.items()
    ]
    return table(headers, rows) + "\n\n" + " ".join(said)


def described(result: Result) -> str:
    """Versions, machine, and links as asked and measured."""
    environment = result["environment"]
    rank, transports = environment["ranks"][0], environment["rpc_transports"]
    if not isinstance(transports, str):
        transports = ", ".join(transports)
    links = environment.get("links", {}).get("clients", {})
    measured = [f"client rank {rank}: {as_measured(link['measured'])}" for rank, link in links.items()]
    return "; ".join(
        [
            f"torch {environment['versions']['torch']}, {rank['cores']} cores ({rank['device_name']}), "
            f"{rank['threads']} thread per rank, RPC over {transports}",
            *measured,
        ]
    )


def as_measured(link: dict[str, float]) -> str:
    """An emulated link as its probe found it."""
    up, down = (link[way] / 1e6 for way in ("up_bits_per_second", "down_bits_per_second"))
    return f"{up:.1f} Mbit/s up, {down:.1f} down, round trip {1000 * link['round_trip_seconds']:.1f} ms"


def bars(bench: SavedBench) -> bytes:
    """The picture of one place."""
    drawn = [
        Bar(variant_name(v.name, v.algorithm), color_of(v.algorithm), v.parts, v.bound_seconds)
        for v in bench.variants
    ]
    return rendered(bars_figure(drawn, BAR_LABEL))


def write(page: Path, measured: str) -> None:
    """Replace the measured part of a page."""
    begin, end = "<!-- measured -->", "<!-- end of measured -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n\n{measured}\n\n{end}{after}", encoding="utf-8")


def section(measured: Measured, out: Path) -> str:
    """A place's figure and table."""
    file = f"latency-{measured.place.name}.png"
    (out / file).write_bytes(bars(measured.bench))
    parts = [
        f"## {measured.place.title}",
        f"![Seconds per round, {measured.place.title}]({file})",
        measured_table(measured),
        described(measured.result),
    ]
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then write both pages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "latency-cifar10", help="where runs go")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results", help="where the pages are")
    options = parser.parse_args(arguments)
    for place in (LOOPBACK, *EMULATED):
        measure(place, str(Path(options.data).resolve()), options.runs.resolve())
    costs = read_calibration(options.runs / LOOPBACK.name, load(CONFIG))
    loopback, *emulated = (read_place(place, options.runs, costs) for place in (LOOPBACK, *EMULATED))
    write(options.out / "latency-loopback.md", section(loopback, options.out))
    parts = [section(place, options.out) for place in emulated]
    parts += ["## Predictions", predictions_table([loopback, *emulated])]
    write(options.out / "latency-wan.md", "\n\n".join(parts))


if __name__ == "__main__":
    main()
