"""From rounds that were measured, in a benchmark or here in one process, to what their work costs.

It costs CPU seconds, which do not count the time in which a thread waits for a core. So the ranks may have
shared their cores, among them or with others.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fslsage_rpc.algorithms import find
from fslsage_rpc.algorithms.bound import NO_LINK, LinkSpeed
from fslsage_rpc.bench.statistics import BenchRun, Line
from fslsage_rpc.config.loading import changed_keys, from_tree, load, to_tree
from fslsage_rpc.config.own import is_own
from fslsage_rpc.config.schema import Config
from fslsage_rpc.config.variants import bench_variants
from fslsage_rpc.device.cores import server_workers
from fslsage_rpc.device.placement import choose_device
from fslsage_rpc.errors import InputError
from fslsage_rpc.job.opening import open_world
from fslsage_rpc.measure.phases import COMPUTE, Phase
from fslsage_rpc.parties.requests import KINDS, Align, BeginAlignment, Collect, Exchange, Push
from fslsage_rpc.plan.prediction import averaging_seconds, planned_bound
from fslsage_rpc.plan.scenario import DEPENDS_ON_VALUES, Costs, Scenario, with_algorithm
from fslsage_rpc.runs.round_numbers import FIRST_ROUND
from fslsage_rpc.tasks import open_task
from fslsage_rpc.training.experiment import Experiment, check
from fslsage_rpc.training.trainer import Trainer

LARGEST = 1e18
"""number that is believed"""
WORK = ["data.name", "data.arguments", "algorithm.arguments", "model", "clients.batch_size"]
WORK += ["precision", "tf32", "graphs", "device", "comm.codec"]
WORK_OF_ALIGNMENT = ["alignment.solver", "alignment.epochs", "alignment.batch_size", "alignment.tolerance"]
WORK_OF_ALIGNMENT += ["measure_drift"]
"""keys, these of the algorithm, that change what a step or an alignment costs, with all below them"""
BATCHES, ROUNDS = 6, 4
"""of each client in rounds that are measured here, and the least of these; the first warms up"""
SENDING, HANDLING = 5e-4, 2.1e-3
"""seconds of a request for less than 100 KiB, over TensorPipe's uv, where docs/results/plan.md was measured:
one process has no transport to measure
"""


class Calibration(NamedTuple):
    """The costs of algorithms, or why they are unknown; and the link and server that they are of."""

    costs: Mapping[str, Costs | str]
    link: LinkSpeed
    server_workers: int
    """lanes that the server executes at the same time, and fits likewise"""
    shared_cores: float = math.inf
    """of the one machine that all ranks were on, over the threads of an operation; infinite for several"""
    busy: bool = False
    """others had the host's cores meanwhile"""


def read_calibration(folder: Path, planned: Config) -> Calibration:
    """The costs in the folder of a benchmark; of each algorithm's variants, those of the first one that did
    the same work as is planned.

    Raises:
        InputError: it is not the folder of a complete benchmark over a real transport, or of other work.
    """
    try:
        return _read(folder, planned)
    except InputError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        raise InputError(
            f"--calibrate: got {folder}, expected the folder of a complete benchmark with transport: rpc, "
            "whose rounds have CPU seconds"
        ) from None


