"""From the folder of a benchmark to the costs that predictions are made of."""

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fslsage_rpc.algorithms import find
from fslsage_rpc.algorithms.bound import LinkSpeed
from fslsage_rpc.bench.statistics import BenchRun
from fslsage_rpc.bench.variants import variant_configs
from fslsage_rpc.config.loading import changed_keys, load, to_tree
from fslsage_rpc.config.schema import Config
from fslsage_rpc.errors import InputError
from fslsage_rpc.plan.costs import Costs, Line, measure_costs
from fslsage_rpc.plan.scenario import Scenario, with_algorithm
from fslsage_rpc.tasks import open_task

LARGEST = 1e18
"""seconds or bytes"""
DEPENDS_ON_VALUES = "its requests depend on values"
WORK = (
    *("data.name", "data.arguments", "algorithm.arguments"),
    *("model", "precision", "tf32", "graphs", "device"),
)
WORK_OF_ALIGNMENT = (
    *(f"algorithm.alignment.{key}" for key in ("solver", "epochs", "batch_size", "tolerance")),
    "algorithm.measure_drift",
)
"""keys that change what a step or an alignment costs, with all below them"""


@dataclass(frozen=True)
class Calibration:
    """What was measured: the costs by algorithm, and the links and server that they were measured with."""

    config: Config
    costs: Mapping[str, Costs]
    """by what `algorithm.name` says: also of the user's own"""
    link: LinkSpeed
    server_workers: int
    """lanes that the server executes at the same time, and fits likewise"""
    shared_cores: float
    """of the one machine that all ranks were on, over the threads of an operation; infinite for several"""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """algorithms without costs, and why"""
    busy: bool = False
    """others had the host's cores meanwhile"""


def read_calibration(folder: Path, planned: Config | None = None) -> Calibration:
    """What the folder of a benchmark says; of each algorithm's variants, the first one (that did the
    same work as is planned).

    Raises:
        InputError: it is not the folder of a complete benchmark over a real transport, or of other work.
    """
    try:
        return _read(folder, planned)
    except InputError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        raise InputError(f"--calibrate: got {folder}, expected the folder of a complete benchmark") from None


def _read(folder: Path, planned: Config | None) -> Calibration:
    result = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    environment = result["environment"]
    _check_figures([environment["link_speeds"], environment["ranks"]])
    speeds = [LinkSpeed(**speed) for each in environment["link_speeds"] for speed in each.values()]
    if not speeds:
        raise InputError(f"--calibrate: got {folder}, expected a benchmark with transport: rpc")
    link = LinkSpeed(*(statistics.fmean(getattr(s, name) for s in speeds) for name in vars(speeds[0])))
    config = load(folder / "config.yaml")
    if config.clients.count > open_task(config).train_samples:
        raise ValueError("there would be clients without samples")
    ranks = environment["ranks"]
    workers = max(1, ranks[0]["cores"] // ranks[0]["threads"])
    one_machine = len({rank["host"] for rank in ranks}) == 1
    cores = ranks[0]["cores"] / ranks[0]["threads"] if one_machine else math.inf
    costs: dict[str, Costs] = {}
    left_out: dict[str, str] = {}
    for name, variant in variant_configs(config).items():
        algorithm = variant.algorithm.name
        if algorithm in costs:
            continue
        if why := _without_costs(folder, variant, planned):
            left_out.setdefault(algorithm, why)
            continue
        try:
            scenario = Scenario(variant, link, len(ranks) - 1)
        except InputError as error:  # the user's own has changed since
            left_out.setdefault(algorithm, str(error))
            continue
        lines = _measured_lines(folder, name, config, scenario)
        measured = measure_costs(lines, scenario, [rank["threads"] for rank in ranks])
        _check_figures(list(vars(measured).values()))
        costs[algorithm] = measured
    left_out = {algorithm: why for algorithm, why in left_out.items() if algorithm not in costs}
    if planned and (configured := planned.algorithm.name) not in costs:
        if find(configured).requests_depend_on_values:
            left_out[configured] = DEPENDS_ON_VALUES
        elif configured in left_out:
            raise InputError(f"--calibrate: {left_out[configured]}")
        else:
            left_out[configured] = f"{folder} has no variant of it"
    if not costs:
        algorithm, why = next(iter(left_out.items()))
        raise InputError(f"--calibrate: got {folder}, which does not tell what {algorithm} costs, as {why}")
    busy = any(variant.get("busy_samples") for variant in result["variants"].values())
    return Calibration(config, costs, link, workers, cores, left_out, busy)


def _without_costs(folder: Path, measured: Config, planned: Config | None) -> str | None:
    """Why a variant does not tell what its algorithm costs; None where it does."""
    name = measured.algorithm.name
    try:
        kind = find(name)
    except InputError as error:  # one of the user's own, which is not here
        return str(error)
    if kind.requests_depend_on_values:
        return DEPENDS_ON_VALUES
    other = planned and _other_work(measured, with_algorithm(planned, name))
    return f"{folder} measured {other}" if other else None


def _other_work(measured: Config, planned: Config) -> str | None:
    """What makes seconds per sample or pass of one mean nothing for the other; None where nothing does.

    Args:
        planned: of the same algorithm.
    """
    keys = WORK + (WORK_OF_ALIGNMENT if find(measured.algorithm.name).auxiliary == "aligned" else ())
    for key, (was, is_now) in changed_keys(to_tree(measured), to_tree(planned)).items():
        if key == "device" and "auto" in (was, is_now):
            continue  # whatever the calibration ran on
        if any(f"{key}.".startswith(f"{section}.") for section in keys):
            return f"{key}={was}, expected {is_now} as planned"
    return None


def _check_figures(tree: Any, least: float = 0.0) -> None:
    """See that seconds, bytes and counts are such, wherever they are in what was read.

    Raises:
        ValueError: a number is none, below the least, or beyond all that can be measured.
    """
    if isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            _check_figures(value, least)
    elif isinstance(tree, int | float) and not least <= tree <= LARGEST:
        raise ValueError(f"{tree} is no measurement")


def _measured_lines(folder: Path, name: str, config: Config, scenario: Scenario) -> list[Line]:
    """The rounds of a variant's samples, of all repeats."""
    lines: list[Line] = []
    for repeat in range(config.bench.repeats):
        text = (folder / "rounds" / f"{name}-{repeat}.jsonl").read_text(encoding="utf-8")
        measured = [json.loads(line) for line in text.splitlines()]
        if not all("cpu_seconds" in line for line in measured):
            raise InputError(
                f"--calibrate: got {folder}, of an earlier version, expected a benchmark with CPU seconds"
            )
        for line in measured:  # differences of clocks may be below 0
            _check_figures([line["phases"], line["requests"], line["cpu_seconds"]], least=-LARGEST)
        if [line["round"] for line in measured] != list(range(1, scenario.config.rounds + 1)):
            raise ValueError("rounds are missing")
        run = BenchRun(name, repeat, scenario.algorithm.interval, measured)
        lines += [run.lines[round] for rounds in run.samples(config.bench.warmup_rounds) for round in rounds]
    return lines
