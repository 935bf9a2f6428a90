"""What more virtual clients cost: seconds per client step, and memory per client, on two client ranks.

    python benchmarks/scaling.py

Trains FSL-SAGE and SplitFedV1 on synthetic images with more and more clients of the same size, one job after
the other, and reads from each rank the highest memory that it held. A client step is one batch of one client;
its seconds are those of a median round times the client ranks over all steps of the round. About ten minutes
on 2 cores.

Prints a line for each job, and last what one more client adds to the memory of its rank and of the server, as
the slope between the two largest jobs, beside the bytes that must be kept for it.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fslsage_rpc.comm.world import open_world
from fslsage_rpc.config import Config
from fslsage_rpc.configuration import from_tree
from fslsage_rpc.training.experiment import Experiment
from fslsage_rpc.training.trainer import Trainer

CLIENT_RANKS = 2
BATCH = 32
STEPS = 2
"""of each client in a round"""
ROUNDS = 5
MIB = 2**20


def configuration(algorithm: str, model: str, clients: int) -> Config:
    """The same client, so many times."""
    return from_tree(
        {
            "device": "cpu",
            "clients": {"count": clients, "batch_size": BATCH},
            "data": {"name": "synthetic", "partition": "iid", "train_limit": clients * STEPS * BATCH},
            "model": {"name": model},
            "algorithm": {
                "name": algorithm,
                "align_every": ROUNDS,  # in the first round, which is not timed
                "alignment": {"epochs": 1, "batch_size": BATCH, "buffer_size": BATCH},
                "measure_drift": False,
            },
        }
    )


def run_rank(config: Config) -> None:
    """As one rank of a job; the server's rank prints the result as JSON."""
    world = open_world(config)
    trainer = Trainer(Experiment.prepare(config), world)
    seconds = [trainer.train_round(round) for round in range(ROUNDS)][1:]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peaks = world.gather(peak)
    if peaks:
        steps = config.clients.count * STEPS
        step_seconds = statistics.median(seconds) * CLIENT_RANKS / steps
        print(json.dumps({"step_seconds": step_seconds, "peaks": peaks, "kept": kept(config)}), flush=True)
    world.close()


def kept(config: Config) -> dict[str, float]:
    """Bytes that must be kept for one client, at its rank and at the server: weights (w), Adam's two moments
    (2 w), and its data; alignment buffer and auxiliary state, or a replica.
    """
    experiment = Experiment.prepare(config)
    sizes, shape = experiment.sizes(), experiment.split.smashed_shape
    images = STEPS * BATCH * torch.Size(experiment.task.sample_shape).numel()
    buffer = BATCH * torch.Size(shape).numel() * 4
    if config.algorithm.name == "fsl_sage":
        return {
            "client": 3 * sizes.client + sizes.auxiliary + images,
            "server": 3 * sizes.auxiliary + buffer,
        }
    return {"client": 3 * sizes.client + images, "server": 3 * sizes.server}


def measure(algorithm: str, model: str, clients: int) -> dict[str, Any]:
    """One job of its own processes, so that one's memory is not another's."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={CLIENT_RANKS + 1}"]
    command = [sys.executable, *launcher, str(Path(__file__)), algorithm, model, str(clients)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{algorithm}, {model}, {clients} clients: {1000 * result['step_seconds']:.2f} ms per client step, "
        f"peak {result['peaks'][0] / MIB:.0f} MiB at the server, {max(result['peaks'][1:]) / MIB:.0f} MiB at "
        "a client rank",
        flush=True,
    )
    return result


def report(algorithm: str, model: str, counts: list[int]) -> list[str]:
    """The jobs of one algorithm; what one more client adds."""
    results = [measure(algorithm, model, clients) for clients in counts]
    (few, many), more = results[-2:], counts[-1] - counts[-2]
    at_rank = (max(many["peaks"][1:]) - max(few["peaks"][1:])) / (more / CLIENT_RANKS)
    at_server = (many["peaks"][0] - few["peaks"][0]) / more
    steps = [result["step_seconds"] for result in results]
    return [
        f"{algorithm}, {model}: one more client adds {at_rank / MIB:.2f} MiB to its rank (kept for it: "
        f"{many['kept']['client'] / MIB:.2f}) and {at_server / MIB:.2f} MiB to the server (kept for it: "
        f"{many['kept']['server'] / MIB:.2f})",
        f"{algorithm}, {model}: seconds per client step, {counts[-1]} clients / {counts[0]}: "
        f"{steps[-1] / steps[0]:.2f}",
    ]


def main() -> None:
    """All jobs; or (inside one) a rank of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job", nargs="*", help=argparse.SUPPRESS)
    job = parser.parse_args().job
    if job:
        run_rank(configuration(job[0], job[1], int(job[2])))
        return
    lines = []
    for algorithm in ("fsl_sage", "splitfed_v1"):
        lines += report(algorithm, "simple_conv", [4, 64, 256])
        lines += report(algorithm, "resnet18", [4, 16, 32])
    print("\n".join(lines))


if __name__ == "__main__":
    main()
