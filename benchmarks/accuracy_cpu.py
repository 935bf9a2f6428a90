"""Accuracy of the five algorithms on a part of CIFAR-10, against rounds and against paper-ledger bytes.

    pip install -e '.[plots]'
    python benchmarks/accuracy_cpu.py --data DIR

About 90 minutes on 2 idle cores, in pieces of 2 to 8 minutes. A piece that is complete in `--runs` is not
trained again, so an interrupted study goes on when the same command is given again. At the end it writes the
figures and the tables of docs/results/accuracy-cpu.md; the text around the tables stays.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "accuracy_cpu.yaml"
SEEDS = (0, 1, 2)
PARTITIONS = {"iid": "IID", "dirichlet": "Dirichlet, alpha = 0.5"}
ALGORITHMS = ("fsl_sage", "cse_fsl", "splitfed_v1", "splitfed_v2", "fedavg")
INTERVALS = (2, 5, 10)
AVERAGING = ("never", "alignment", "round")
ROUNDS = ("accuracy, round 10", "accuracy, round 20")
MIB = 2**20

Lines = list[dict[str, Any]]
"""the lines of one run's metrics.jsonl"""


@dataclass(frozen=True)
class Piece:
    """One run of the study."""

    algorithm: str
    partition: str
    seed: int
    align_every: int = 5
    average_auxiliary: str = "alignment"

    @property
    def name(self) -> str:
        """Its folder."""
        parts = [self.algorithm, self.partition, f"seed{self.seed}"]
        if self.algorithm == "fsl_sage":
            parts += [f"l{self.align_every}", self.average_auxiliary]
        return "-".join(parts)

    def overrides(self) -> list[str]:
        """What it changes of the configuration file."""
        changes = [
            f"name={self.name}",
            f"algorithm.name={self.algorithm}",
            f"data.partition={self.partition}",
            f"seed={self.seed}",
        ]
        if self.algorithm == "fsl_sage":
            changes += [
                f"algorithm.align_every={self.align_every}",
                f"algorithm.average_auxiliary={self.average_auxiliary}",
            ]
        return changes


Results = dict[Piece, Lines]


def pieces() -> list[Piece]:
    """All runs: the comparison seed by seed, then FSL-SAGE's two ablations, on the Dirichlet partition."""
    comparison = [
        Piece(algorithm, partition, seed)
        for seed in SEEDS
        for partition in PARTITIONS
        for algorithm in ALGORITHMS
    ]
    ablations = [
        piece
        for seed in SEEDS
        for piece in (
            *(Piece("fsl_sage", "dirichlet", seed, align_every=interval) for interval in INTERVALS),
            *(Piece("fsl_sage", "dirichlet", seed, average_auxiliary=setting) for setting in AVERAGING),
        )
    ]
    return list(dict.fromkeys([*comparison, *ablations]))


def train(piece: Piece, data: str, runs: str) -> tuple[Piece, Lines]:
    """Train a piece (or find it complete), silently; its lines of metrics.jsonl."""
    import torch

    import fslsage_rpc

    torch.set_num_threads(1)  # one core a piece, as many pieces as cores
    overrides = [*piece.overrides(), f"data.root={data}", "data.download=false", f"output={runs}"]
    overrides.append("checkpoint.every=null")
    with contextlib.redirect_stdout(io.StringIO()):
        return piece, fslsage_rpc.train(CONFIG, *overrides).rounds


def tables(results: Results) -> str:
    """The measured part of the report, in Markdown."""
    parts = [comparison(results, partition, title) for partition, title in PARTITIONS.items()]
    runs_of = {
        setting: [results[Piece("fsl_sage", "dirichlet", seed, average_auxiliary=setting)] for seed in SEEDS]
        for setting in AVERAGING
    }
    parts.append(ablation("Averaging the auxiliary models", "average_auxiliary", runs_of))
    runs_of = {
        str(interval): [results[Piece("fsl_sage", "dirichlet", seed, align_every=interval)] for seed in SEEDS]
        for interval in INTERVALS
    }
    parts.append(ablation("The alignment interval", "align_every", runs_of))
    return "\n\n".join(parts)


def comparison(results: Results, partition: str, title: str) -> str:
    """The table of the five algorithms on one partition."""
    runs_of = {
        algorithm: [results[Piece(algorithm, partition, seed)] for seed in SEEDS] for algorithm in ALGORITHMS
    }
    budget = min(runs[0][-1]["paper_bytes_total"] for runs in runs_of.values())
    rows = [
        [
            f"`{algorithm}`",
            spread([accuracy(run, 10) for run in runs]),
            spread([accuracy(run, 20) for run in runs]),
            f"{runs[0][-1]['paper_bytes_total'] / MIB:,.0f} MiB",
            spread([accuracy_at(run, budget) for run in runs]),
        ]
        for algorithm, runs in runs_of.items()
    ]
    at_budget = f"accuracy at {budget / MIB:,.0f} MiB"
    return markdown(title, ["algorithm", *ROUNDS, "paper ledger, 20 rounds", at_budget], rows)


