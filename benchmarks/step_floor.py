"""How far a round is from its bare arithmetic: ResNet-18 on CIFAR-10 shapes, 4 clients, batches of 128.

    python benchmarks/step_floor.py [key=value ...]

Starts a server rank and two client ranks. In turn they run real rounds, over RPC, and each client rank alone
runs the arithmetic of its clients' rounds: the same clients, lanes and fits, in the same processes and with
the same threads, but no transport, no order, no data preparation and no averaging. The floor is the CPU
seconds of that arithmetic over the cores: what a round would take if nothing else cost anything and no core
ever waited. One sample of FSL-SAGE is an alignment interval of two rounds. Four to ten minutes on 2 cores.

Prints the medians, and last, one a line, the medians of the paired ratios floor / round.
"""

import os
import statistics
import time

import torch
from rank_job import overrides_on_ranks

from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.config.schema import Config
from fslsage_rpc.job.opening import open_world
from fslsage_rpc.job.world import World
from fslsage_rpc.parties.client import Client
from fslsage_rpc.parties.requests import Align, Ask, Push
from fslsage_rpc.parties.server import Server
from fslsage_rpc.training.assembly import build_server
from fslsage_rpc.training.experiment import Experiment
from fslsage_rpc.training.trainer import Trainer

RANKS = 3
PAIRS = 6
BATCHES = 5
"""of each client in a round"""


def configuration(algorithm: str, overrides: list[str]) -> Config:
    """Synthetic images are as good as any: nothing here looks at what is learnt."""
    batch = 128
    tree = {
        "ranks": RANKS,
        "device": "cpu",
        "rounds": 2 * (PAIRS + 1),
        "clients": {"count": 4, "batch_size": batch},
        "data": {"name": "synthetic", "partition": "iid", "train_limit": 4 * BATCHES * batch},
        "model": {"name": "resnet18"},
        "algorithm": {
            "name": algorithm,
            "align_every": 2,
            "alignment": {"epochs": 5, "batch_size": batch, "buffer_size": 2 * batch},
            "measure_drift": False,
        },
    }
    return from_tree(tree, overrides)


class Arithmetic:
    """What the clients of this rank, and the server for them, compute in a round, and nothing else."""

    def __init__(self, trainer: Trainer, world: World):
        self._rehearsal = trainer.experiment.rehearsal
        self._clients = trainer.clients
        self._server: Server | None = (
            build_server(trainer.experiment, world, None, None) if self._clients else None
        )
        self._batches = {id: list(client.batches(0)) for id, client in self._clients.items()}

    def cpu_seconds(self, rounds: range) -> float:
        """CPU seconds of this process for the arithmetic of these rounds."""
        started = time.process_time()
        self.run(rounds)
        return time.process_time() - started

    def run(self, rounds: range) -> None:
        """The arithmetic of these rounds; on a GPU it is queued on return."""
        for round in rounds:
            for client in self._clients.values():
                self._client_round(client, round)

    def _client_round(self, client: Client, t: int) -> None:
        assert self._server is not None
        lane, fit = self._server.lanes[client.id], self._server.fits.get(client.id)
        steps = self._rehearsal.clients(t)[client.id].steps
        for (x, y), events in zip(self._batches[client.id], steps, strict=True):
            asked = {event.kind for event in events if isinstance(event, Ask)}
            z = client.forward(x)
            if fit is None:
                gradient = lane.train(z, y, gradient=True)
            else:
                if Push.kind in asked:
                    lane.train(z, y, gradient=False)
                    fit.buffer.add(z.detach(), y)
                if Align.kind in asked:
                    client.auxiliary_weights.load(fit.fit(fit.targets(lane.model)))
                gradient = client.estimate(z, y)
            assert gradient is not None
            client.backward(z, gradient)


def compare(config: Config, world: World) -> tuple[list[float], list[float]]:
    """Floors and seconds of real rounds, pair by pair, per round; on the server's rank."""
    trainer = Trainer(Experiment.prepare(config), world)
    arithmetic = Arithmetic(trainer, world)
    interval = trainer.experiment.algorithm.interval
    floors, seconds = [], []
    for pair in range(PAIRS + 1):
        rounds = range(pair * interval, (pair + 1) * interval)
        measured = sum(trainer.train_round(round) for round in rounds)
        world.transport.barrier()
        spent = world.transport.gather(arithmetic.cpu_seconds(rounds))
        if spent and pair:  # the first one warms up
            floors.append(sum(spent) / (os.cpu_count() or 1) / interval)
            seconds.append(measured / interval)
    return floors, seconds


def main() -> None:
    """As one rank of a job; without one, start it."""
    overrides = overrides_on_ranks(__file__, __doc__, RANKS)
    world: World | None = None
    ratios = {}
    for algorithm in ("fsl_sage", "splitfed_v1"):
        config = configuration(algorithm, overrides)
        world = world or open_world(config)
        floors, seconds = compare(config, world)
        if world.hosts_server:
            print(
                f"{algorithm}: floor {statistics.median(floors):.3f} s, round "
                f"{statistics.median(seconds):.3f} s, {PAIRS} pairs, {os.cpu_count()} cores, "
                f"{torch.get_num_threads()} thread per rank",
                flush=True,
            )
            ratios[algorithm] = statistics.median(f / s for f, s in zip(floors, seconds, strict=True))
    assert world is not None
    for algorithm, ratio in ratios.items():
        print(f"{algorithm} floor / round {ratio:.3f}", flush=True)
    world.close()


if __name__ == "__main__":
    main()
