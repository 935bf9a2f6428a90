"""What the rounds of an algorithm cost on the machines of a calibration: seconds per sample and request."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fslsage_rpc.bench.statistics import BenchRun
from fslsage_rpc.bench.table import COMPUTE
from fslsage_rpc.bench.variants import variant_configs
from fslsage_rpc.config import Config
from fslsage_rpc.configuration import load
from fslsage_rpc.critical_path import LinkSpeed
from fslsage_rpc.errors import InputError
from fslsage_rpc.plan.scenario import LABEL_BYTES, Scenario

CLIENT = (*COMPUTE, "other")
"""the phases in which a client rank computes"""
Line = Mapping[str, Any]


@dataclass(frozen=True)
class Costs:
    """Of one algorithm, in seconds."""

    client_per_sample: float
    """of a client, for one sample of a local step"""
    server_per_sample: float
    """of the server, for one sample that it trains on"""
    alignment_per_sample: float
    """of the server, for one sample of an alignment buffer"""
    sending: float
    """of a client rank, to hand one request to the transport"""
    handling: float
    """of a request, beside sending, the link, the queue and the compute: copying, waking threads"""
    averaging: float
    """of an averaging, beside the links"""


@dataclass(frozen=True)
class Calibration:
    """What was measured: the costs by algorithm, and the links and server that they were measured with."""

    config: Config
    costs: Mapping[str, Costs]
    link: LinkSpeed
    server_workers: int
    """lanes that the server executes at the same time, and fits likewise"""


def read_calibration(folder: Path) -> Calibration:
    """What the folder of a benchmark says; of several variants of one algorithm, the first one.

    Raises:
        InputError: it is not the folder of a complete benchmark over a real transport.
    """
    try:
        return _read(folder)
    except InputError:
        raise
    except (OSError, ValueError, LookupError, TypeError):
        raise InputError(f"--calibrate: got {folder}, expected the folder of a complete benchmark") from None


def _read(folder: Path) -> Calibration:
    environment = json.loads((folder / "bench.json").read_text(encoding="utf-8"))["environment"]
    speeds = [LinkSpeed(**speed) for each in environment["link_speeds"] for speed in each.values()]
    if not speeds:
        raise InputError(f"--calibrate: got {folder}, expected a benchmark with transport: rpc")
    link = LinkSpeed(*(statistics.fmean(getattr(s, name) for s in speeds) for name in vars(speeds[0])))
    config = load(folder / "config.yaml")
    costs: dict[str, Costs] = {}
    for name, variant in variant_configs(config).items():
        if variant.algorithm.name not in costs:
            scenario = Scenario(variant, link, client_ranks=len(environment["ranks"]) - 1)
            lines = _measured_lines(folder, name, config, scenario)
            costs[variant.algorithm.name] = measure_costs(lines, scenario)
    server = environment["ranks"][0]
    return Calibration(config, costs, link, max(1, server["cores"] // server["threads"]))


def measure_costs(lines: Sequence[Line], scenario: Scenario) -> Costs:
    """The costs of an algorithm from rounds that were measured in this scenario."""
    pairs = [(line, scenario.round(line["round"])) for line in lines]
    client = sum(sum(line["phases"]["client"][phase] for phase in CLIENT) for line, _ in pairs)
    samples = sum(planned.samples for _, planned in pairs)
    uploaded = sum(_requests(line, "up_bytes") for line, _ in pairs) / (scenario.sizes.smashed + LABEL_BYTES)
    buffered = sum(sum(planned.aligned.values()) for _, planned in pairs)
    requests = [times for line in lines for times in line["requests"].values()]
    sending = _per(
        sum(times["send_seconds"] for times in requests), sum(times["count"] for times in requests)
    )
    return Costs(
        client_per_sample=client * scenario.client_ranks / samples,
        server_per_sample=_per(sum(_requests(line, "compute_seconds") for line, _ in pairs), uploaded),
        alignment_per_sample=_per(
            sum(line["requests"].get("align", {}).get("compute_seconds", 0.0) for line, _ in pairs), buffered
        ),
        sending=sending,
        handling=max(0.0, _beside_the_link(lines, scenario.link) - sending),
        averaging=max(
            0.0,
            statistics.fmean(
                line["phases"]["client"]["averaging"] - scenario.ring_seconds(planned.averaged_bytes)
                for line, planned in pairs
            ),
        ),
    )


def _measured_lines(folder: Path, name: str, config: Config, scenario: Scenario) -> list[Line]:
    """The rounds of a variant's samples, of all repeats."""
    lines: list[Line] = []
    for repeat in range(config.bench.repeats):
        text = (folder / "rounds" / f"{name}-{repeat}.jsonl").read_text(encoding="utf-8")
        interval = scenario.algorithm.interval
        run = BenchRun(name, repeat, interval, [json.loads(line) for line in text.splitlines()])
        lines += [run.lines[round] for rounds in run.samples(config.bench.warmup_rounds) for round in rounds]
    return lines


def _requests(line: Line, key: str) -> float:
    """The sum of uploads' and exchanges'."""
    return sum(line["requests"][kind][key] for kind in ("push", "exchange") if kind in line["requests"])


def _beside_the_link(lines: Sequence[Line], link: LinkSpeed) -> float:
    """The mean over requests of the wire's seconds, less what the link accounts for."""
    seconds, count = 0.0, 0
    for times in (times for line in lines for times in line["requests"].values()):
        up, down = (
            times["up_bytes"] / link.up_bytes_per_second,
            times["down_bytes"] / link.down_bytes_per_second,
        )
        seconds += times["wire_seconds"] - up - down - times["count"] * link.round_trip_seconds
        count += times["count"]
    return _per(seconds, count)


def _per(total: float, count: float) -> float:
    return total / count if count else 0.0
