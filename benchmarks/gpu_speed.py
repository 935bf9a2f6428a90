"""Samples per second of ResNet-18 on CIFAR-10 shapes, for `launch/gpu_check.sh`.

    python benchmarks/gpu_speed.py local|rpc ALGORITHM fp32|tf32|bf16 BATCH

- local: rounds in one process, eager and with CUDA graphs, and their floor, the bare arithmetic
- rpc: rounds of a server rank and a client rank that share the GPU, and the client rank's own in one process

The floor has one stream, and no graphs, transport, order, data preparation or averaging.
Two processes that share a GPU take turns on it and never overlap, unless NVIDIA's MPS runs.

The ways take turns. All seconds are wall-clock, with the device idle before and after. Figures are medians
over the turns after the first, which warms up and captures. They are noted as they come, until the time of
the measurement is up; with `turns: 0` they are those of the first turn.

Images are synthetic, as nothing here looks at what is learnt.
Without a GPU a tiny setting runs on the CPU, and is named so.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpu_basics import statuses_of
from step_floor import Arithmetic

from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.config.schema import Config
from fslsage_rpc.device.clock import clock, synchronise
from fslsage_rpc.job.local_world import LocalWorld
from fslsage_rpc.job.opening import open_world
from fslsage_rpc.job.world import World
from fslsage_rpc.training.experiment import Experiment
from fslsage_rpc.training.trainer import Trainer
from fslsage_rpc.transport.endpoint import ServerEndpoint
from launch.gpu_check import note, seconds_left

PRECISIONS = {
    "fp32": {"precision": "fp32", "tf32": False},
    "tf32": {"precision": "fp32", "tf32": True},
    "bf16": {"precision": "bf16"},
}
TURNS = 5
"""at most, the first included"""
Ways = dict[str, Callable[[range], float]]
"""by name, what trains some rounds and returns their seconds"""


def configuration(options: argparse.Namespace, **changes: Any) -> Config:
    """Rounds of a few batches of each client: FSL-SAGE aligns every second one, five passes over a batch."""
    on_gpu = torch.cuda.is_available()
    batch, clients = (options.batch, 2 if options.way == "rpc" else 1) if on_gpu else (4, 1)
    batches = max(5, 500 // batch) if on_gpu else 2
    tree = {
        "ranks": 2,
        "transport": options.way,
        "clients": {"count": clients, "batch_size": batch},
        "data": {
            "name": "synthetic",
            "partition": "iid",
            "train_limit": clients * batches * batch,
            "test_limit": 10,
        },
        "model": {"name": "resnet18"},
        "algorithm": {
            "name": options.algorithm,
            "align_every": 2,
            "start": "paper",  # rounds 1, 3, ... align
            "alignment": {"epochs": 5, "batch_size": batch, "buffer_size": batch},
            "measure_drift": False,
        },
        **PRECISIONS[options.precision],
    }
    return from_tree(tree, [f"{key}={value}" for key, value in changes.items()])


def ways(options: argparse.Namespace, world: World) -> tuple[Ways, list[Trainer]]:
    """The ways that this rank has a part in, in the same order on both, and their trainers."""
    found: Ways = {}
    trainers = []
    kinds = {"": {"graphs": "never"}, " graphs": {"graphs": "auto"}}
    if options.way == "local":
        kinds[" graphs, channels_last"] = {"graphs": "auto", "model.memory_format": "channels_last"}
    if world.device.type != "cuda":
        kinds = {"": kinds[""]}

    def add(name: str, trainer: Trainer) -> None:
        def seconds(rounds: Sequence[int]) -> float:
            server = trainer.server and ServerEndpoint(trainer.server, trainer.world.device)
            trainer.world.transport.serve(server)  # a world serves one at a time
            return sum(trainer.train_round(t) for t in rounds)

        found[name] = seconds
        trainers.append(trainer)

    if options.way == "rpc":
        for kind, keys in kinds.items():
            add(f"rpc{kind}", Trainer(Experiment.prepare(configuration(options, **keys)), world))
    if options.way == "local" or not world.hosts_server:
        for kind, keys in kinds.items():
            config = configuration(options, **keys, transport="local")
            trainer = Trainer(Experiment.prepare(config), LocalWorld(config))
            add(kind.strip() or "eager", trainer)
            if options.way == "local" and not kind:
                found["floor"] = floor(trainer)
    return found, trainers


def floor(trainer: Trainer) -> Callable[[range], float]:
    """The arithmetic of a trainer's rounds alone, as its seconds."""
    arithmetic = Arithmetic(trainer.experiment.config, len(trainer.clients), trainer.world.device)

    def seconds(rounds: range) -> float:
        started = clock()
        arithmetic.run(rounds)
        synchronise(trainer.world.device)
        return clock() - started

    return seconds


