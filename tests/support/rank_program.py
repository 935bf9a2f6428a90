"""Trains several configurations one after the other and saves what each party ends with.

In a test's own process with `transport: local`, or on the ranks of a job. A job can make whole runs instead,
each in its run folder.
"""

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.job.opening import open_world
from fslsage_rpc.measure.timeline import Timeline
from fslsage_rpc.models.flat import Weights
from fslsage_rpc.runs.checkpoint_files import RankState
from fslsage_rpc.runs.run_folder import RunFolder
from fslsage_rpc.runs.screen import Screen
from fslsage_rpc.training.experiment import Experiment
from fslsage_rpc.training.run import _train as train_run
from fslsage_rpc.training.trainer import Trainer
from support.forked_ranks import run_ranks
from support.random_delays import delayed_phase

Tensors = dict[str, torch.Tensor]


@dataclass
class Outcome:
    """One training's result: every party's tensors by name, and the lines of the metrics."""

    tensors: Tensors = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)


def train(
    experiment: Experiment, world: Any, saved: RankState | None = None, lines: Sequence[dict[str, Any]] = ()
) -> Outcome:
    """Train, from what was saved on, and take hold of what this rank hosts."""
    trainer = Trainer(experiment, world, saved, lines)
    outcome = Outcome(lines=list(lines))
    trainer.train(lambda line, reports: outcome.lines.append(line))

    def keep(name: str, weights: Weights) -> None:
        outcome.tensors[f"{name}/floats"] = weights.floats.cpu().clone()
        outcome.tensors[f"{name}/integers"] = weights.integers.cpu().clone()

    for client in trainer.clients.values():
        keep(f"client {client.id}", client.weights)
        if experiment.algorithm.auxiliary != "none":
            keep(f"client {client.id} auxiliary", client.auxiliary_weights)
    if trainer.server:
        for client, lane in trainer.server.lanes.items():
            keep(f"server of {client}", lane.weights)
        for client, fit in trainer.server.fits.items():
            keep(f"server's auxiliary of {client}", fit.weights)
        for name, tensor in trainer.final_model().items():
            outcome.tensors[f"final {name}"] = tensor
    return outcome


def train_locally(tree: dict[str, Any]) -> Outcome:
    """Train in this process."""
    config = from_tree({**tree, "transport": "local"})
    return train(Experiment.prepare(config), open_world(config))


def train_on_ranks(
    ranks: int,
    trees: list[dict[str, Any]],
    folder: Path,
    timeout: float = 200,
    program: Callable[[str, str], None] | None = None,
) -> list[Outcome]:
    """Train on a job of so many ranks; the parties' tensors of all ranks together.

    Args:
        program: of each rank, if not `train_and_save`; it ends in that.
    """
    folder.mkdir()
    (folder / "configs.json").write_text(json.dumps(trees))
    run_ranks(ranks, program or train_and_save, [str(folder / "configs.json"), str(folder)], folder, timeout)
    outcomes = []
    for number in range(len(trees)):
        outcome = Outcome()
        for rank in range(ranks):
            saved = torch.load(folder / f"{number}-{rank}.pt", weights_only=True)
            outcome.tensors |= saved["tensors"]
            outcome.lines += saved["lines"]
        outcomes.append(outcome)
    return outcomes


def run_on_ranks(ranks: int, trees: list[dict[str, Any]], folder: Path, timeout: float = 200) -> str:
    """Make whole runs on a job of so many ranks; what it says."""
    configs = folder / f"on-{ranks}-ranks.json"
    configs.write_text(json.dumps(trees))
    return run_ranks(ranks, make_runs, [str(configs)], folder, timeout)


def run_job(arguments: list[str], timeout: float) -> str:
    """Run a standalone torchrun job to its end, or kill all of it; its output, as text."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command += arguments
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, output
    return output


def train_and_save(configs: str, folder: str) -> None:
    """One rank of a job: a step that cannot be captured is an error; RANDOM_DELAYS is the seed of delays."""
    warnings.filterwarnings("error", "graphs")
    if "RANDOM_DELAYS" in os.environ:
        seed = int(os.environ["RANDOM_DELAYS"]) + int(os.environ["RANK"])
        Timeline.phase = delayed_phase(seed)  # type: ignore[method-assign]  # for as long as this rank lives
    experiments = [Experiment.prepare(from_tree(tree)) for tree in json.loads(Path(configs).read_text())]
    world = open_world(experiments[0].config)
    for number, experiment in enumerate(experiments):
        try:
            outcome = train(experiment, world)
        except BaseException as error:
            world.fail(error)
        torch.save(vars(outcome), Path(folder) / f"{number}-{world.rank}.pt")
    world.close()


def make_runs(path: str) -> None:
    """One rank of a job of whole runs."""
    configs = [from_tree(tree) for tree in json.loads(Path(path).read_text())]
    world = open_world(configs[0])
    for config in configs:
        try:
            screen = Screen(config)
            folder = RunFolder(config, screen.warn) if world.hosts_server else None
            with folder or nullcontext():
                train_run(Experiment.prepare(config), world, folder, {}, screen)
        except BaseException as error:
            world.fail(error)
    world.close()
