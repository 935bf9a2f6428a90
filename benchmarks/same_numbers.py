"""Do two checkouts train to the same numbers? A guard for changes of the code that are to change none.

    python benchmarks/same_numbers.py OLD_CHECKOUT [--only NAME ...]

Trains small configurations in the old checkout and in the one that holds this script, side by side, each by
its command line. Then `model.pt` and the keys of `metrics.jsonl` that both write are compared, bit for bit.
Seconds, the load of the host and peak memory are left out. What differs on purpose stands in `CHANGES`, with
reasons.

Prints a line for each configuration with its first differences, and a table. The runs are kept where any
differ. Exit status: 0 if all are the same, 1 if any differ, 2 for a mistake in the command line. Under 3
minutes on 2 cores; needs Linux.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from watched_job import processes_with


@dataclass(frozen=True, kw_only=True)
class Change:
    """A difference between the checkouts on purpose, and why. Settings are as on the command line."""

    reason: str
    configurations: Sequence[str] = ()
    """their names; empty: all"""
    metric: tuple[str, str] | None = None
    """the old and the new dotted name of a key of `metrics.jsonl`"""
    setting: tuple[str, str] | None = None
    """the old and the new dotted name of a configuration's key; `CONFIGURATIONS` has new names"""
    old: str = ""
    """settings that only the old checkout is given"""
    new: str = ""
    """settings that only the new checkout is given, as the old value of a default that has changed"""
    first_round: int = 0
    """how many rounds of the new checkout come before the old one's first; they are not compared"""
    differs: Sequence[str] = ()
    """dotted keys that may differ, and all below them: `drift`, `model.pt`, `model.pt.first`, `rounds`"""


CHANGES: Sequence[Change] = ()
"""all differences on purpose; emptied when what is new becomes what is old"""

BASE = (  # all else is at its default, so that a default that changes is seen
    "rounds=4 device=cpu transport=local clients.batch_size=16 data.train_limit=160 data.test_limit=60"
    " model.memory_format=contiguous"  # the default goes by timing
    " algorithm.upload_every=2 algorithm.align_every=2 algorithm.alignment.epochs=4"
    " algorithm.alignment.batch_size=32 algorithm.alignment.buffer_size=64"
)
RPC = "transport=rpc ranks=3 comm.transports=[uv]"
BATCH_NORM = "model.name=same_numbers:batch_norm model.cut=first"
DROPOUT = "model.name=same_numbers:dropout model.cut=first"
BOTH = "model.name=same_numbers:both model.cut=first model.auxiliary.until=second"
HALF = "clients.participation=0.5"
CONFIGURATIONS = {
    "sage": "algorithm.name=fsl_sage server.order=round_robin",
    "sage-batch-norm": f"algorithm.name=fsl_sage server.order=client_major {BATCH_NORM} {HALF}"
    " algorithm.average_auxiliary=round optimizer.server.name=sgd optimizer.server.lr=0.1",
    "sage-dropout": f"algorithm.name=fsl_sage server.order=round_robin {DROPOUT} clients.local_epochs=2"
    " algorithm.average_auxiliary=never model.auxiliary.kind=mlp model.auxiliary.width=16"
    " data.partition=shards",
    "v1-both": f"algorithm.name=splitfed_v1 server.order=round_robin {BOTH} {HALF}",
    "v2-batch-norm": f"algorithm.name=splitfed_v2 server.order=client_major {BATCH_NORM} precision=bf16",
    "v2-dropout": f"algorithm.name=splitfed_v2 server.order=arrival {DROPOUT} loss.label_smoothing=0.1",
    "cse-both": f"algorithm.name=cse_fsl server.order=client_major {BOTH} {HALF} data.partition=iid",
    "fedavg-both": f"algorithm.name=fedavg {BOTH} {HALF} optimizer.client.name=sgd optimizer.client.lr=0.1",
    "resume": f"algorithm.name=fsl_sage server.order=round_robin {BOTH} {HALF} rounds=6"
    " optimizer.client.scheduler.name=ExponentialLR optimizer.client.scheduler.arguments.gamma=0.95"
    " optimizer.client.scheduler.per=step",
    "warm-start": f"algorithm.name=fsl_sage server.order=round_robin {BATCH_NORM} clients.participation=0.75"
    " algorithm.alignment.solver=lbfgs model.auxiliary.kind=linear",
    "rpc-sage": f"algorithm.name=fsl_sage server.order=round_robin {RPC} {BOTH} clients.participation=0.75",
    "rpc-v1": f"algorithm.name=splitfed_v1 server.order=client_major {RPC} {BATCH_NORM}",
    "rpc-cse": f"algorithm.name=cse_fsl server.order=round_robin {RPC} {DROPOUT} {HALF}",
}
FIRST_STARTS = {"resume": [["rounds=3"]]}
"""settings of earlier starts of a configuration, which the last one goes on from"""
LEFT_OUT = {"seconds", "phases", "load", "host", "host_busy", "peak"}
"""words in keys of `metrics.jsonl` that differ between equal runs"""
OF_RANKS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
"""variables of a job, which the runs are no part of"""
LONGEST_SECONDS = 300.0
"""of a start; then the run has failed"""
SHOWN = 5
"""differences of one configuration"""
TRAINED = "trained"
ABSENT = "absent"