def graphs_of(trainer: Trainer) -> int:
    """How many were captured by the parties that this rank hosts."""
    if trainer.experiment.config.graphs == "never":
        return 0
    graphs = [client.passes for client in trainer.clients.values()]
    if trainer.experiment.algorithm.auxiliary != "none":
        graphs += [client.auxiliary.estimates for client in trainer.clients.values()]
    if trainer.server:
        lanes = {id(lane): lane for lane in trainer.server.lanes.values()}.values()
        graphs += [steps for lane in lanes for steps in lane.steps.values()]
        graphs += [fit.steps for fit in trainer.server.fits.values()]
    return sum(graphed.shapes for graphed in graphs)


def measure(options: argparse.Namespace) -> None:
    """Take turns until the time is up; as the only process, or as one rank of two."""
    config = configuration(options, graphs="auto")  # captures need its stream
    world = open_world(config)
    mine, trainers = ways(options, world)
    interval = trainers[0].experiment.algorithm.interval
    samples = config.data.train_limit
    assert samples is not None
    label = " ".join(map(str, (options.algorithm, options.precision, options.batch)))
    if world.device.type == "cpu":
        label = f"{options.algorithm} {options.precision}, tiny, on a CPU"
    taken: dict[str, list[float]] = {}

    def tell(turn: int) -> None:
        medians = {way: statistics.median(seconds[1:] or seconds) for way, seconds in taken.items()}
        gathered = world.transport.gather((medians, sum(map(graphs_of, trainers))))
        if gathered:
            rates = {way: round(samples / seconds, 1) for way, seconds in gathered[-1][0].items()}
            graphs = sum(count for _, count in gathered)
            note(speed={"setting": label, "rates": rates, "captured": graphs, "turns": turn})

    for turn in range(TURNS):
        began = clock()
        rounds = range(turn * interval, (turn + 1) * interval)
        for way, train in mine.items():
            synchronise(world.device)
            taken.setdefault(way, []).append(train(rounds) / interval)
            if options.way == "local":
                tell(turn)  # at once: the next may end the process
        world.transport.barrier()
        tell(turn)
        # The first turn warms up: the next is worth a try, whatever it took, as figures are noted at once.
        if not world.transport.broadcast(turn == 0 or seconds_left() > 1 + 1.2 * (clock() - began)):
            break
    world.close()


def start_ranks() -> None:
    """Both ranks, without a launcher; leaves with the first status that says that one failed."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    job = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environments = [{**os.environ, **job, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    ranks = [subprocess.Popen([sys.executable, *sys.argv], env=environment) for environment in environments]
    sys.exit(max(map(abs, statuses_of(ranks))))


def main() -> None:
    """As one rank of two, as the only process, or to start ranks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("way", choices=("local", "rpc"))
    parser.add_argument("algorithm")
    parser.add_argument("precision", choices=PRECISIONS)
    parser.add_argument("batch", type=int)
    options = parser.parse_args()
    if options.way == "rpc" and "RANK" not in os.environ:
        start_ranks()
    measure(options)


if __name__ == "__main__":
    main()
