"""A benchmark of variants over three seeds: accuracy, bytes and seconds a round.

    python benchmarks/seeds.py configs/bench/codecs.yaml --data DIR --link 20mbit
    python benchmarks/seeds.py configs/bench/aggregation.yaml --data DIR
    python benchmarks/seeds.py configs/bench/start.yaml --data DIR data.partition=dirichlet name=start-skewed

With a link every client rank is behind one of that rate, which needs root (docs/emulated-networks.md). A
benchmark that is complete in `--runs` is not run again. The table goes between the marks of the page
docs/results/PAGE.md: that of the configuration, without a part of its name behind a dash. Seconds are worth
something only if nothing else runs meanwhile.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from marked_page import put

from fslsage_rpc.bench.table import BUSY_MARK, round_bytes, table
from fslsage_rpc.config.loading import load
from fslsage_rpc.config.schema import Config
from fslsage_rpc.units import MIB

ROOT = Path(__file__).parent.parent
SEEDS = (0, 1, 2)
HEADERS = (
    "variant",
    "last accuracies, mean (lowest to highest)",
    "wire MiB a round",
    "s a round",
    "bound",
    "codecs",
)
OF_TARGET = ("rounds to {}", "wire MiB to it", "s to it")
"""further ones, where the benchmark has a target accuracy: by seed, a dash where that was not reached"""
LAST = 3
CODING = ("encode", "decode")
BUSY = f"\\{BUSY_MARK} others had a part of the host's cores meanwhile: do not trust these seconds."


def measure(
    path: Path, config: Config, seed: int, data: str, runs: Path, link: str | None, keys: Sequence[str]
) -> Path:
    """Run the benchmark with a seed, and with keys of its own, unless that is done already; its folder."""
    folder = runs / f"{config.name}-{seed}"
    if (folder / "bench.json").exists():
        return folder
    command = [
        *("bench", str(path), *keys, f"name={folder.name}", f"output={runs}", f"seed={seed}"),
        *(f"data.root={data}", "data.download=false", "device=cpu"),
    ]
    launcher = ["-m", "fslsage_rpc"]
    if link:
        shaped = ["--clients", str(config.ranks - 1), "--up", link, "--down", link]
        launcher = [str(ROOT / "launch" / "wan.py"), *shaped, "--"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    subprocess.run([sys.executable, *launcher, *command], check=True, cwd=ROOT, env=environment)
    return folder


def rows(folders: Sequence[Path], targeted: bool) -> list[list[str]]:
    """One for each variant, under `HEADERS` (and `OF_TARGET`)."""
    results = [json.loads((folder / "bench.json").read_text()) for folder in folders]
    found = []
    for name in results[0]["variants"]:
        records = [result["variants"][name] for result in results]
        cells = row(name, records, [final_accuracy(folder, name) for folder in folders])
        found.append(cells + (to_target(records) if targeted else []))
    return found


def results(folders: Sequence[Path], target: float | None) -> str:
    """The table and what is to be known of it, in Markdown."""
    found = rows(folders, target is not None)
    headers = HEADERS if target is None else (*HEADERS, *(header.format(target) for header in OF_TARGET))
    busy = any(BUSY_MARK in cell for each in found for cell in each)
    said = [table(headers, found), described(folders[0])]
    return "\n\n".join([*said, BUSY] if busy else said)


def row(name: str, records: Sequence[dict[str, Any]], accuracies: Sequence[float]) -> list[str]:
    """One variant, over all seeds."""
    seconds = [record["round_seconds"]["median"] for record in records]
    mark = BUSY_MARK if any(record["busy_samples"] for record in records) else ""
    coding = [
        sum(record["phases"][party][phase] for party in ("client", "server") for phase in CODING)
        for record in records
    ]
    return [
        f"`{name}`",
        f"{statistics.fmean(accuracies):.3f} ({min(accuracies):.3f} to {max(accuracies):.3f})",
        f"{statistics.fmean(map(round_bytes, records)) / MIB:.2f}",
        f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f}){mark}",
        f"{statistics.median(record['bound_seconds'] for record in records):.2f}",
        f"{statistics.fmean(coding):.3f} s",
    ]


def to_target(records: Sequence[dict[str, Any]]) -> list[str]:
    """The cells under `OF_TARGET`."""
    targets = [record["target"] for record in records]
    units = (("rounds", 1, 0), ("wire_bytes", MIB, 0), ("seconds", 1, 0))
    return [
        ", ".join("-" if each is None else f"{each[key] / unit:.{digits}f}" for each in targets)
        for key, unit, digits in units
    ]


def final_accuracy(folder: Path, variant: str) -> float:
    """Test accuracy, mean over the last rounds that were evaluated, three at most, and over the repeats."""
    files = sorted((folder / "rounds").glob(f"{variant}-[0-9]*.jsonl"))
    lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    scores = [[line["test_accuracy"] for line in each if line["test_accuracy"] is not None] for each in lines]
    return statistics.fmean(score for each in scores for score in each[-LAST:])


def described(folder: Path) -> str:
    """Versions, machine, and links as they were measured."""
    environment = json.loads((folder / "bench.json").read_text())["environment"]
    rank, links = environment["ranks"][0], environment.get("links", {}).get("clients", {})
    said = [
        f"torch {environment['versions']['torch']} on {rank['cores']} cores of {rank['device_name']}, "
        f"{len(environment['ranks'])} ranks of {rank['threads']} thread."
    ]
    for number, link in links.items():
        up, down = (link["measured"][f"{way}_bits_per_second"] / 1e6 for way in ("up", "down"))
        said.append(f"Link of client rank {number}: {up:.1f} Mbit/s up, {down:.1f} Mbit/s down.")
    return "\n".join(said)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then write the table into its page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="of a benchmark")
    parser.add_argument("--data", required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--link", metavar="RATE", help="of every client rank: 20mbit")
    parser.add_argument("keys", nargs="*", help="key=value, as of `fslsage bench`")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "seeds", help="where runs go")
    options = parser.parse_intermixed_args(arguments)
    path, runs = options.config.resolve(), options.runs.resolve()
    config, data = load(path, options.keys), str(Path(options.data).resolve())
    folders = [measure(path, config, seed, data, runs, options.link, options.keys) for seed in SEEDS]
    measured = results(folders, config.bench.target_accuracy)
    print(measured)
    page = ROOT / "docs" / "results" / f"{config.name.partition('-')[0]}.md"
    if page.exists():
        put(page, config.name, measured)


if __name__ == "__main__":
    main()
