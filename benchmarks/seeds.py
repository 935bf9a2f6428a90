"""A benchmark of variants over three seeds: accuracy, bytes and seconds a round.

    python benchmarks/seeds.py configs/bench/codecs.yaml --data DIR --link 20mbit
    python benchmarks/seeds.py configs/bench/aggregation.yaml --data DIR

With a link every client rank is behind one of that rate, which needs root (docs/emulated-networks.md). A
benchmark that is complete in `--runs` is not run again. The table goes between the marks of the page
docs/results/NAME.md. Seconds are worth something only if nothing else runs meanwhile.
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

from fslsage_rpc.bench.table import BUSY_MARK, round_bytes, table
from fslsage_rpc.config.loading import load
from fslsage_rpc.config.schema import Config
from fslsage_rpc.units import MIB

ROOT = Path(__file__).parent.parent
SEEDS = (0, 1, 2)
HEADERS = (
    "variant",
    "accuracy, mean (lowest to highest)",
    "wire MiB a round",
    "s a round",
    "bound",
    "codecs",
)
MARKS = "<!-- measured -->", "<!-- end of measured -->"
CODING = ("encode", "decode")
BUSY = f"\\{BUSY_MARK} others had a part of the host's cores meanwhile: do not trust these seconds."


def measure(path: Path, config: Config, seed: int, data: str, runs: Path, link: str | None) -> Path:
    """Run the benchmark with a seed, unless that is done already; its folder."""
    folder = runs / f"{config.name}-{seed}"
    if (folder / "bench.json").exists():
        return folder
    command = [
        *("bench", str(path), f"name={folder.name}", f"output={runs}", f"seed={seed}"),
        *(f"data.root={data}", "data.download=false", "device=cpu"),
    ]
    launcher = ["-m", "fslsage_rpc"]
    if link:
        shaped = ["--clients", str(config.ranks - 1), "--up", link, "--down", link]
        launcher = [str(ROOT / "launch" / "wan.py"), *shaped, "--"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    subprocess.run([sys.executable, *launcher, *command], check=True, cwd=ROOT, env=environment)
    return folder


def rows(folders: Sequence[Path]) -> list[list[str]]:
    """One for each variant, under `HEADERS`."""
    results = [json.loads((folder / "bench.json").read_text()) for folder in folders]
    return [
        row(
            name,
            [result["variants"][name] for result in results],
            [final_accuracy(folder, name) for folder in folders],
        )
        for name in results[0]["variants"]
    ]


def results(folders: Sequence[Path]) -> str:
    """The table and what is to be known of it, in Markdown."""
    found = rows(folders)
    busy = any(BUSY_MARK in cell for each in found for cell in each)
    said = [table(HEADERS, found), described(folders[0])]
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


def final_accuracy(folder: Path, variant: str) -> float:
    """Test accuracy after the last round, mean over the repeats."""
    files = sorted((folder / "rounds").glob(f"{variant}-[0-9]*.jsonl"))
    lasts = [json.loads(file.read_text().splitlines()[-1]) for file in files]
    return statistics.fmean(line["test_accuracy"] for line in lasts)


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
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "seeds", help="where runs go")
    options = parser.parse_args(arguments)
    path, runs = options.config.resolve(), options.runs.resolve()
    config, data = load(path), str(Path(options.data).resolve())
    folders = [measure(path, config, seed, data, runs, options.link) for seed in SEEDS]
    measured = results(folders)
    print(measured)
    page = ROOT / "docs" / "results" / f"{config.name}.md"
    if page.exists():
        before, _, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        page.write_text(f"{before}{MARKS[0]}\n\n{measured}\n\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
