"""What more virtual clients cost: seconds per client step, and memory per client, on two client ranks.

    python benchmarks/scaling.py [fsl_sage | splitfed_v1] [simple_conv | resnet18] [--repeats N]

Trains on synthetic images with more and more clients of the same size, one job after the other, and reads
from each rank the highest memory that it held in its rounds. A client step is one batch of one client; its
seconds are the client ranks' share of a round, over its steps. All rounds have the same number of steps, the
fewer clients the more passes over the same two batches, so that what a round costs by itself (its barriers,
the server's last step) counts for the same in all jobs. The round before it, which warms up and aligns, is
not timed. Without arguments all four combinations, one after the other, each 7 to 14 minutes a repeat on 2
cores.

The jobs of all sizes are repeated in turn. Prints a line for each, and last, for each combination, medians
over the repeats: of the seconds per client step over those of the fewest clients, and of what one more client
adds to the memory of its rank and of the server: the slope between two large jobs (`MEMORY`), whose ranks all
have as many steps open as may be, beside the bytes that must be kept for a client, and what the objects that
hold them take, where torch alone makes them. For FSL-SAGE also whether that is what is asked for: flat within
10 %, and no more memory than these two and `PAGES`.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.config.schema import Config
from fslsage_rpc.device.memory import give_back_free_pages, keep_large_blocks, status_bytes
from fslsage_rpc.job.opening import open_world
from fslsage_rpc.models.flat import module_bytes
from fslsage_rpc.parties.turns import MOST_OPEN_STEPS
from fslsage_rpc.training.experiment import Experiment
from fslsage_rpc.training.trainer import Trainer

CLIENT_RANKS = 2
BATCH = {"simple_conv": 8, "resnet18": 32}
BATCHES = 2
STEPS = {"simple_conv": 1024, "resnet18": 512}
"""of all clients in a round"""
COUNTS = {
    ("fsl_sage", "simple_conv"): [4, 16, 64, 256],
    ("fsl_sage", "resnet18"): [4, 16, 64, 256],
    ("splitfed_v1", "simple_conv"): [4, 16, 64, 256],
    ("splitfed_v1", "resnet18"): [4, 16, 32, 64],
}
"""of clients, timed"""
MEMORY = {
    ("fsl_sage", "simple_conv"): (64, 1024),
    ("fsl_sage", "resnet18"): (64, 256),
    ("splitfed_v1", "simple_conv"): (64, 1024),
    ("splitfed_v1", "resnet18"): (32, 64),
}
"""of clients, between which memory is compared: from 2 x 16 on as many steps are open as may be
(`parties/turns.py`); clients of small models need a long lever, as jobs differ by some tens of MiB anyway
"""
FLAT = 0.10
KIB, MIB = 2**10, 2**20
PAGES = 128 * KIB
"""that the blocks of one client end in, and what jobs of one size differ by, over the clients between them"""
WEIGHED = 512 * MIB
"""of models and optimizers, to weigh the objects of one: they come in pages, which many share"""


def local_epochs(model: str, clients: int) -> int:
    """Passes of a client over its batches, for a round of so many steps."""
    return max(1, STEPS[model] // (clients * BATCHES))


def configuration(algorithm: str, model: str, clients: int) -> Config:
    """The same client, so many times."""
    batch = BATCH[model]
    return from_tree(
        {
            "device": "cpu",
            "rounds": 2,
            "clients": {"count": clients, "batch_size": batch, "local_epochs": local_epochs(model, clients)},
            "data": {"name": "synthetic", "partition": "iid", "train_limit": clients * BATCHES * batch},
            "model": {"name": model},
            "algorithm": {
                "name": algorithm,
                "upload_every": BATCHES,
                "align_every": 2,
                "start": "paper",  # it aligns in the first round, which is not timed
                "alignment": {"epochs": 1, "batch_size": batch, "buffer_size": batch},
                "measure_drift": False,
            },
        }
    )


def run_rank(config: Config) -> None:
    """As one rank of a job; the server's rank prints the result as JSON."""
    world = open_world(config)
    trainer = Trainer(Experiment.prepare(config), world)
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    trainer.train_round(0)
    seconds = trainer.train_round(1)
    peaks = world.transport.gather(status_bytes("VmHWM"))
    if peaks:
        steps = config.clients.count * BATCHES * config.clients.local_epochs
        step_seconds = seconds * CLIENT_RANKS / steps
        print(json.dumps({"step_seconds": step_seconds, "peaks": peaks, "kept": kept(config)}), flush=True)
    world.close()


def kept(config: Config) -> dict[str, float]:
    """Bytes that must be kept for one client, at its rank and at the server: weights, Adam's two moments, and
    its data (images of one byte a number, and labels); alignment buffer and auxiliary state, or a replica.
    """
    experiment = Experiment.prepare(config)
    split, sample = experiment.split, torch.Size(experiment.split.smashed_shape).numel()
    image, label = torch.Size(experiment.task.sample_shape).numel(), 8
    batch = config.clients.batch_size
    data = BATCHES * batch * (image + label)
    auxiliary = module_bytes(split.auxiliary)
    if config.algorithm.name == "fsl_sage":
        buffer = batch * (4 * sample + label)
        return {
            "client": trained(split.client) + auxiliary + data,
            "server": trained(split.auxiliary) + buffer,
        }
    return {"client": trained(split.client) + data, "server": trained(split.server)}


