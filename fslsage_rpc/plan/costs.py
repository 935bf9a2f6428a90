"""What the rounds of an algorithm cost on a core of its own: CPU seconds per sample and request.

CPU seconds do not count the time in which a thread waits for a core. So the ranks may have shared their
cores, among them or with others, while they were measured.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fslsage_rpc.measure.phases import COMPUTE
from fslsage_rpc.parties.requests import Align, Exchange, Push
from fslsage_rpc.plan.scenario import PlannedRound, Scenario
from fslsage_rpc.runs.round_numbers import FIRST_ROUND

Line = Mapping[str, Any]
"""one line of metrics"""


@dataclass(frozen=True)
class Costs:
    """Of one algorithm, in seconds on a core; those of work on a GPU are its own."""

    client_per_sample: float
    """of a client, for one sample of a local step"""
    server_per_sample: float
    """of the server, for one sample that it trains on"""
    alignment_per_sample: float
    """of the server, for one sample of an alignment buffer"""
    sending: float
    """of a client's thread, to hand one request over and to take its answer"""
    client_handling: float
    """of the transport's threads on a client rank, for one request and its answer"""
    server_handling: float
    """likewise on the server's rank"""
    averaging: float
    """of an averaging, beside the links"""
    alignment_per_fit: float = 0.0
    """of the server, for an alignment whatever its buffer holds"""
    buffered: float = 0.0
    """no cost: the samples of the buffers that were measured, their mean"""
    kinds: frozenset[str] = frozenset({Push.kind, Exchange.kind, Align.kind})
    """no cost: the kinds of requests that were measured"""

    def alignment(self, samples: int) -> float:
        """Seconds of one alignment with so many samples in its buffer."""
        return self.alignment_per_fit + self.alignment_per_sample * samples


def measure_costs(lines: Sequence[Line], scenario: Scenario, threads: Sequence[int]) -> Costs:
    """The costs of an algorithm from rounds that were measured in this scenario.

    Args:
        threads: of an operation, by rank; one rank is server and client rank at once.
    """
    pairs = [(line, scenario.round(line["round"] - FIRST_ROUND)) for line in lines]
    buffers = [samples for _, planned in pairs for each in planned.aligned.values() for samples in each]
    requests = sum(times["count"] for line in lines for times in line["requests"].values())
    main, ranks = _main_threads(lines), scenario.client_ranks
    # A rank's other threads: those of the transport, and the further ones of its operations.
    of_clients = [
        sum(line["cpu_seconds"]["ranks"][1:]) - ranks * (threads[-1] * main[i][0] + main[i][1])
        for i, line in enumerate(lines)
    ]
    of_server = [
        line["cpu_seconds"]["ranks"][0]
        - threads[0] * sum(times["cpu_seconds"] for times in line["requests"].values())
        for line in lines
    ]
    return Costs(
        client_per_sample=_per(
            ranks * sum(_client_seconds(line) for line in lines), sum(each.samples for _, each in pairs)
        ),
        server_per_sample=_per(
            sum(_server_seconds(line, ("push", "exchange")) for line in lines),
            sum(_uploaded(line) for line in lines) / scenario.sample_bytes,
        ),
        alignment_per_sample=_per(sum(_server_seconds(line, ("align",)) for line in lines), sum(buffers)),
        sending=_per(ranks * sum(rest for _, rest in main), requests),
        client_handling=max(0.0, _per(sum(of_clients), requests)),
        server_handling=max(0.0, _per(sum(of_server), requests)),
        averaging=max(
            0.0,
            statistics.fmean(_averaging_seconds(line, planned, scenario) for line, planned in pairs),
        ),
        buffered=_per(sum(buffers), len(buffers)),
        kinds=frozenset(kind for line in lines for kind in line["requests"]),
    )


def _main_threads(lines: Sequence[Line]) -> list[tuple[float, float]]:
    """CPU seconds of the client ranks' main threads, their mean: in compute, and for requests; by round."""
    seconds = [line["cpu_seconds"]["client"] for line in lines]
    computing = [sum(each[phase] for phase in COMPUTE) for each in seconds]
    return [
        (computed, sum(each.values()) - computed - each["averaging"])
        for each, computed in zip(seconds, computing, strict=True)
    ]


def _client_seconds(line: Line) -> float:
    """Of compute; a GPU's where there is one, not its host's."""
    seconds = {**line["cpu_seconds"]["client"], **line.get("device_seconds", {}).get("client", {})}
    return float(sum(seconds[phase] for phase in COMPUTE))


def _server_seconds(line: Line, kinds: Sequence[str]) -> float:
    """What requests of these kinds took the server; a GPU's seconds where it has one."""
    on_gpu = line.get("device_seconds", {}).get("server")
    key = "compute_seconds" if on_gpu else "cpu_seconds"
    return float(sum(line["requests"][kind][key] for kind in kinds if kind in line["requests"]))


def _averaging_seconds(line: Line, planned: PlannedRound, scenario: Scenario) -> float:
    """Seconds of an averaging beside the links."""
    measured: float = line["phases"]["client"]["averaging"]
    return measured - scenario.averaging_seconds(planned.averaged_bytes, line["round_seconds"] - measured)


def _uploaded(line: Line) -> int:
    """Bytes of uploads and exchanges."""
    return sum(line["requests"].get(kind, {}).get("up_bytes", 0) for kind in ("push", "exchange"))


def _per(total: float, count: float) -> float:
    return total / count if count else 0.0
