"""Curves of the paper's CIFAR-10 experiment within so many seconds: ResNet-18, IID, three algorithms in turn.

    launch/gpu_paper.sh SECONDS DATA [FOLDER [key=value ...]]

FSL-SAGE, CSE-FSL and SplitFedV1 train as `configs/paper` says, in one process, a round of each in turn.
They have the same seed, partition and initial weights.
SECONDS count from the start of the program to its end, as a machine is lent.
A first round of each is always done; from then on only rounds that should fit are begun.
Should one last longer all the same, it is given up, and the program ends with what there is.

DATA holds `cifar-10-batches-py` in torchvision's layout.
Files of it may be missing; the table says which are there.
FOLDER gets a run folder for each algorithm, written round by round, and one `environment.json`.
At the end comes `table.md`; `fslsage report FOLDER/*/` draws the curves.
"""

import argparse
import gc
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cifar10_parts import read

from fslsage_rpc.cli import OneLineParser
from fslsage_rpc.config.loading import from_tree, load, to_tree
from fslsage_rpc.config.own import first_line
from fslsage_rpc.config.schema import Config
from fslsage_rpc.config.variants import sweep_runs
from fslsage_rpc.config.yaml_files import to_yaml
from fslsage_rpc.device.clock import clock
from fslsage_rpc.errors import InputError
from fslsage_rpc.job.opening import open_world
from fslsage_rpc.report import sources
from fslsage_rpc.runs.environment import rank_environment, versions
from fslsage_rpc.runs.metrics_file import MetricsFile
from fslsage_rpc.runs.places import write_whole
from fslsage_rpc.training.experiment import Experiment, check
from fslsage_rpc.training.trainer import Trainer

CONFIG = Path(__file__).parent.parent / "configs" / "paper" / "cifar10_resnet18.yaml"
ALGORITHMS = ("fsl_sage", "cse_fsl", "splitfed_v1")
SETTINGS = (
    "graphs=auto",
    "precision=fp32",  # bf16 would halve the bytes of smashed data, in the ledger too
    "tf32=true",
    "evaluation.every=2",
    "algorithm.measure_drift=false",  # in one process drift is on the training clock
)
"""what the paper leaves open"""
OURS = [
    "name",
    "output",
    "resume",
    "transport",
    "ranks",
    "trace",
    "checkpoint",
    "data.name",
    "data.root",
    "algorithm.name",
]
"""keys that no override may change"""
CAUTION = 1.1
"""a round may take so many times the seconds of the last one of its kind"""
ENDING_SECONDS = 3.0
"""kept for the table and the end of the process"""
GIB = 2**30
AXES: dict[str, Callable[[dict[str, Any]], float]] = {
    "rounds": lambda line: line["round"],
    "training s": lambda line: line["elapsed_seconds"],
    "paper GiB": lambda line: line["paper_bytes_total"] / GIB,
    "wire GiB": lambda line: line["wire_bytes_total"] / GIB,
}
"""what accuracy is drawn against, of a line of metrics.jsonl"""


