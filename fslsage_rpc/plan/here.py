"""Costs measured on this machine, in one process: of algorithms, and of other batches and buffers."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from fslsage_rpc.algorithms import find
from fslsage_rpc.algorithms.bound import NO_LINK
from fslsage_rpc.algorithms.fsl_sage import FslSage
from fslsage_rpc.config.loading import from_tree, to_tree
from fslsage_rpc.config.schema import Config
from fslsage_rpc.device.clock import clock, cpu_clock, synchronise
from fslsage_rpc.device.cores import server_workers
from fslsage_rpc.device.placement import choose_device
from fslsage_rpc.errors import InputError
from fslsage_rpc.job.opening import open_world
from fslsage_rpc.parties.auxiliary_fit import AlignmentBuffer
from fslsage_rpc.plan.calibration import DEPENDS_ON_VALUES, Calibration
from fslsage_rpc.plan.costs import Costs, Line, measure_costs
from fslsage_rpc.plan.scenario import Scenario, with_algorithm
from fslsage_rpc.tasks import open_task
from fslsage_rpc.training.experiment import Experiment, check
from fslsage_rpc.training.trainer import Trainer

CALIBRATION_BATCHES = 6
"""of each client, in the rounds that calibrate this machine"""
CALIBRATION_ROUNDS = 3
"""the least; the first of them warms up"""
CALIBRATION_PASSES = 10
SMALLER = 8
"""times as small as those of the calibration is the other buffer that alignments are measured with"""
LONG_STEP_SECONDS = 0.05
"""from which on next to nothing of a step is independent of its batch's size"""
TYPICAL_REQUEST: dict[str, Any] = {"sending": 5e-4, "client_handling": 1e-3, "server_handling": 1.1e-3}
"""seconds of a request for less than 100 KiB, over TensorPipe's uv, where docs/results/plan.md was measured:
one process has no transport to measure
"""


def adapted(measured: Calibration, config: Config) -> Calibration:
    """A benchmark's costs in batches and alignment buffers of the planned sizes.

    A part of a step does not grow with its batch, nor one of a pass with its buffer. How large these are is
    measured here, in one process; steps and passes that are long have next to none of it.
    """
    return fits_apart(_at_batch_size(measured, config), config)


def _at_batch_size(measured: Calibration, config: Config) -> Calibration:
    was, planned = measured.config.clients.batch_size, config.clients.batch_size
    steps = (max(each.client_per_sample, each.server_per_sample) for each in measured.costs.values())
    if was == planned or min(was, planned) * max(steps) > LONG_STEP_SECONDS:
        return measured
    short = "algorithm.alignment.epochs=1"  # of alignments nothing is taken
    there, here = (
        calibrate_here(
            from_tree(to_tree(config), [short, f"clients.batch_size={size}"]), measured.costs
        ).costs
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


def fits_apart(measured: Calibration, config: Config) -> Calibration:
    """The costs with the part of an alignment that does not grow with its buffer by itself."""
    return replace(
        measured, costs={name: _fit_apart(costs, config) for name, costs in measured.costs.items()}
    )


def _fit_apart(costs: Costs, config: Config) -> Costs:
    """Those of one algorithm."""
    whole = costs.alignment(round(costs.buffered))
    if not costs.buffered or whole > LONG_STEP_SECONDS * config.algorithm.alignment.epochs:
        return costs
    large = round(costs.buffered)
    small = max(1, large // SMALLER)
    of_small, of_large = _fit_seconds(config, (small, large))
    per_sample = min(1.0, max(0.0, (of_large - of_small) / of_large * large / max(1, large - small)))
    return replace(
        costs,
        alignment_per_sample=per_sample * whole / costs.buffered,
        alignment_per_fit=(1 - per_sample) * whole,
    )


def _fit_seconds(config: Config, buffered: Sequence[int]) -> list[float]:
    """Seconds of an alignment here with so many samples in its buffer: the same of every algorithm."""
    keys = [*_keys(config), f"algorithm.alignment.epochs={CALIBRATION_PASSES}"]
    trainer, _ = _train_here(with_algorithm(config, FslSage.name, keys))
    server, device = trainer.server, trainer.world.device
    assert server is not None
    fit, model = server.fits[0], server.lanes[0].model
    reads = cpu_clock if device.type == "cpu" else clock
    ((z, y),) = fit.buffer.batches(len(fit.buffer))
    found = []
    for samples in buffered:
        fit.buffer = AlignmentBuffer(samples)
        while len(fit.buffer) < samples:
            fit.buffer.add(z, y)
        for _ in range(2):  # the first warms up
            synchronise(device)
            began = reads()
            fit.fit(fit.targets(model))
            synchronise(device)
            seconds = reads() - began
        found.append(seconds)
    return found


def calibrate_here(config: Config, names: Iterable[str]) -> Calibration:
    """The costs of these algorithms on this machine: rounds of two clients, in one process.

    Raises:
        InputError: the configured one cannot run here, or none can.
    """
    costs: dict[str, Costs] = {}
    left_out: dict[str, str] = {}
    for name in names:
        if find(name).requests_depend_on_values:
            left_out[name] = DEPENDS_ON_VALUES
            continue
        variant = with_algorithm(config, name, _keys(config))
        try:
            check(variant, ranks=1)
            scenario = Scenario(variant, NO_LINK, client_ranks=1)
            rounds = max(CALIBRATION_ROUNDS, 1 + scenario.algorithm.interval)
            _, lines = _train_here(from_tree(to_tree(variant), [f"rounds={rounds}"]))
        except InputError as error:
            if name == config.algorithm.name:
                raise
            left_out[name] = str(error)
            continue
        here = measure_costs(lines[1:], scenario, threads=[torch.get_num_threads()])
        costs[name] = replace(here, **TYPICAL_REQUEST)  # here a call of the server holds its work
    if not costs:
        raise InputError(next(iter(left_out.values())))
    workers = server_workers(choose_device(config.device, 0))
    return Calibration(config, costs, NO_LINK, workers, math.inf, left_out)


def _keys(config: Config) -> list[str]:
    """By which a training is short enough to calibrate with, and all in one process."""
    samples = min(2 * CALIBRATION_BATCHES * config.clients.batch_size, open_task(config).train_samples)
    return [
        *("transport=local", f"rounds={CALIBRATION_ROUNDS}", "trace=false"),
        *("evaluation.every=1000", "data.test_limit=1"),
        *("stop.paper_gib=null", "stop.accuracy=null", "stop.diverged=false"),
        *("clients.count=2", "clients.minimum=1", "clients.participation=1.0", "clients.on_loss=fail"),
        *("data.partition=iid", f"data.train_limit={samples}"),
        *([] if config.algorithm.align_every is None else ["algorithm.align_every=1"]),
    ]


def _train_here(config: Config) -> tuple[Trainer, list[Line]]:
    """A run in this process, and its metrics lines; nothing is written."""
    lines: list[Line] = []
    trainer = Trainer(Experiment.prepare(config), open_world(config))
    trainer.train(lambda line, _: lines.append(line))
    return trainer, lines