def trained(model: nn.Module) -> int:
    """Bytes of a model and of Adam's moments."""
    return module_bytes(model) + 2 * sum(p.numel() * p.element_size() for p in model.parameters())


def objects(config: Config) -> dict[str, float]:
    """Bytes of Python's and torch's own objects that hold what must be kept for one client (modules,
    parameters, Adam's states), by party, where nothing but torch makes them. To be called in a new process.
    """
    split = Experiment.prepare(config).split
    if config.algorithm.name == "fsl_sage":
        return {"client": weigh(split.client, beside=split.auxiliary), "server": weigh(split.auxiliary)}
    return {"client": weigh(split.client), "server": weigh(split.server)}


def weigh(model: nn.Module, beside: nn.Module | None = None) -> float:
    """What a copy of a model with its optimizer, and of one without beside it, take beyond their numbers."""
    numbers = trained(model) + (module_bytes(beside) if beside else 0)
    copies = WEIGHED // numbers

    def more() -> list[Any]:
        return [(with_adam(copy.deepcopy(model)), copy.deepcopy(beside)) for _ in range(copies)]

    keep_large_blocks()  # all in one heap, none on pages of its own
    held, before = more(), resident_bytes()  # the first take what was free
    held += more()
    return (resident_bytes() - before) / copies - numbers


def with_adam(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer after one step, without gradients."""
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, optimizer


def resident_bytes() -> int:
    """The memory of this process that is in use."""
    give_back_free_pages()
    resident = status_bytes("VmRSS")
    assert resident is not None, "needs Linux"
    return resident


def measure(algorithm: str, model: str, clients: int) -> dict[str, Any]:
    """One job of its own processes, so that one's memory is not another's."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    launcher += [f"--nproc_per_node={CLIENT_RANKS + 1}"]
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


def report(algorithm: str, model: str, times: int) -> list[str]:
    """The jobs of one algorithm; what one more client costs."""
    counts, (few, many) = COUNTS[algorithm, model], MEMORY[algorithm, model]
    assert few >= CLIENT_RANKS * MOST_OPEN_STEPS
    repeats = [
        {clients: measure(algorithm, model, clients) for clients in sorted({*counts, few, many})}
        for _ in range(times)
    ]
    lever = {"client": (many - few) / CLIENT_RANKS, "server": many - few}
    more = {
        "client": median(max(jobs[many]["peaks"][1:]) - max(jobs[few]["peaks"][1:]) for jobs in repeats),
        "server": median(jobs[many]["peaks"][0] - jobs[few]["peaks"][0] for jobs in repeats),
    }
    adds = {party: more[party] / lever[party] for party in more}
    ratios = [
        median(jobs[count]["step_seconds"] / jobs[counts[0]]["step_seconds"] for jobs in repeats)
        for count in counts[1:]
    ]
    judged = algorithm == "fsl_sage"
    flat = verdict(max(abs(ratio - 1) for ratio in ratios) <= FLAT) if judged else ""
    beside = ", ".join(f"{count}: {ratio:.3f}" for count, ratio in zip(counts[1:], ratios, strict=True))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as new_process:
        objects_of = new_process.submit(objects, configuration(algorithm, model, few)).result()
    lines = [
        f"{algorithm}, {model}: seconds per client step over those of {counts[0]} clients, {beside}{flat}"
    ]
    for party, where in (("client", "its rank"), ("server", "the server")):
        needed, holders = repeats[-1][many]["kept"][party], objects_of[party]
        enough = verdict(adds[party] <= needed + holders + PAGES) if judged else ""
        lines.append(
            f"{algorithm}, {model}: one more client adds {adds[party] / MIB:.2f} MiB to {where}; "
            f"{needed / MIB:.2f} MiB must be kept for it, in objects that take {holders / MIB:.2f}{enough}"
        )
    return lines


def verdict(met: bool) -> str:
    """Is that what is asked for?"""
    return " (met)" if met else " (NOT met)"


def main() -> None:
    """The combinations asked for; or (inside one) a rank of a job."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("algorithm", nargs="?", choices=sorted({each for each, _ in COUNTS}))
    parser.add_argument("model", nargs="?", choices=sorted({each for _, each in COUNTS}))
    parser.add_argument("clients", nargs="?", type=int, help=argparse.SUPPRESS)  # of a job
    parser.add_argument("--repeats", type=int, default=3, help="of all jobs (3)")
    options = parser.parse_args()
    if options.clients:
        run_rank(configuration(options.algorithm, options.model, options.clients))
        return
    lines = []
    for algorithm, model in COUNTS:
        if options.algorithm in (None, algorithm) and options.model in (None, model):
            lines += report(algorithm, model, options.repeats)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