class Training:
    """One algorithm's training and its run folder, which is there once a round is.

    Attributes:
        error: why it was given up, in one line.
        over: has it ended, by the paper's own limits or by an error?
    """

    def __init__(self, config: Config):
        self.config = config
        self.name = config.algorithm.name
        self.folder = Path(config.output) / config.name
        self.error: str | None = None
        self.over = False
        self._experiment = Experiment.prepare(config)
        self._trainer: Trainer | None = None
        self._round = 0
        self._seconds: dict[bool, float] = {}  # of the last round with alignments, and of the last without
        self._evaluation_seconds = 0.0
        self._metrics = MetricsFile(self.folder / "metrics.jsonl")

    def expected_seconds(self, rounds: int) -> float:
        """Seconds that so many further rounds should take, each with an evaluation, by those so far."""
        longest = max(self._seconds.values())
        each = [self._seconds.get(self._aligns(self._round + more), longest) for more in range(rounds)]
        return CAUTION * (sum(each) + rounds * self._evaluation_seconds)

    def turn(self, evaluate: bool) -> None:
        """Train one round and write its line; an error ends this training alone."""
        try:
            self._train_round(evaluate)
        except Exception as error:
            traceback.print_exc()
            self.error = f"given up in round {self._round + 1}: {first_line(error)}"
            self.over = True
            say(f"{self.name}: {self.error}")
        if self.error:  # only here, where no traceback holds on to its tensors
            self._trainer = None
            gc.collect()

    def _train_round(self, evaluate: bool) -> None:
        if self._trainer is None:
            self._trainer = Trainer(self._experiment, open_world(self.config))
        started = clock()
        self.over = self._trainer.complete_round(self._round, lambda line, _: self._add(line), evaluate)
        last = self._trainer.recorder.last
        assert last is not None
        self._evaluation_seconds = last["evaluation_seconds"] or self._evaluation_seconds
        self._seconds[self._aligns(self._round)] = clock() - started - last["evaluation_seconds"]
        self._round += 1

    def _aligns(self, t: int) -> bool:
        course = self._experiment.rehearsal.course(t)
        return course is not None and course.takes_up

    def _add(self, line: dict[str, Any]) -> None:
        if line["round"] == 1:
            self.folder.mkdir()
            write_whole(self.folder / "config.yaml", to_yaml(to_tree(self.config)))
            self._metrics.begin(b"")
        self._metrics.append(line)
        if line["test_accuracy"] is not None:
            say(
                f"{self.name}: round {line['round']}, accuracy {line['test_accuracy']:.4f}, "
                f"{line['elapsed_seconds']:.1f} s, {line['paper_bytes_total'] / GIB:.2f} GiB"
            )


def configurations(data: str, folder: Path, overrides: Sequence[str]) -> list[Config]:
    """The configuration of each algorithm.

    Raises:
        InputError: an override is of a key that is not free, or a value is not allowed.
    """
    for override in overrides:
        key = override.partition("=")[0]
        if any(f"{key}.".startswith(f"{ours}.") or ours.startswith(f"{key}.") for ours in OURS):
            raise InputError(f"{key}: got an override, expected none: it is set here")
    papers = {run.variant: run.config for run in sweep_runs(load(CONFIG))}
    configs = []
    for name in ALGORITHMS:
        config = from_tree(to_tree(papers[f"iid-{name}"]), [*SETTINGS, *overrides])
        configs.append(
            replace(
                config,
                name=name,
                output=str(folder),
                transport="local",
                checkpoint=replace(config.checkpoint, every=None),
                data=replace(config.data, name="cifar10_parts:Cifar10Parts", root=data),
            )
        )
    return configs


def take_turns(trainings: Sequence[Training], deadline: float, out_of_time: Callable[[], None]) -> None:
    """Train a round of each in turn while a round of each should fit; evaluate the first and the last.

    Args:
        deadline: on the clock.
        out_of_time: ends the process; called by another thread where a round is under way at the deadline.
    """
    for training in trainings:
        training.turn(evaluate=True)
    if clock() >= deadline:
        return
    alarm = threading.Timer(deadline - clock(), out_of_time)
    alarm.daemon = True
    alarm.start()
    while going_on := [training for training in trainings if not training.over]:
        left = deadline - clock()
        if sum(training.expected_seconds(1) for training in going_on) > left:
            break
        last = sum(training.expected_seconds(2) for training in going_on) > left
        for training in going_on:
            training.turn(evaluate=last)
    alarm.cancel()


def table(trainings: Sequence[Training], environment: dict[str, Any]) -> str:
    """The table of all algorithms, from what is on disk, and the facts that belong to it."""
    config = trainings[0].config
    facts_and_rows = [
        [f"- {key}: {value}" for key, value in facts(environment).items()],
        ["| " + " | ".join(row) + " |" for row in rows(trainings)],
        [
            "Accuracy is that of the last evaluation, or of the last one within what all have come to.",
            "Training seconds are without evaluation.",
            "The paper ledger is a model; averaging, in one process, is not on the wire.",
        ],
        [f"`{training.name}`: {training.error}" for training in trainings if training.error],
    ]
    title = f"# CIFAR-10, {config.model.name}, {config.data.partition}: three algorithms in turn"
    return "\n\n".join([title, *("\n".join(lines) for lines in facts_and_rows if lines)]) + "\n"