def ablation(title: str, key: str, runs_of: dict[str, list[Lines]]) -> str:
    """The table of one key of FSL-SAGE, on the Dirichlet partition."""
    rows = [
        [
            f"`{key}: {value}`",
            spread([accuracy(run, 10) for run in runs]),
            spread([accuracy(run, 20) for run in runs]),
            f"{runs[0][-1]['paper_bytes_total'] / MIB:,.0f} MiB",
            spread([statistics.fmean(line["drift"]["cosine"] for line in run[5:]) for run in runs]),
        ]
        for value, runs in runs_of.items()
    ]
    headers = ["FSL-SAGE with", *ROUNDS, "paper ledger, 20 rounds", "cosine of estimate, rounds 6 to 20"]
    return markdown(f"{title} ({PARTITIONS['dirichlet']})", headers, rows)


def markdown(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A headed table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join([f"### {title}", "", *("| " + " | ".join(line) + " |" for line in lines)])


def accuracy(run: Lines, t: int) -> float:
    """Test accuracy after so many rounds."""
    return run[t - 1]["test_accuracy"]


def accuracy_at(run: Lines, size: int) -> float | None:
    """The last test accuracy within so many bytes of the paper ledger; None where the first is beyond."""
    within = [
        line["test_accuracy"]
        for line in run
        if line["paper_bytes_total"] <= size and line["test_accuracy"] is not None
    ]
    return within[-1] if within else None


def spread(values: Sequence[float | None]) -> str:
    """Mean (lowest to highest) over the seeds."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "not there yet"
    return f"{statistics.fmean(known):.3f} ({min(known):.3f} to {max(known):.3f})"


def figures(results: Results, out: Path) -> None:
    """accuracy-cpu-PARTITION.png and drift-cpu.png."""
    from fslsage_rpc.report.figures import (
        Curve,
        Look,
        Panel,
        color_of,
        curves_figure,
        display_name,
        look_of,
        rendered,
    )

    def runs(algorithm: str, partition: str, **keys: Any) -> list[Lines]:
        return [results[Piece(algorithm, partition, seed, **keys)] for seed in SEEDS]

    def accuracy(line: dict[str, Any]) -> float | None:
        return line["test_accuracy"]

    def round(line: dict[str, Any]) -> float:
        return line["round"]

    for partition, title in PARTITIONS.items():
        curves = [Curve(display_name(a), look_of(a), runs(a, partition)) for a in ALGORITHMS]
        if partition == "dirichlet":
            personal = runs("fsl_sage", partition, average_auxiliary="never")
            look = Look(color_of("fsl_sage"), "--", "s")
            curves.append(Curve("FSL-SAGE, average_auxiliary: never", look, personal))
        panels = [
            Panel(round, accuracy, "round", "test accuracy", title, whole_numbers=True),
            Panel(
                lambda line: line["paper_bytes_total"] / MIB, accuracy, "paper ledger, MiB", "test accuracy"
            ),
        ]
        (out / f"accuracy-cpu-{partition}.png").write_bytes(rendered(curves_figure(curves, panels)))

    looks = zip(
        INTERVALS, ("-", "--", ":"), ("o", "s", "D"), ("fsl_sage", "splitfed_v1", "cse_fsl"), strict=True
    )
    curves = [
        Curve(
            f"l = {interval}",
            Look(color_of(like), style, marker),
            runs("fsl_sage", "dirichlet", align_every=interval),
        )
        for interval, style, marker, like in looks
    ]
    panels = [
        Panel(
            round, lambda line: line["drift"]["cosine"], "round", "cosine", "direction: 1 is perfect", True
        ),
        Panel(
            round, lambda line: line["drift"]["nmse"], "round", "squared error", "error: 0 is perfect", True
        ),
    ]
    drift = curves_figure(curves, panels, mark=lambda line: line["alignment"] is not None)
    (out / "drift-cpu.png").write_bytes(rendered(drift))


def write(results: Results, out: Path) -> None:
    """Put tables and figures into the results folder."""
    begin, end = "<!-- measured -->", "<!-- end of measured -->"
    page = out / "accuracy-cpu.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n\n{tables(results)}\n\n{end}{after}", encoding="utf-8")
    figures(results, out)


def main() -> None:
    """Train what is missing, then write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--runs", default="runs/accuracy-cpu", help="where the runs go, and are found again")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results", help="where the report is")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="pieces at a time, one thread each")
    options = parser.parse_args()
    started, todo = time.monotonic(), pieces()
    results = {}
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(train, piece, options.data, options.runs) for piece in todo]
        for future in as_completed(futures):
            piece, lines = future.result()
            results[piece] = lines
            print(
                f"{len(results)}/{len(todo)}  {piece.name}  accuracy {lines[-1]['test_accuracy']:.3f}  "
                f"{(time.monotonic() - started) / 60:.0f} min",
                flush=True,
            )
    write(results, options.out)


if __name__ == "__main__":
    main()
