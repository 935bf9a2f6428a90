"""Samples per second on one GPU, against the same arithmetic alone: ResNet-18 on CIFAR-10 shapes.

    python benchmarks/gpu_speed.py FOLDER [--data ROOT] [--tiny]

Starts a server rank and one client rank that share the GPU. For FSL-SAGE and SplitFedV1, in each precision,
real rounds over RPC take turns with rounds of `transport: local` (one process), each with `graphs: never` and
`graphs: auto`, and with the floor: the bare arithmetic of the same round, in one process and on one stream,
without graphs, transport, order, data preparation or averaging. All are wall-clock seconds with the device
idle before and after. The floor computes one thing after the other. The two processes of rounds over RPC
take turns on the GPU and never overlap, unless NVIDIA's MPS runs; the server's lanes and fits, which have
streams of their own, may overlap with each other. Captured steps may be faster than the floor.

Reckoned for one H200, not measured: a full fp32 round is about 1.5 s (0.4 TFLOP a batch, 32 batches, 10 to 15
TFLOP/s, and the fits), one of TF32 or bf16 a third of it; 20 turns of 2 rounds of FSL-SAGE and of 1 round of
SplitFedV1 in each precision come to 90 s + 2 x 30 s, and with building models and capturing to 3 minutes.

Images are synthetic, or CIFAR-10's from a folder that holds them; nothing here looks at what is learnt.
Writes gpu-speed.json and gpu-speed.md into FOLDER. Without a GPU a tiny setting runs on the CPU, which shows
only that the program works; `--tiny` takes it on a GPU too.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from step_floor import Arithmetic

from fslsage_rpc.comm.local import LocalWorld
from fslsage_rpc.comm.world import World, open_world, set_tf32
from fslsage_rpc.config import Config
from fslsage_rpc.configuration import from_tree
from fslsage_rpc.measure.clock import clock, synchronise
from fslsage_rpc.training.experiment import Experiment
from fslsage_rpc.training.run_folder import versions
from fslsage_rpc.training.trainer import Trainer

RANKS = 2
ALGORITHMS = ("fsl_sage", "splitfed_v1")
PRECISIONS = {
    "fp32": {"precision": "fp32", "tf32": False},
    "tf32": {"precision": "fp32", "tf32": True},
    "bf16": {"precision": "bf16"},
}
FULL = {"clients": 4, "batch": 128, "batches": 8, "pairs": 3}
TINY = {"clients": 2, "batch": 4, "batches": 2, "pairs": 1}
WAYS = {"rpc": "never", "rpc graphed": "auto", "local": "never", "local graphed": "auto"}
"""and the key `graphs` of each"""


def configuration(algorithm: str, keys: dict[str, Any], setting: dict[str, int], data: str | None) -> Config:
    """FSL-SAGE aligns every second round, five passes over two batches."""
    samples = setting["clients"] * setting["batches"] * setting["batch"]
    images = {"name": "cifar10", "root": data, "download": False} if data else {"name": "synthetic"}
    return from_tree(
        {
            "ranks": RANKS,
            "clients": {"count": setting["clients"], "batch_size": setting["batch"]},
            "data": {**images, "partition": "iid", "train_limit": samples, "test_limit": 100},
            "model": {"name": "resnet18"},
            "algorithm": {
                "name": algorithm,
                "align_every": 2,
                "alignment": {
                    "epochs": 5,
                    "batch_size": setting["batch"],
                    "buffer_size": 2 * setting["batch"],
                },
                "measure_drift": False,
            },
            **keys,
        }
    )


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds, the device idle before and after."""
    synchronise(device)
    started = clock()
    work()
    synchronise(device)
    return clock() - started


def measure(config: Config, world: World, pairs: int) -> tuple[dict[str, float], dict[str, int]]:
    """Median seconds per round of each way, which take turns, on the client rank; and on every rank how many
    graphs it has captured in the ways that have them.
    """
    set_tf32(config.tf32)  # the world was opened with another configuration's
    trainers: dict[str, Trainer] = {}
    for way, graphs in WAYS.items():
        if graphs == "auto" and world.device.type != "cuda":
            continue
        mine = replace(config, graphs=graphs)  # type: ignore[arg-type]
        if way.startswith("rpc"):
            trainers[way] = Trainer(Experiment.prepare(mine), world)
        elif not world.hosts_server:
            trainers[way] = Trainer(Experiment.prepare(mine), LocalWorld(mine))
    interval = trainers["rpc"].experiment.algorithm.interval
    arithmetic = None if world.hosts_server else Arithmetic(trainers["local"], trainers["local"].world)
    taken: dict[str, list[float]] = {}
    for pair in range(pairs + 1):
        rounds = range(pair * interval, (pair + 1) * interval)
        for way, trainer in trainers.items():
            if not way.startswith("rpc"):
                synchronise(world.device)
            taken.setdefault(way, []).append(sum(trainer.train_round(round) for round in rounds) / interval)
        if arithmetic:
            floor = arithmetic
            seconds = seconds_of(lambda floor=floor, rounds=rounds: floor.run(rounds), world.device)  # type: ignore[misc]
            taken.setdefault("floor", []).append(seconds / interval)
        world.barrier()
    medians = {way: statistics.median(values[1:]) for way, values in taken.items()}  # the first one warms up
    return medians, {way: captured(trainer) for way, trainer in trainers.items() if "graphed" in way}


