"""What the rounds of an algorithm cost on the machines of a calibration: seconds per sample and request."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fslsage_rpc.bench.table import COMPUTE
from fslsage_rpc.critical_path import LinkSpeed
from fslsage_rpc.plan.scenario import Scenario

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


def measure_costs(lines: Sequence[Line], scenario: Scenario) -> Costs:
    """The costs of an algorithm from rounds that were measured in this scenario."""
    pairs = [(line, scenario.round(line["round"] - 1)) for line in lines]
    client = sum(_client_seconds(line) for line, _ in pairs)
    samples = sum(planned.samples for _, planned in pairs)
    uploaded = sum(_requests(line, "up_bytes") for line, _ in pairs) / scenario.sample_bytes
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
                line["phases"]["client"]["averaging"] - scenario.averaging_seconds(planned.averaged_bytes)
                for line, planned in pairs
            ),
        ),
    )


def _client_seconds(line: Line) -> float:
    """Of compute and what is beside it; a GPU's compute where there is one, not its host's."""
    seconds = {**line["phases"]["client"], **line.get("device_seconds", {}).get("client", {})}
    total: float = sum(seconds[phase] for phase in CLIENT)
    return total


def _requests(line: Line, key: str) -> float:
    """The sum of uploads' and exchanges'."""
    total: float = sum(
        line["requests"][kind][key] for kind in ("push", "exchange") if kind in line["requests"]
    )
    return total


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
