"""What the instruments cost: rounds with the timelines and the request log, and without, side by side; and
the rehearsal of a round, beside the round.

    python benchmarks/instrument_cost.py

One process trains digits twice with `transport: local`, where nothing else takes time, round by round in
turn: once as it is, once with instruments that do nothing. Prints the median of the paired ratios (on / off)
of each algorithm, and the rehearsal's share of a round with 256 clients. About three minutes on one core.
"""

import contextlib
import statistics
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.device.clock import clock
from fslsage_rpc.job.opening import open_world
from fslsage_rpc.measure.request_times import RequestLog
from fslsage_rpc.measure.timeline import Timeline
from fslsage_rpc.training.experiment import Experiment
from fslsage_rpc.training.trainer import Trainer

PAIRS = 40
MANY_CLIENTS = 256
ROUNDS = 6
"""with many clients, of which the first warms up"""


@contextlib.contextmanager
def nothing(*arguments: Any, **keys: Any) -> Iterator[None]:
    """A phase that is not measured."""
    yield


def ignore(*arguments: Any, **keys: Any) -> None:
    """A figure that is not kept."""


@contextlib.contextmanager
def instruments_off() -> Iterator[None]:
    """Phases and requests are not measured inside, but for the readings of the clock that requests carry."""
    with (
        mock.patch.object(Timeline, "phase", nothing),
        mock.patch.object(Timeline, "add", ignore),
        mock.patch.object(RequestLog, "add", ignore),
    ):
        yield


def cost(algorithm: str) -> tuple[float, float]:
    """The median of on / off, and the seconds of a round."""
    tree = {
        "transport": "local",
        "device": "cpu",
        "rounds": PAIRS + 1,
        "clients": {"count": 4, "batch_size": 64},
        "data": {"partition": "iid"},
        "algorithm": {"name": algorithm, "align_every": None, "measure_drift": False},
    }
    config = from_tree(tree)
    on = Trainer(Experiment.prepare(config), open_world(config))
    with instruments_off():
        off = Trainer(Experiment.prepare(config), open_world(config))
    seconds: dict[Trainer, list[float]] = {on: [], off: []}
    for round in range(config.rounds):
        for trainer in (on, off) if round % 2 == 0 else (off, on):  # a drift of the machine weighs on both
            with contextlib.nullcontext() if trainer is on else instruments_off():
                started = clock()
                trainer.train_round(round)
                seconds[trainer].append(clock() - started)
    pairs = list(zip(seconds[on], seconds[off], strict=True))[1:]
    return statistics.median(a / b for a, b in pairs), statistics.median(seconds[on])


def rehearsal_share(algorithm: str) -> tuple[float, float]:
    """The median share of a round's seconds that its rehearsal takes, and the seconds of a round."""
    tree = {
        "transport": "local",
        "device": "cpu",
        "rounds": ROUNDS,
        "clients": {"count": MANY_CLIENTS, "batch_size": 1},
        "data": {"partition": "iid"},
        "algorithm": {"name": algorithm, "alignment": {"epochs": 1}},
    }
    config = from_tree(tree)
    experiment = Experiment.prepare(config)
    trainer = Trainer(experiment, open_world(config))
    shares, rounds = [], []
    for round in range(config.rounds):
        started = clock()
        experiment.rehearsal.clients(round)
        rehearsed = clock() - started
        rounds.append(trainer.train_round(round))
        shares.append(rehearsed / rounds[-1])
    return statistics.median(shares[1:]), statistics.median(rounds[1:])


def main() -> None:
    """Two lines per algorithm."""
    torch.set_num_threads(1)
    for algorithm in ("fsl_sage", "splitfed_v1", "fedavg"):
        ratio, seconds = cost(algorithm)
        print(f"{algorithm}: on / off {ratio:.4f}, {1000 * seconds:.0f} ms a round, {PAIRS} pairs")
        share, seconds = rehearsal_share(algorithm)
        print(f"{algorithm}: rehearsal {share:.2%} of {1000 * seconds:.0f} ms, {MANY_CLIENTS} clients")


if __name__ == "__main__":
    main()