def captured(trainer: Trainer) -> int:
    """The graphs of the parties that this rank hosts."""
    graphs = [graphed for client in trainer.clients.values() for graphed in (client.passes, client.estimates)]
    if trainer.server:
        lanes = {id(lane): lane for lane in trainer.server.lanes.values()}.values()
        graphs += [steps for lane in lanes for steps in lane.steps.values()]
        graphs += [fit.steps for fit in trainer.server.fits.values()]
    return sum(graphed.shapes for graphed in graphs)


def as_rank(options: argparse.Namespace) -> None:
    """One rank of the job; the server's rank writes."""
    tiny = options.tiny or not torch.cuda.is_available()
    setting = TINY if tiny else FULL
    world: World | None = None
    rows: list[dict[str, Any]] = []
    environment: dict[str, Any] = {}
    for algorithm in ALGORITHMS:
        for precision, keys in PRECISIONS.items():
            if precision == "tf32" and not torch.cuda.is_available():
                continue
            config = configuration(algorithm, keys, setting, options.data)
            world = world or open_world(replace(config, graphs="auto"))  # captures need its stream
            gathered = world.gather(measure(config, world, setting["pairs"]))
            if gathered:
                (_, graphs_of_server), (seconds, graphs_of_clients) = gathered
                samples = setting["clients"] * setting["batches"] * setting["batch"]
                row = {"algorithm": algorithm, "precision": precision, "round_seconds": seconds}
                row["samples_per_second"] = {way: samples / value for way, value in seconds.items()}
                row["graphs_captured"] = {
                    way: graphs_of_server.get(way, 0) + count for way, count in graphs_of_clients.items()
                }
                rows.append(row)
                print(line(row), flush=True)
                environment = world.describe()
    assert world is not None
    if world.hosts_server:
        write(Path(options.folder), world.device, environment, setting, options.data, rows)
    world.close()


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    rates = row["samples_per_second"]
    speeds = " | ".join(f"{rates[way]:,.0f}" if way in rates else "-" for way in (*WAYS, "floor"))
    shares = " | ".join(f"{rates[way] / rates['floor']:.2f}" if way in rates else "-" for way in WAYS)
    graphs = " + ".join(str(count) for count in row["graphs_captured"].values()) or "-"
    return f"| {row['algorithm']} | {row['precision']} | {speeds} | {shares} | {graphs} |"


def write(
    folder: Path,
    device: torch.device,
    environment: dict[str, Any],
    setting: dict[str, int],
    data: str | None,
    rows: list[dict[str, Any]],
) -> None:
    """gpu-speed.json and gpu-speed.md."""
    on_gpu = device.type == "cuda"
    card = torch.cuda.get_device_name(device) if on_gpu else "no GPU: a tiny setting on the CPU"
    result = {
        "device": card,
        "versions": {
            **versions(),
            "cudnn": torch.backends.cudnn.version() if on_gpu else None,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
        },
        "environment": environment,
        "cores": os.cpu_count(),
        "setting": {**setting, "model": "resnet18", "data": "cifar10" if data else "synthetic"},
        "rows": rows,
    }
    names = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)  # type: ignore[attr-defined]
    text = [
        "# Samples per second on one GPU",
        "",
        f"{card}; {os.cpu_count()} cores; {names}.",
        "",
        f"ResNet-18 on CIFAR-10 shapes ({result['setting']['data']}), {setting['clients']} clients, "  # type: ignore[index]
        f"{setting['batches']} batches of {setting['batch']} each in a round; medians of {setting['pairs']} "
        "turns, after one that warms up; samples per second. The floor is the same arithmetic alone, "
        "one thing after the other and without graphs (`benchmarks/gpu_speed.py`). The last column counts "
        "the graphs that were captured, over RPC and locally."
        + ("" if on_gpu else " Graphed: skipped, as there is no GPU; nor is there TF32."),
        "",
        f"Averaging: {environment['averaging']}; requests: {environment['request_tensors']}.",
        "",
        " | ".join(
            ("| algorithm | precision", *WAYS, "floor", *(f"{way} / floor" for way in WAYS), "graphs |")
        ),
        "|" + "---|" * (2 * len(WAYS) + 4),
        *map(line, rows),
        "",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu-speed.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / "gpu-speed.md").write_text("\n".join(text))
    print(f"Written: {folder / 'gpu-speed.md'}", flush=True)


def main() -> None:
    """As one rank of a job; without one, start it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="where gpu-speed.json and gpu-speed.md go")
    parser.add_argument(
        "--data", metavar="ROOT", help="folder with torchvision's CIFAR-10; else synthetic images"
    )
    parser.add_argument("--tiny", action="store_true", help="the small setting, also on a GPU")
    options = parser.parse_args()
    if "RANK" in os.environ:
        as_rank(options)
        return
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    launcher += [f"--nproc_per_node={RANKS}"]
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # both ranks on one
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "CUDA_VISIBLE_DEVICES": gpu}
    command = [sys.executable, *launcher, str(Path(__file__)), *sys.argv[1:]]
    sys.exit(subprocess.run(command, env=environment).returncode)


if __name__ == "__main__":
    main()