Figures = dict[tuple[str, str], Any]
"""by place ("round 3, ") and dotted key"""


def both(
    num_classes: int, image_shape: tuple[int, ...], norm: bool = True, dropout: float = 0.2
) -> nn.Module:
    """Two blocks with BatchNorm and dropout, and a linear classifier."""

    def block(channels: int) -> nn.Module:
        convolution, normalised = nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8)
        return nn.Sequential(
            convolution, normalised if norm else nn.Identity(), nn.ReLU(), nn.Dropout(dropout)
        )

    classifier = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, num_classes))
    parts = {"first": block(image_shape[0]), "second": block(8), "classifier": classifier}
    return nn.Sequential(OrderedDict(parts))


batch_norm = partial(both, dropout=0.0)
dropout = partial(both, norm=False)


@dataclass(frozen=True)
class Side:
    """One of the two checkouts, and the folder of its runs."""

    checkout: Path
    folder: Path

    def start(self, name: str, arguments: Sequence[str], mark: str = "MARK") -> subprocess.Popen[bytes]:
        """Start Python with this checkout's package; all that it starts has the mark in its environment."""
        outer = {k: v for k, v in os.environ.items() if k not in OF_RANKS and "TORCHELASTIC" not in k}
        paths = [str(self.checkout), str(Path(__file__).parent), outer.get("PYTHONPATH", "")]
        variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths)), mark: ""}
        with (self.folder / f"{name}.out").open("wb") as out, (self.folder / f"{name}.err").open("wb") as err:
            return subprocess.Popen(
                [sys.executable, *arguments],
                cwd=self.folder,
                env=outer | variables,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def outcome(self, name: str, process: subprocess.Popen[bytes], until: float) -> str:
        """Wait for the end of a run; how it ended."""
        try:
            status = process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            return f"not done after {LONGEST_SECONDS:.0f} s"
        said = (self.folder / f"{name}.err").read_text(errors="replace").strip().splitlines()
        return f"status {status}, {said[-1] if said else 'no word'}" if status else TRAINED

    def figures(self, name: str, names: Sequence[tuple[str, str]], first_round: int) -> Figures:
        """The figures that a run has written, under other names; rounds count from 0 behind `first_round`."""
        found: Figures = {}
        rounds = found["", "rounds"] = []
        text = (self.folder / name / "metrics.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        first_round += lines[0]["round"]  # 0 or 1, by the checkout's age
        for line in lines:
            if (round := line.pop("round") - first_round) < 0:
                continue
            rounds.append(round)
            for key, value in leaves(line):
                for was, becomes in names:
                    key = becomes + key.removeprefix(was) if below(key, was) else key
                found[f"round {round}, ", key] = value
        model = torch.load(self.folder / name / "model.pt", weights_only=True)
        return found | {("", f"model.pt.{key}"): tensor for key, tensor in model.items()}

    def check(self) -> None:
        """Leave with a mistake unless this checkout's package is the one that is imported."""
        if not (self.checkout / "fslsage_rpc" / "__main__.py").is_file():
            mistake(f"OLD_CHECKOUT: got {self.checkout}, which has no fslsage_rpc/__main__.py")
        self.folder.mkdir()
        (self.folder / "defaults.yaml").touch()
        self.start("imported", ["-c", "import fslsage_rpc; print(fslsage_rpc.__file__)"]).wait()
        imported = (self.folder / "imported.out").read_text().strip()
        if not Path(imported).is_relative_to(self.checkout):
            mistake(f"{self.checkout}: {imported or 'no fslsage_rpc'} is imported instead")


def mistake(text: str) -> NoReturn:
    """Leave with one line about what is wrong in the command line."""
    print(f"same_numbers.py: {text}", file=sys.stderr)
    sys.exit(2)


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a tree by dotted key. A tree in it counts too: where it was null it is another value."""
    for name, value in tree.items():
        yield prefix + name, "a tree" if isinstance(value, dict) else value
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")


def below(key: str, name: str) -> bool:
    """Is it this dotted key, or one below it?"""
    return f"{key}.".startswith(f"{name}.")


def same(old: Any, new: Any) -> bool:
    """Are two values equal bit for bit? NaN is equal to itself, and 0.0 not to -0.0."""
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        alike = old.dtype == new.dtype and old.shape == new.shape
        return alike and torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (old, new)))
    return repr(old) == repr(new)


def shown(value: Any) -> str:
    """A value in few words."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} of sum {value.double().sum():.9g}"
    return str(value)


@dataclass
class Comparison:
    """The outcome of one configuration.

    Attributes:
        values: how many were compared.
        on_purpose: keys that differ and may.
        lonely: keys of `metrics.jsonl` that one checkout alone writes.
    """

    name: str
    values: int = 0
    differences: list[str] = field(default_factory=list)
    on_purpose: set[str] = field(default_factory=set)
    lonely: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        text = f"{len(self.differences)} differ" if self.differences else "same"
        return f"{text}; on purpose: {', '.join(sorted(self.on_purpose))}" if self.on_purpose else text

    def see(self, old: Figures, new: Figures) -> None:
        """Compare the figures of two runs."""
        may_differ = [name for change in changes_of(self.name) for name in change.differs]
        places = {where for where, _ in old} & {
            where for where, _ in new
        }  # a round of one alone is one difference
        for where, key in old | new:
            if where not in places or LEFT_OUT & set(key.replace(".", "_").split("_")):
                continue
            one, other = old.get((where, key), ABSENT), new.get((where, key), ABSENT)
            if where and (one is ABSENT or other is ABSENT):
                self.lonely.add(f"{key} ({'new' if one is ABSENT else 'old'})")
                continue
            self.values += 1
            if same(one, other):
                continue
            if any(below(key, name) for name in may_differ):
                self.on_purpose.add(key)
            else:
                self.differences.append(f"{where}{key}: old {shown(one)}, new {shown(other)}")


def changes_of(name: str) -> list[Change]:
    """The changes that are meant for a configuration."""
    return [change for change in CHANGES if name in (change.configurations or CONFIGURATIONS)]


def settings_of(name: str) -> tuple[dict[str, str], dict[str, str]]:
    """A configuration as the old and as the new checkout is given it."""

    def by_key(settings: str) -> dict[str, str]:
        return dict(setting.split("=", 1) for setting in settings.split())

    new = by_key(f"{BASE} {CONFIGURATIONS[name]}")
    was = {change.setting[1]: change.setting[0] for change in changes_of(name) if change.setting}
    old = {was.get(key, key): value for key, value in new.items()}
    for change in changes_of(name):
        old, new = old | by_key(change.old), new | by_key(change.new)
    return old, new


def train(name: str, more: Sequence[str], sides: Sequence[Side]) -> list[str]:
    """Train a configuration in both checkouts at the same time; how it ended in each."""
    mark, until = f"SAME_NUMBERS_{uuid.uuid4().hex}", time.monotonic() + LONGEST_SECONDS
    command = ["-m", "fslsage_rpc", "train", "defaults.yaml", f"name={name}", "output=."]
    processes = []
    try:
        for side, settings in zip(sides, settings_of(name), strict=True):
            given = [f"{key}={value}" for key, value in settings.items()]
            processes.append(side.start(name, [*command, *given, *more], mark))
        started = zip(sides, processes, strict=True)
        return [side.outcome(name, process, until) for side, process in started]
    finally:
        for left in processes_with(f"{mark}="):
            with suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)
        for process in processes:
            process.wait()


def compare(name: str, sides: Sequence[Side]) -> Comparison:
    """Train a configuration in both checkouts, and compare what they wrote."""
    comparison = Comparison(name)
    for more in [*FIRST_STARTS.get(name, []), []]:
        outcomes = train(name, more, sides)
        if outcomes != [TRAINED, TRAINED]:
            comparison.differences = [f"the run: old {outcomes[0]}; new {outcomes[1]}"]
            return comparison
    names = [change.metric for change in changes_of(name) if change.metric]
    first_round = sum(change.first_round for change in changes_of(name))
    try:
        old, new = sides[0].figures(name, names, 0), sides[1].figures(name, [], first_round)
    except OSError as error:
        comparison.differences = [f"the run: {error}"]
    else:
        comparison.see(old, new)
    return comparison


def show(comparisons: Sequence[Comparison]) -> None:
    """Print the table, and what it leaves out."""
    row = "{:16} {:12} {:13} {:10} {:>6}  {}".format
    print("\n" + row("configuration", "algorithm", "order", "transport", "values", "result"))
    for one in comparisons:
        _, settings = settings_of(one.name)
        keys = (settings.get(key, "-") for key in ("algorithm.name", "server.order", "transport"))
        print(row(one.name, *keys, one.values, one))
    for key in sorted({key for one in comparisons for key in one.lonely}):
        print(f"written by one checkout alone: {key}")
    for change in CHANGES:
        print(f"on purpose in {', '.join(change.configurations) or 'all'}: {change.reason}")


def main() -> int:
    """The configurations, one after the other."""
    parser = argparse.ArgumentParser(description="Compares the numbers that two checkouts train to.")
    parser.add_argument("old", type=Path, metavar="OLD_CHECKOUT", help="folder that holds its fslsage_rpc/")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join(CONFIGURATIONS)}")
    options = parser.parse_args()
    names = options.only or list(CONFIGURATIONS)
    for name in names:
        if name not in CONFIGURATIONS:
            mistake(f"--only: got {name}, expected of {', '.join(CONFIGURATIONS)}")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))  # through what cleans up
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="same-numbers-"))
    here = Path(__file__).resolve().parent.parent
    sides = [Side(options.old.resolve(), folder / "old"), Side(here, folder / "new")]
    comparisons: list[Comparison] = []
    try:
        for side in sides:
            side.check()
        for name in names:
            started = time.monotonic()
            one = compare(name, sides)
            comparisons.append(one)
            print(f"{name}: {one} ({time.monotonic() - started:.0f} s)", flush=True)
            for text in one.differences[:SHOWN]:
                print(f"    {text}", flush=True)
    finally:
        differ = sum(bool(one.differences) for one in comparisons)
        if not differ:
            shutil.rmtree(folder)
    show(comparisons)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = f"{time.monotonic() - began:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of CPU"
    print(f"\n{len(comparisons) - differ} the same, {differ} differ ({seconds})")
    if differ:
        print(f"the runs are in {folder}")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