def rows(trainings: Sequence[Training]) -> list[list[str]]:
    """The head of the table and a row for each algorithm that has finished a round."""
    folders = [training.folder for training in trainings if (training.folder / "metrics.jsonl").exists()]
    runs, _ = sources.read([str(folder) for folder in folders])
    if not runs:
        return []
    scored = [[line for line in run.lines if line["test_accuracy"] is not None] for run in runs]
    common = {unit: min(place(lines[-1]) for lines in scored) for unit, place in AXES.items()}
    head = ["algorithm", *AXES, "accuracy", *(f"accuracy at {show(common[unit])} {unit}" for unit in AXES)]
    body = []
    for run, lines in zip(runs, scored, strict=True):
        row = [f"`{run.folder.name}`", *(show(place(run.lines[-1])) for place in AXES.values())]
        row.append(accuracy(lines))
        for unit, place in AXES.items():
            row.append(accuracy([line for line in lines if place(line) <= common[unit]]))
        body.append(row)
    return [head, ["---"] * len(head), *body]


def facts(environment: dict[str, Any]) -> dict[str, str]:
    """The lines above the table."""
    (rank,) = environment["ranks"]
    known = {name: version for name, version in environment["versions"].items() if version}
    return {
        "device": f"{rank['device_name']} ({rank['device']}), {rank['cores']} cores",
        "versions": ", ".join(f"{name} {version}" for name, version in known.items()),
        "data": environment["data"],
        "settings": ", ".join(environment["settings"]),
        "seconds": f"{environment['seconds']:g}, everything counted",
    }


def accuracy(lines: Sequence[dict[str, Any]]) -> str:
    """The accuracy of the last of these lines."""
    return f"{lines[-1]['test_accuracy']:.4f}" if lines else "-"


def show(value: float) -> str:
    """A number with a few digits, a count with all of its own."""
    return str(value) if isinstance(value, int) else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def seconds_of(text: str) -> float:
    """A number of seconds that ends."""
    seconds = float(text)
    if not 0 <= seconds < float("inf"):
        raise ValueError
    return seconds


def say(text: str) -> None:
    """Print at once: the program may be killed at any moment."""
    print(text, flush=True)


def prepare(options: argparse.Namespace) -> tuple[list[Training], dict[str, Any]]:
    """The trainings, and what `environment.json` says of all of them.

    Raises:
        InputError: DATA, FOLDER or an override is not what it should be.
    """
    folder = options.folder
    if "=" in str(folder):
        raise InputError(f"FOLDER: got {str(folder)!r}, expected a folder before any key=value")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"FOLDER: got {str(folder)!r}, expected a new or an empty folder")
    configs = configurations(options.data, folder, options.overrides)
    for config in configs:
        check(config, ranks=1)
    world = open_world(configs[0])
    environment = {
        "versions": {**versions(), "cudnn": torch.backends.cudnn.version()},
        **world.transport.describe(),
        "ranks": [rank_environment(world.device)],
        "data": read(options.data).said,
        "settings": [*SETTINGS, *options.overrides],
        "seconds": options.seconds,
    }
    trainings = [Training(config) for config in configs]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "environment.json", json.dumps(environment, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"FOLDER: got {str(folder)!r}, which cannot be written ({error.strerror})") from None
    return trainings, environment


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and write.

    Returns:
        The exit status: 1 where an algorithm was given up, 2 for wrong input.
    """
    parser = OneLineParser(
        prog="launch/gpu_paper.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("seconds", metavar="SECONDS", type=seconds_of, help="for everything")
    parser.add_argument("data", metavar="DATA", help="folder that holds cifar-10-batches-py")
    parser.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, default=Path("runs/gpu-paper"))
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="of the configurations")
    parser.add_argument(
        "--started", type=float, default=time.time(), help="UNIX time from which SECONDS count"
    )
    try:
        options = parser.parse_args(arguments)
        deadline = clock() + options.seconds - (time.time() - options.started) - ENDING_SECONDS
        trainings, environment = prepare(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for key, fact in facts(environment).items():
        say(f"{key}: {fact}")

    def finish() -> int:
        text = table(trainings, environment)
        write_whole(options.folder / "table.md", text)
        say(f"\n{text}\nfslsage report {options.folder}/*/ draws it.")
        return 1 if any(training.error for training in trainings) else 0

    def out_of_time() -> None:
        say("Out of time: the round under way is given up.")
        status = 1
        try:
            status = finish()
        except Exception:
            traceback.print_exc()
        os._exit(status)

    take_turns(trainings, deadline, out_of_time)
    return finish()


if __name__ == "__main__":
    sys.exit(main())
