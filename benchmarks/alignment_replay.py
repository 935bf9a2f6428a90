"""Which fit of an auxiliary model agrees with uploads to come: fits of one run, made again in other ways.

    python benchmarks/alignment_replay.py --data DIR

A run of configs/study/alignment.yaml is recorded first.
Its checkpoints hold, round by round, the server model and each client's newest uploads.
Each way of `WAYS` then makes the alignments of that run on these uploads, one after the other.
It does so by the program's own fit and from initial weights, whatever the run itself did.
Estimates are compared with true gradients on the uploads of the rounds that follow, which no fit has seen.
Seconds are CPU seconds of one thread of the server, true gradients included.

What is complete in `--runs` is not done again.
Tables and figure go to docs/results/alignment.md, between its marks.
Takes about an hour and a half on 2 cores.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from marked_page import put
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import Tensor, nn

from fslsage_rpc.bench.table import table
from fslsage_rpc.config.loading import load
from fslsage_rpc.config.schema import AlignmentKeys, Auxiliary, Config
from fslsage_rpc.models.flat import flatten
from fslsage_rpc.models.splitting import SplitModel, build
from fslsage_rpc.parties.agreement import Agreement
from fslsage_rpc.parties.auxiliary_fit import AuxiliaryFit, cut_layer_gradient, untouched_statistics
from fslsage_rpc.parties.context import Context
from fslsage_rpc.parties.optimizers import ScheduledOptimizer
from fslsage_rpc.report.figures import tidy
from fslsage_rpc.report.looks import COLORS, MARKERS
from fslsage_rpc.runs.checkpoint_files import RankState, read_manifest, round_folder
from fslsage_rpc.units import MIB

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "study" / "alignment.yaml"
PAGE = ROOT / "docs" / "results" / "alignment.md"
RECORDED = ("data.partition=dirichlet", "algorithm.average_auxiliary=never", "rounds=22")
KEPT = ("checkpoint.every=1", "checkpoint.keep=22", "evaluation.every=11")
CLIENTS = 2
"""of the recorded ones, whose alignments are replayed"""
UPLOADS = 4
"""of a client in a round: batches"""
FIRST, FULL = 1, 6
"""rounds after which the first alignment is made, and after which every buffer is full"""
SCORED, LAST = 12, 21
"""rounds whose uploads are scored: an interval of the longest ones, at whose beginning every way aligns"""
PAPER = AlignmentKeys(epochs=100, batch_size=1000)
TENTH = AlignmentKeys(epochs=10, batch_size=100)
HEADERS = (
    "fit",
    "steps",
    "arithmetic",
    "server s a client and round",
    "MiB a client and round",
    "cosine",
    "error",
    "cosine on the buffer",
)
LABELS = {
    "seconds": {
        "100 x 1000": (-8, -14),
        "10 x 1000": (6, -3),
        "10 x 100": (4, 7),
        "5 x 50": (6, -12),
        "2 x 20": (-12, -14),
        "layer3.0, 5 x 50": (-88, 3),
        "every 1, 2 x 50": (6, -3),
        "every 1, 2 x 20 of 200": (-110, 8),
        "every 10, 10 x 100": (-16, -13),
        "linear, 10 x 100": (6, -3),
    },
    "bytes": {
        "5 x 50": (-34, 6),
        "10 x 1000": (-54, -3),
        "layer3.0, 5 x 50": (-88, 3),
        "every 1, 2 x 50": (-84, 2),
        "every 2, 2 x 50": (-84, 6),
        "every 10, 10 x 100": (-92, -10),
        "10 x 100, averaged": (-6, -14),
        "linear, 10 x 100": (-4, 7),
        "mlp of 128, 10 x 100": (-4, 7),
    },
}
"""in the figure, by what is drawn along: how many points they stand beside their way's mark"""
TICKS = {"seconds": (0.2, 0.5, 1, 2, 5, 10, 20), "bytes": (0.001, 0.01, 0.1, 1, 10)}
Upload = tuple[Tensor, Tensor, Tensor]  # z [B, ...], y [B], g [B, ...]


