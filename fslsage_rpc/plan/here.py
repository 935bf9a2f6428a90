"""Costs measured on this machine, in one process: of every algorithm, and of batches of another size."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from fslsage_rpc.algorithms import ALGORITHMS
from fslsage_rpc.comm.world import choose_device, open_world, server_workers
from fslsage_rpc.config import Config
from fslsage_rpc.configuration import from_tree, to_tree
from fslsage_rpc.critical_path import NO_LINK
from fslsage_rpc.errors import InputError
from fslsage_rpc.plan.calibration import Calibration
from fslsage_rpc.plan.costs import Costs, Line, measure_costs
from fslsage_rpc.plan.scenario import Scenario
from fslsage_rpc.tasks import open_task
from fslsage_rpc.training.experiment import Experiment, check
from fslsage_rpc.training.trainer import Trainer

CALIBRATION_BATCHES = 6
"""of each client, in the rounds that calibrate this machine"""
CALIBRATION_ROUNDS = 3
"""the first of them warms up"""
LONG_STEP_SECONDS = 0.05
"""from which on next to nothing of a step is independent of its batch's size"""
TYPICAL_REQUEST = {"sending": 5e-4, "client_handling": 1e-3, "server_handling": 1.1e-3}
"""seconds of a request for less than 100 KiB, over TensorPipe's uv, where docs/results/plan.md was measured:
one process has no transport to measure
"""


def at_batch_size(measured: Calibration, config: Config) -> Calibration:
    """The costs per sample in the planned batches, where those of the calibration had another size.

    A part of a step does not grow with its batch. How much that is, is measured here, in one process; steps
    that are long have next to none of it.
    """
    was, planned = measured.config.clients.batch_size, config.clients.batch_size
    steps = (max(each.client_per_sample, each.server_per_sample) for each in measured.costs.values())
    if was == planned or min(was, planned) * max(steps) > LONG_STEP_SECONDS:
        return measured
    keys = ["algorithm.align_every=null"]
    there, here = (
        calibrate_here(from_tree(to_tree(config), [*keys, f"clients.batch_size={size}"])).costs
        for size in (was, planned)
    )
    costs = {
        name: replace(
            each,
            client_per_sample=each.client_per_sample * _ratio(here, there, name, "client_per_sample"),
            server_per_sample=each.server_per_sample * _ratio(here, there, name, "server_per_sample"),
        )
        for name, each in measured.costs.items()
    }
    return replace(measured, costs=costs)


def _ratio(costs: Mapping[str, Costs], to: Mapping[str, Costs], name: str, key: str) -> float:
    """How much larger a cost of one algorithm is; 1 where there is none to compare."""
    if name not in costs or name not in to or not getattr(to[name], key):
        return 1.0
    return float(getattr(costs[name], key) / getattr(to[name], key))


def calibrate_here(config: Config) -> Calibration:
    """The costs of every algorithm on this machine: rounds of two clients, in one process."""
    samples = min(2 * CALIBRATION_BATCHES * config.clients.batch_size, open_task(config).train_samples)
    keys = [
        *(
            "transport=local",
            f"rounds={CALIBRATION_ROUNDS}",
            "trace=false",
            "evaluation.every=1000",
            "data.test_limit=1",
        ),
        *("stop.paper_gib=null", "stop.accuracy=null", "stop.diverged=false"),
        *("clients.count=2", "clients.minimum=1", "clients.participation=1.0", "clients.on_loss=fail"),
        "data.partition=iid",
        f"data.train_limit={samples}",
        *([] if config.algorithm.align_every is None else ["algorithm.align_every=1"]),
    ]
    costs: dict[str, Costs] = {}
    left_out: dict[str, str] = {}
    for name in ALGORITHMS:
        variant = from_tree(to_tree(config), [*keys, f"algorithm.name={name}"])
        try:
            check(variant, ranks=1)
            lines = _train_here(variant)
        except InputError as error:
            if name == config.algorithm.name:
                raise
            left_out[name] = str(error)
            continue
        scenario = Scenario(variant, NO_LINK, client_ranks=1)
        here = measure_costs(lines[1:], scenario, threads=[torch.get_num_threads()])
        costs[name] = replace(here, **TYPICAL_REQUEST)  # here a call of the server holds its work
    if not costs:
        raise InputError(next(iter(left_out.values())))
    workers = server_workers(choose_device(config.device, 0))
    return Calibration(config, costs, NO_LINK, workers, math.inf, left_out)


def _train_here(config: Config) -> list[Line]:
    """The metrics lines of a run in this process, of which nothing else is kept."""
    lines: list[Line] = []
    trainer = Trainer(Experiment.prepare(config), open_world(config))
    trainer.train(lambda line, _: lines.append(line))
    return lines
