"""Samples per second on one GPU, against the same arithmetic alone: ResNet-18 on CIFAR-10 shapes.

    python benchmarks/gpu_speed.py FOLDER [--data ROOT] [--tiny]

Starts a server rank and one client rank that share the GPU. For FSL-SAGE and SplitFedV1, in each precision,
real rounds over RPC take turns with rounds of `transport: local` (one process) and with the floor: the bare
arithmetic of the same round, in one process and on one stream, with no transport, order, data preparation or
averaging. All are wall-clock seconds with the device idle before and after. The floor computes one thing
after the other; rounds over RPC, whose two processes queue work for the GPU at the same time, may be faster.

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
FULL = {"clients": 4, "batch": 128, "batches": 10, "pairs": 4}
TINY = {"clients": 2, "batch": 4, "batches": 2, "pairs": 1}
SECONDS = ("rpc", "local", "floor")


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


def measure(config: Config, world: World, pairs: int) -> dict[str, float]:
    """Median seconds per round of each way, which take turns; on the client rank."""
    set_tf32(config.tf32)  # the world was opened with another configuration's
    over_rpc = Trainer(Experiment.prepare(config), world)
    interval = over_rpc.experiment.algorithm.interval
    here = arithmetic = None
    if not world.hosts_server:
        here = Trainer(Experiment.prepare(config), LocalWorld(config))
        arithmetic = Arithmetic(here, here.world)
    taken: dict[str, list[float]] = {name: [] for name in SECONDS}
    for pair in range(pairs + 1):
        rounds = range(pair * interval, (pair + 1) * interval)
        seconds = {"rpc": sum(over_rpc.train_round(round) for round in rounds)}
        if here and arithmetic:
            in_one_process, floor = here, arithmetic
            seconds["local"] = sum(in_one_process.train_round(round) for round in rounds)
            seconds["floor"] = seconds_of(lambda floor=floor, rounds=rounds: floor.run(rounds), world.device)  # type: ignore[misc]
        world.barrier()
        if pair:  # the first one warms up
            for name, value in seconds.items():
                taken[name].append(value / interval)
    return {name: statistics.median(values) for name, values in taken.items() if values}


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
            world = world or open_world(config)
            mine = measure(config, world, setting["pairs"])
            gathered = world.gather(mine)
            if gathered:
                samples = setting["clients"] * setting["batches"] * setting["batch"]
                row = {"algorithm": algorithm, "precision": precision, "round_seconds": gathered[1]}
                row["samples_per_second"] = {name: samples / gathered[1][name] for name in SECONDS}
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
    shares = " | ".join(f"{rates[way] / rates['floor']:.2f}" for way in ("rpc", "local"))
    speeds = " | ".join(f"{rates[way]:,.0f}" for way in SECONDS)
    return f"| {row['algorithm']} | {row['precision']} | {speeds} | {shares} |"


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
        "turns, after one that warms up. The floor is the same arithmetic alone, one thing after the other "
        "(`benchmarks/gpu_speed.py`). Everything is eager.",
        "",
        f"Averaging: {environment['averaging']}; requests: {environment['request_tensors']}.",
        "",
        "| algorithm | precision | rpc, samples/s | local | floor | rpc / floor | local / floor |",
        "|---|---|---|---|---|---|---|",
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
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}"]
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # both ranks on one
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "CUDA_VISIBLE_DEVICES": gpu}
    command = [sys.executable, *launcher, str(Path(__file__)), *sys.argv[1:]]
    sys.exit(subprocess.run(command, env=environment).returncode)


if __name__ == "__main__":
    main()