@dataclass(frozen=True)
class Way:
    """One way to make the alignments.

    Attributes:
        interval: rounds from one alignment to the next.
        relative: the objective is divided by ||g||^2 of its batch.
        averaged: after an alignment all clients go on from the average of their models.
        seed: of the initial weights.
    """

    keys: AlignmentKeys = field(default_factory=lambda: TENTH)
    lr: float = 1e-3
    interval: int = 5
    relative: bool = False
    averaged: bool = False
    auxiliary: Auxiliary = field(default_factory=Auxiliary)
    seed: int = 0

    def passes(self, epochs: int, batch_size: int) -> "Way":
        """The same with another number of passes, in batches of another size."""
        return replace(self, keys=replace(self.keys, epochs=epochs, batch_size=batch_size))

    @property
    def steps(self) -> int:
        """Steps of an alignment on a full buffer."""
        return self.keys.epochs * -(-self.keys.buffer_size // self.keys.batch_size)

    @property
    def arithmetic(self) -> float:
        """Passes of one sample a round, over those of the paper's fit at the same interval as `Way`'s."""
        mine = self.keys.epochs * self.keys.buffer_size / self.interval
        return mine / (PAPER.epochs * PAPER.buffer_size / Way.interval)


BASE = Way()
WAYS: dict[str, dict[str, Way]] = {
    "Passes and batches": {
        f"{epochs} x {batch}": BASE.passes(epochs, batch)
        for epochs, batch in (
            (100, 1000),
            (10, 1000),
            (10, 250),
            (10, 100),
            (10, 50),
            (10, 20),
            (5, 100),
            (5, 50),
            (5, 20),
            (2, 100),
            (2, 50),
            (2, 20),
            (20, 100),
            (1, 20),
            (1, 10),
        )
    },
    "The objective over ||g||² of its batch": {
        f"{epochs} x {batch}, relative": replace(BASE.passes(epochs, batch), relative=True)
        for epochs, batch in ((10, 1000), (10, 100), (5, 50), (2, 20))
    },
    "Learning rate": {
        f"{epochs} x {batch}, {lr:g}": replace(BASE.passes(epochs, batch), lr=lr)
        for epochs, batch in ((10, 100), (5, 50))
        for lr in (3e-4, 3e-3, 1e-2)
    },
    "Samples kept": {
        f"{epochs} x {batch} of {size}": replace(
            BASE, keys=AlignmentKeys(epochs=epochs, batch_size=batch, buffer_size=size)
        )
        for epochs, batch, size in ((10, 50, 500), (10, 25, 250), (10, 10, 100))
    },
    "Auxiliary model": {
        f"{name}, {epochs} x {batch}": replace(BASE.passes(epochs, batch), auxiliary=auxiliary)
        for name, auxiliary in {
            "linear": Auxiliary(kind="linear"),
            "mlp of 128": Auxiliary(kind="mlp", width=128),
            "layer3.0": Auxiliary(until="layer3.0"),
        }.items()
        for epochs, batch in ((10, 100), (5, 50))
    },
    "Interval": {
        f"every {interval}, {epochs} x {batch}": replace(BASE.passes(epochs, batch), interval=interval)
        for interval, epochs, batch in (
            (1, 2, 100),
            (1, 2, 50),
            (1, 1, 50),
            (2, 4, 100),
            (2, 2, 50),
            (10, 20, 100),
            (10, 10, 100),
            (10, 10, 50),
        )
    }
    | {
        f"every 1, {epochs} x {batch} of 200": replace(  # a round's uploads
            BASE, keys=AlignmentKeys(epochs=epochs, batch_size=batch, buffer_size=200), interval=1
        )
        for epochs, batch in ((5, 50), (2, 50), (2, 20), (1, 50))
    },
    "Averaged auxiliary models": {
        f"{epochs} x {batch}, averaged": replace(BASE.passes(epochs, batch), averaged=True)
        for epochs, batch in ((10, 100), (5, 50))
    },
    "Chance: other initial weights": {f"10 x 100, seed {seed}": replace(BASE, seed=seed) for seed in (1, 2)},
}
"""passes x samples of a batch, of a buffer of 1,000; one factor at a time"""


class RelativeFit(AuxiliaryFit):
    """The objective of a batch is a share of what an estimate of 0 leaves of it."""

    def _step(self, *target: Tensor) -> tuple[Tensor, ...]:
        z, y, true = target
        accumulated = self._accumulate((z, y, true), true.square().sum())
        self.optimizer.apply()
        return accumulated


@dataclass(frozen=True)
class Recording:
    """A run whose checkpoints are all there."""

    folder: Path
    config: Config

    def after(self, rounds: int) -> RankState:
        """Everything as it was after so many rounds."""
        manifest = read_manifest(round_folder(self.folder / "checkpoints", rounds))
        return manifest.read(range(CLIENTS), server=True)

    def split(self, auxiliary: Auxiliary, seed: int) -> SplitModel:
        """Its model, with another auxiliary one."""
        keys = replace(self.config.model, auxiliary=auxiliary)
        return build(keys, 10, (3, 32, 32), seed, torch.float32)

    def server(self, state: RankState) -> nn.Module:
        """The server model, in train mode."""
        model = self.split(Auxiliary(), 0).server
        assert state.server is not None
        flatten(model).load_state(state.server["lanes"][0]["weights"])
        return model.train()

    def uploads(self) -> list[list[list[Upload]]]:
        """By round from 2 on, client and batch, with the true gradients by the server model that the round
        began with.
        """
        path = self.folder / "uploads.pt"
        if not path.exists():
            torch.save([self._uploads_of(t) for t in range(FIRST + 1, LAST + 1)], path)
        loaded: list[list[list[Upload]]] = torch.load(path)
        return loaded

    def _uploads_of(self, t: int) -> list[list[Upload]]:
        server, ended = self.server(self.after(t - 1)), self.after(t)
        assert ended.server is not None
        found = []
        for client in range(CLIENTS):
            buffer = ended.server["fits"][client]["buffer"]
            batch = self.config.clients.batch_size
            z, y = (buffer[name][-UPLOADS * batch :].split(batch) for name in ("z", "y"))
            with untouched_statistics(server):
                found.append([(a, b, cut_layer_gradient(server, a, b)) for a, b in zip(z, y, strict=True)])
        return found


def record(data: Path, runs: Path) -> Recording:
    """The run, made if it is not complete."""
    keys = [f"data.root={data}", "data.download=false", "name=recording", f"output={runs}", *RECORDED, *KEPT]
    command = [sys.executable, "-m", "fslsage_rpc", "train", str(CONFIG), *keys]
    subprocess.run(command, check=True, cwd=ROOT)
    return Recording(runs / "recording", load(runs / "recording" / "config.yaml"))


def replayed(way: Way, recording: Recording) -> dict[str, Any]:
    """Make all alignments in this way; the agreement by round, and what it cost."""
    torch.set_num_threads(1)
    fits = [make_fit(way, recording) for _ in range(CLIENTS)]
    rounds, seconds, on_buffer = [], [], []
    for number, uploads in enumerate(recording.uploads()):
        t = FIRST + number  # rounds done
        if number % way.interval == 0:
            spent, records = align(way, fits, recording.after(t), recording)
            if t >= FULL:
                seconds.append(spent)
                on_buffer.append(statistics.fmean(records))
        agreements = [agreement(fit, batches) for fit, batches in zip(fits, uploads, strict=True)]
        rounds.append(
            {"round": t + 1}
            | {key: statistics.fmean(each[key] for each in agreements) for key in ("cosine", "nmse")}
        )
    return {
        "rounds": rounds,
        "seconds": statistics.fmean(seconds) / CLIENTS / way.interval,
        "buffer_cosine": statistics.fmean(on_buffer),
        "bytes": fits[0].weights.nbytes * (3 if way.averaged else 1) / way.interval,
    }


def make_fit(way: Way, recording: Recording) -> AuxiliaryFit:
    """One client's, from the initial weights."""
    model = recording.split(way.auxiliary, way.seed).auxiliary.train()
    keys = replace(recording.config.optimizer.auxiliary, lr=way.lr)
    kind = RelativeFit if way.relative else AuxiliaryFit
    return kind(model, ScheduledOptimizer(keys, model.parameters()), way.keys, Context())


def align(
    way: Way, fits: Sequence[AuxiliaryFit], state: RankState, recording: Recording
) -> tuple[float, list[float]]:
    """Align all clients; seconds of a thread, and each one's last cosine on its buffer."""
    server, records = recording.server(state), []
    assert state.server is not None
    spent = 0.0
    for client, fit in enumerate(fits):
        fit.buffer.load_state(state.server["fits"][client]["buffer"], fit.weights.floats.device)
        began = time.thread_time()
        record = fit.fit(fit.targets(server))
        spent += time.thread_time() - began
        records.append(record.read()["cosine_after"])
    if way.averaged:
        mean = torch.stack([fit.weights.floats for fit in fits]).mean(0)
        for fit in fits:
            fit.weights.floats.copy_(mean)
    return spent, records


def agreement(fit: AuxiliaryFit, uploads: Sequence[Upload]) -> dict[str, float]:
    """How well a client's estimates agree with the true gradients of these uploads."""
    found = Agreement()
    for z, y, gradient in uploads:
        found.add(cut_layer_gradient(fit.model, z, y), gradient)
    read = found.read()
    assert read is not None
    return read


def replay(name: str, way: Way, recording: Recording, runs: Path) -> str:
    """Make a way's alignments unless that is done already; its name."""
    path = runs / f"{name}.json"
    if not path.exists():
        path.write_text(json.dumps(replayed(way, recording)))
    return name


def ways() -> dict[str, Way]:
    """All of them, by name."""
    return {name: way for factor in WAYS.values() for name, way in factor.items()}


def scored(result: Mapping[str, Any], key: str) -> float:
    """The mean over the rounds that count."""
    return statistics.fmean(line[key] for line in result["rounds"] if line["round"] >= SCORED)


def row(name: str, way: Way, result: Mapping[str, Any]) -> list[str]:
    """One way, under `HEADERS`."""
    return [
        name,
        str(way.steps),
        f"{way.arithmetic:.3g}",
        f"{result['seconds']:.2f}",
        f"{result['bytes'] / MIB:.2f}",
        f"{scored(result, 'cosine'):.3f}",
        f"{scored(result, 'nmse'):.2f}",
        f"{result['buffer_cosine']:.3f}",
    ]


def tables(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One for each factor, in Markdown."""
    parts = []
    for factor, named in WAYS.items():
        rows = [row(name, way, results[name]) for name, way in named.items()]
        parts.append(f"### {factor}\n\n{table(HEADERS, rows)}")
    return "\n\n".join(parts)


def draw(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """The agreement with new uploads against the server's seconds and against bytes."""
    figure = Figure(figsize=(11, 4.8), dpi=130, layout="constrained")
    for axes, cost in zip(figure.subplots(1, 2, sharey=True), LABELS, strict=True):
        scale = MIB if cost == "bytes" else 1
        for (factor, named), color, marker in zip(WAYS.items(), (*COLORS, "#666666"), MARKERS, strict=True):
            points = [(results[name][cost] / scale, scored(results[name], "cosine")) for name in named]
            axes.plot(*zip(*points, strict=True), marker, color=color, label=factor, markersize=6, alpha=0.8)
        for name, offset in LABELS[cost].items():
            at = results[name][cost] / scale, scored(results[name], "cosine")
            axes.annotate(name, at, xytext=offset, textcoords="offset points", fontsize=8.5)
        axes.set_xscale("log")
        axes.set_xticks(TICKS[cost], [f"{tick:g}" for tick in TICKS[cost]])
        axes.xaxis.set_minor_locator(NullLocator())
    by_seconds, by_bytes = figure.axes
    y_label = "cosine with true gradients of new uploads"
    tidy(by_seconds, "", "seconds of the server for a client and round (log scale)", y_label)
    tidy(by_bytes, "", "MiB of auxiliary models for a client and round (log scale)", "")
    figure.legend(*by_seconds.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8.5)
    figure.savefig(path)


def main() -> None:
    """Record, replay what is missing, and write the page's part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs" / "alignment-replay", help="where it all goes"
    )
    parser.add_argument("--jobs", type=int, default=2, help="ways that are replayed side by side")
    options = parser.parse_args()
    runs = options.runs.resolve()
    recording = record(options.data.resolve(), runs)
    recording.uploads()
    longest_first = sorted(ways().items(), key=lambda named: -named[1].arithmetic)
    with ProcessPoolExecutor(options.jobs) as pool:
        made = [pool.submit(replay, name, way, recording, runs) for name, way in longest_first]
        for each in as_completed(made):
            print(f"replayed {each.result()}", flush=True)
    results = {name: json.loads((runs / f"{name}.json").read_text()) for name in ways()}
    draw(results, PAGE.with_name("alignment-replay.png"))
    measured = tables(results)
    print(measured)
    put(PAGE, "replayed", measured)


if __name__ == "__main__":
    main()
