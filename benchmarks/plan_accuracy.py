"""How good `fslsage plan` is: what it predicts beside what was measured, for the five algorithms.

    python benchmarks/plan_accuracy.py --runs DIR

About 12 minutes on 2 idle cores; with `--links`, as root, 4 more. At each of two cuts of a small model a
benchmark of 4 clients calibrates. What it predicts is compared with benchmarks of other numbers of clients,
and so is what is predicted without a calibration. A benchmark that
is complete in `--runs` is not run again. Prints the measured part of docs/results/plan.md. Nothing else
should run meanwhile.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fslsage_rpc.bench.table import table, untrusted
from fslsage_rpc.config.loading import load
from fslsage_rpc.device.cores import usable_cores
from fslsage_rpc.plan.calibration import calibrate_here, read_calibration
from fslsage_rpc.plan.run import link_speed, predictions
from fslsage_rpc.plan.scenario import Scenario
from fslsage_rpc.report.looks import display_name

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "bench" / "latency.yaml"
CLIENT_RANKS = 2
BANDWIDTH, RTT = "100mbit", "20ms"
APART = 1.1
"""measured seconds whose ratio is larger must be predicted in their order"""
CUTS = ("norm1", "pool2")
CALIBRATION, OTHERS = 4, (12, 6, 24)
"""numbers of clients"""


@dataclass(frozen=True)
class Case:
    """A configuration that is benchmarked; `links`: over emulated ones."""

    cut: str
    clients: int
    links: bool = False

    def __str__(self) -> str:
        where = f", {BANDWIDTH} and {RTT}" if self.links else ""
        return f"cut `{self.cut}`, {self.clients} clients{where}"

    @property
    def keys(self) -> list[str]:
        """Those that it changes."""
        return [
            *(f"model.cut={self.cut}", f"clients.count={self.clients}", "device=cpu"),
            f"ranks={CLIENT_RANKS + 1}",
        ]

    def folder(self, runs: Path) -> Path:
        """Holds its benchmark."""
        return runs / f"{self.cut}-{self.clients}{'-links' if self.links else ''}"

    def measure(self, runs: Path) -> None:
        """Run its benchmark, unless that is done already."""
        if (self.folder(runs) / "bench.json").exists():
            return
        print(f"== {self} ==", flush=True)
        rates = ["--clients", str(CLIENT_RANKS), "--up", BANDWIDTH, "--down", BANDWIDTH, "--rtt", RTT, "--"]
        launcher = [str(ROOT / "launch" / "wan.py"), *rates] if self.links else ["-m", "fslsage_rpc"]
        keys = [*self.keys, f"name={self.folder(runs).name}", f"output={runs.absolute()}"]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        command = [sys.executable, *launcher, "bench", str(CONFIG), *keys]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)

    def measured(self, runs: Path) -> dict[str, float]:
        """Seconds per round by algorithm.

        Raises:
            SystemExit: others had the cores meanwhile.
        """
        result = json.loads((self.folder(runs) / "bench.json").read_text(encoding="utf-8"))
        if untrusted(result) and not self.links:  # whose emulation works on the same cores
            raise SystemExit(f"{self.folder(runs)}: others had the cores; remove it and try again")
        return {each["algorithm"]: each["round_seconds"]["median"] for each in result["variants"].values()}


@dataclass(frozen=True)
class Comparison:
    """One algorithm's seconds per round in one case: measured, and predicted in two ways."""

    case: Case
    algorithm: str
    measured: float
    predicted: dict[str, float]
    """from a benchmark, and from what is measured here in one process"""


def comparisons(case: Case, calibration: Path, runs: Path) -> list[Comparison]:
    """The case beside what the benchmark in the folder `calibration` predicts, for the five algorithms."""
    config = load(CONFIG, case.keys)
    bandwidth, rtt = (BANDWIDTH, RTT) if case.links else (None, None)
    measured = read_calibration(calibration, config)
    by = {"benchmark": measured, "here": calibrate_here(config, measured.costs)}
    link = link_speed(measured.link, bandwidth, rtt)
    place = partial(Scenario, link=link, client_ranks=CLIENT_RANKS, shared_cores=float(len(usable_cores())))
    found = {how: predictions(config, costs, place) for how, costs in by.items()}
    return [
        Comparison(case, name, seconds, {how: each[name].round_seconds for how, each in found.items()})
        for name, seconds in case.measured(runs).items()
    ]


def page(comparisons: Sequence[Comparison]) -> str:
    """The table, and what it says of each way to predict."""
    rows = [
        [
            str(one.case),
            display_name(one.algorithm),
            f"{one.measured:.3f}",
            *(
                text
                for seconds in one.predicted.values()
                for text in (f"{seconds:.3f}", f"{one.measured / seconds:.2f}")
            ),
        ]
        for one in comparisons
    ]
    headers = ["case", "algorithm", "measured", "*predicted*, benchmark", "measured / predicted"]
    headers += ["*predicted*, here", "measured / predicted"]
    said = []
    places = {"on one machine": False, f"over links of {BANDWIDTH} and {RTT}": True}
    for (where, links), how in itertools.product(places.items(), comparisons[0].predicted):
        some = [one for one in comparisons if one.case.links == links]
        if not some:
            continue
        off = [one.measured / one.predicted[how] for one in some]
        wrong = sum(wrong_order(a, b, how) for a, b in itertools.combinations(some, 2) if a.case == b.case)
        said.append(
            f"From {how}, {where}: measured / predicted is {min(off):.2f} to {max(off):.2f}.\n"
            f"Of the pairs of algorithms more than 10 % apart, {wrong} are predicted in the wrong order."
        )
    return "\n\n".join([table(headers, rows), *said])


def wrong_order(a: Comparison, b: Comparison, how: str) -> bool:
    """Are these clearly apart, and predicted the other way round?"""
    ratio = a.measured / b.measured
    apart = max(ratio, 1 / ratio) > APART
    return apart and (a.predicted[how] < b.predicted[how]) != (a.measured < b.measured)


def main() -> None:
    """Measure what is missing, then print the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, required=True, metavar="DIR", help="of the benchmarks")
    parser.add_argument("--links", action="store_true", help="over emulated links, too; as root")
    options = parser.parse_args()
    found: list[Comparison] = []
    for cut in CUTS:
        calibration = Case(cut, CALIBRATION)
        others = [Case(cut, each) for each in OTHERS]
        if options.links:
            others.append(Case(cut, OTHERS[0], links=True))
        for case in (calibration, *others):
            case.measure(options.runs)
        calibration.measured(options.runs)
        for case in others:
            found += comparisons(case, calibration.folder(options.runs), options.runs)
    print(page(found))


if __name__ == "__main__":
    main()