def _read(folder: Path, planned: Config) -> Calibration:
    result = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    ranks, speeds = result["environment"]["ranks"], result["environment"]["link_speeds"]
    links = [LinkSpeed(**speed) for each in speeds for speed in each.values()]
    link = LinkSpeed(*(statistics.fmean(getattr(each, name) for each in links) for name in vars(NO_LINK)))
    cores, threads = ranks[0]["cores"], [rank["threads"] for rank in ranks]
    usable = ranks[0].get("usable_cores", cores)  # which older versions did not write
    config = load(folder / "config.yaml")
    too_many = config.clients.count > open_task(config).train_samples
    if too_many or not all(
        0 < figure <= LARGEST for figure in (*vars(link).values(), cores, usable, *threads)
    ):
        raise ValueError("there would be clients without samples, or ranks that cannot be")
    shared = cores / threads[0] if len({rank["host"] for rank in ranks}) == 1 else math.inf
    workers = max(1, usable // threads[0])

    def costs_of(name: str, variant: Config) -> Costs:
        check_work(folder, variant, with_algorithm(planned, variant.algorithm.name))
        scenario, lines = Scenario(variant, link, len(ranks) - 1, shared), list[Line]()
        for repeat in range(config.bench.repeats):
            text = (folder / "rounds" / f"{name}-{repeat}.jsonl").read_text(encoding="utf-8")
            run = BenchRun(name, repeat, scenario.algorithm.interval)
            run.lines += map(json.loads, text.splitlines())
            if [line["round"] for line in run.lines] != list(range(1, variant.rounds + 1)):
                raise ValueError("rounds are missing")
            lines += [run.lines[i] for sample in run.samples(config.bench.warmup_rounds) for i in sample]
        found = measure_costs(lines, scenario, threads)
        return found._replace(efficiency=efficiency(lines, scenario, found, workers))

    costs = _costs_of(bench_variants(config), costs_of, planned)
    if (name := planned.algorithm.name) not in costs:
        unknown = find(name).requests_depend_on_values
        costs[name] = DEPENDS_ON_VALUES if unknown else f"{folder} has no variant of it"
    busy = any(variant.get("busy_samples") for variant in result["variants"].values())
    return Calibration(costs, link, workers, shared, busy)


def check_work(folder: Path, measured: Config, planned: Config) -> None:
    """Raise where seconds per sample or pass of one mean nothing for the other, of the same algorithm."""
    for key, (was, is_now) in unlike_work(measured, planned).items():
        got = f"--calibrate: got {folder}, which measured {key}={was}"
        raise InputError(f"{got}, expected {is_now} as planned")


def unlike_work(measured: Config, planned: Config) -> dict[str, tuple[Any, Any]]:
    """The keys by which a sample or pass of one does other work than one of the other, with both values."""
    aligned = find(measured.algorithm.name).auxiliary == "aligned"
    keys = WORK + [f"algorithm.{key}" for key in WORK_OF_ALIGNMENT if aligned]
    return {
        key: (was, is_now)
        for key, (was, is_now) in changed_keys(to_tree(measured), to_tree(planned)).items()
        if any(f"{key}.".startswith(f"{section}.") for section in keys)
        and not (key == "device" and "auto" in (was, is_now))
    }


def calibrate_here(config: Config, names: Iterable[str]) -> Calibration:
    """The costs of these algorithms on this machine: rounds of two clients, in one process.

    Raises:
        InputError: the configured one cannot run here.
    """
    variants = {name: with_algorithm(config, name) for name in names}
    costs = _costs_of(variants, lambda _, variant: _costs_here(variant), config)
    return Calibration(costs, NO_LINK, server_workers(choose_device(config.device, 0)))


def _costs_here(config: Config) -> Costs:
    """The costs of a training of two clients in this process; its first round warms up."""
    samples = min(2 * BATCHES * config.clients.batch_size, open_task(config).train_samples)
    keys = [
        *("transport=local", "trace=false", "evaluation.every=1000", "data.test_limit=1"),
        *("stop.paper_gib=null", "stop.accuracy=null", "stop.diverged=false"),
        *("clients.count=2", "clients.minimum=1", "clients.participation=1.0", "clients.on_loss=fail"),
        *("data.partition=iid", f"data.train_limit={samples}"),
    ]
    if not is_own(config.algorithm.name):  # as often as can be, by a client's request that holds all the work
        every = ["algorithm.align_every=1"] if config.algorithm.align_every else []
        keys += [*every, "algorithm.alignment.lag=0"]
    config = from_tree(to_tree(config), keys)
    check(config, ranks=1)
    scenario, lines = Scenario(config, NO_LINK, 1), list[Line]()
    scenario.round(0)  # raises where nobody can know what it sends
    config = replace(config, rounds=max(ROUNDS, 1 + scenario.algorithm.interval))
    Trainer(Experiment.prepare(config), open_world(config)).train(lambda line, _: lines.append(line))
    costs = measure_costs(lines[1:], scenario, [torch.get_num_threads()])
    return costs._replace(sending=SENDING, handling=HANDLING)


def _costs_of(
    variants: Mapping[str, Config], costs_of: Callable[[str, Config], Costs], planned: Config
) -> dict[str, Costs | str]:
    """The costs of each algorithm by its first variant that tells them, or why none does.

    Raises:
        InputError: the planned algorithm has none, though its requests do not depend on values.
    """
    costs: dict[str, Costs | str] = {}
    for name, variant in variants.items():
        algorithm = variant.algorithm.name
        try:
            if find(algorithm).requests_depend_on_values:
                raise InputError(DEPENDS_ON_VALUES)
            if not isinstance(costs.get(algorithm), Costs):
                costs[algorithm] = costs_of(name, variant)
        except InputError as error:
            costs.setdefault(algorithm, str(error))
    why = costs.get(planned.algorithm.name)
    if isinstance(why, str) and why != DEPENDS_ON_VALUES:
        raise InputError(why)
    return costs


def measure_costs(lines: Sequence[Line], scenario: Scenario, threads: Sequence[int]) -> Costs:
    """The costs of an algorithm in measured rounds, as if all work grew with its samples.

    Args:
        threads: of an operation, on each rank; a rank alone is server and client rank.

    Raises:
        ValueError: these are no measurements.
    """
    ranks, planned = scenario.client_ranks, [scenario.round(line["round"] - FIRST_ROUND) for line in lines]
    batches = [scenario.federation.batch_sizes[client] for each in planned for client in each.clients]
    buffers = [samples for each in planned for samples in each.aligned.values()]
    on_gpu: list[Line] = [line.get("device_seconds", {}) for line in lines]
    work = "compute_seconds" if on_gpu[0].get("server") else "cpu_seconds"
    uploads = (Push.kind, Exchange.kind)

    def asked(key: str, *kinds: str) -> float:
        each = (line["requests"].get(kind, {}) for line in lines for kind in kinds or KINDS)
        return float(sum(times.get(key, 0) for times in each))

    def aligning(key: str, servers: Iterable[Mapping[str, float]]) -> float:
        """Seconds of alignments: by the server's phases where fits behind the training are in no request."""
        if not asked("count", BeginAlignment.kind):
            return asked(key, Align.kind)
        lanes = len(scenario.federation.samples) if scenario.algorithm.server_replicas else 1
        each = (
            lanes * server.get(Phase.TARGETS, 0.0) + server.get(Phase.ALIGNMENT, 0.0) for server in servers
        )
        return asked(key, Collect.kind) + sum(each)

    cpu = [line["cpu_seconds"] for line in lines]
    main = [each["client"] for each in cpu]  # of the client ranks' main threads, their mean
    computing = ranks * sum(each.get(phase, 0.0) for each in main for phase in COMPUTE)
    sending = ranks * sum(sum(each.values()) - each["averaging"] for each in main) - computing
    # What is left are the transport's threads, without the further ones of operations.
    handling = sum(sum(each["ranks"]) for each in cpu) - threads[-1] * computing - sending
    server = asked("cpu_seconds", *uploads) + aligning("cpu_seconds", (each["server"] for each in cpu))
    handling -= threads[0] * server
    averaging = [
        line["phases"]["client"]["averaging"] - averaging_seconds(scenario, each.averaged_bytes)
        for line, each in zip(lines, planned, strict=True)
    ]
    compute = [{**each, **gpu.get("client", {})} for each, gpu in zip(main, on_gpu, strict=True)]
    seconds = ranks * sum(each.get(phase, 0.0) for each in compute for phase in COMPUTE)
    requests = asked("count") or 1
    asks = [ask for each in planned for client in each.clients.values() for ask in client.asks]
    uploaded = sum(ask.samples for ask in asks if ask.kind in uploads)
    servers = (gpu.get("server") or each["server"] for each, gpu in zip(cpu, on_gpu, strict=True))
    aligned = aligning(work, servers)
    costs = Costs(
        _each(seconds, sum(map(sum, batches))),
        _each(asked(work, *uploads), uploaded),
        _each(aligned, sum(map(sum, buffers))),
        sending / requests,
        max(handling / requests, 0.0),
        max(statistics.fmean(averaging), 0.0),
        {kind for line in lines for kind in line["requests"]},
    )
    if not all(0 <= figure <= LARGEST for figure in costs[:6]):
        raise ValueError(f"{costs} cannot be")
    return costs


def _each(seconds: float, samples: float) -> float:
    return seconds / samples if samples else 0.0


def efficiency(lines: Sequence[Line], scenario: Scenario, costs: Costs, server_workers: int) -> float:
    """Lower bound of measured rounds by their own costs, over their seconds: a median over their intervals.

    Raises:
        ValueError: these are no measurements.
    """
    interval = scenario.algorithm.interval
    samples = [lines[first : first + interval] for first in range(0, len(lines), interval)]
    bounds = {
        first: planned_bound(
            scenario,
            costs,
            server_workers,
            [scenario.round(first + i - FIRST_ROUND) for i in range(interval)],
        )
        for first in {sample[0]["round"] for sample in samples}
    }
    found: float = statistics.median(
        bounds[sample[0]["round"]] / statistics.fmean(line["round_seconds"] for line in sample)
        for sample in samples
    )
    if not 1 / LARGEST <= found <= LARGEST:
        raise ValueError(f"an efficiency of {found} cannot be")
    return found
