"""The line of `metrics.jsonl` that a round leaves, and the summary that all of them come to."""

import math
import statistics
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fslsage_rpc.algorithms.paper_ledger import PaperBytes
from fslsage_rpc.measure.host_load import CoreTimes, host_busy
from fslsage_rpc.measure.phases import OF_CLIENTS, Phase
from fslsage_rpc.measure.request_times import ByClient, by_kind
from fslsage_rpc.measure.trace import Span
from fslsage_rpc.parties.server import ServerReport
from fslsage_rpc.runs.round_numbers import FIRST_ROUND
from fslsage_rpc.tasks import Score
from fslsage_rpc.transport.wire_ledger import RANK, WIRE_KINDS

WATCHED = 0.9
"""the least share of a run's seconds whose load is known where the whole run's is told"""
WireBytes = dict[int, dict[str, int]]
PeakMemory = dict[str, dict[str, int | None]]
"""`host_bytes` and `device_bytes` by the kind of rank; None: the system does not tell, or a CPU's"""


@dataclass
class RankReport:
    """What one rank measured in one round.

    `seconds` runs from leaving the barrier before the round to leaving the one after it; `phases` is None on
    a rank without clients, `device_seconds` empty on a CPU. `cores`: what its process and its host's cores
    did; `cpu_seconds`: of its main thread, by phase. `loss_sum` over `samples` is of its clients that train
    the whole model.
    """

    seconds: float
    phases: dict[str, float] | None
    cores: CoreTimes
    cpu_seconds: dict[str, float]
    device_seconds: dict[str, float]
    loss_sum: float
    samples: int
    wire: WireBytes
    requests: ByClient
    spans: list[Span]
    peak_memory: PeakMemory


def round_seconds(reports: Sequence[RankReport]) -> float:
    """The training clock of a round: that of the slowest rank."""
    return max(report.seconds for report in reports)


def client_phases(reports: Sequence[RankReport]) -> dict[str, float]:
    """Mean seconds per phase over the client ranks; `other` is what is left of the round.

    A rank that left the first barrier later than the slowest rank's clock began was held up by others:
    `drain_wait`.
    """
    measured = [report for report in reports if report.phases is not None]
    phases = {
        name: sum((report.phases or {}).get(name, 0.0) for report in measured) / len(measured)
        for name in OF_CLIENTS
    }
    held_up = [round_seconds(reports) - report.seconds for report in measured]
    phases[Phase.DRAIN_WAIT] += sum(held_up) / len(measured)
    phases["other"] = round_seconds(reports) - sum(phases.values())
    return phases


def client_cpu_seconds(reports: Sequence[RankReport]) -> dict[str, float]:
    """Mean CPU seconds of the client ranks' main threads per phase; `other` is what is in none."""
    measured = [report.cpu_seconds for report in reports if report.phases is not None]
    return {
        name: sum(seconds.get(name, 0.0) for seconds in measured) / len(measured)
        for name in (*OF_CLIENTS, "other")
    }


def client_device_seconds(reports: Sequence[RankReport]) -> dict[str, float]:
    """Mean seconds of a GPU per phase, over the client ranks that have one; empty where none has."""
    measured = [report.device_seconds for report in reports if report.device_seconds]
    names = [name for name in OF_CLIENTS if any(name in seconds for seconds in measured)]
    return {name: sum(s.get(name, 0.0) for s in measured) / len(measured) for name in names}


def highest(peaks: Iterable[PeakMemory]) -> PeakMemory:
    """The largest figures of each kind of rank, of those that are known."""
    most: PeakMemory = {}
    for kinds in peaks:
        for kind, figures in kinds.items():
            so_far = most.setdefault(kind, dict(figures))
            for name, bytes in figures.items():
                so_far[name] = max((n for n in (so_far[name], bytes) if n is not None), default=None)
    return most


class RoundRecorder:
    """Turns what the ranks report into metrics lines, and keeps the totals; not the lines: a long run has
    many.

    Args:
        metrics: names of what the task measures by besides loss and accuracy.
        train_loss_of: see `Algorithm.train_loss_of`.

    Attributes:
        last: the line of the last round so far.
        client_bytes: on the wire in all rounds so far, by client.
        diverged: the first round, from 1, with a loss or a weight that is not finite.
    """

    def __init__(self, metrics: Sequence[str], train_loss_of: str) -> None:
        self._metrics = metrics
        self._train_loss_of = train_loss_of
        self.last: dict[str, Any] | None = None
        self.client_bytes: WireBytes = {}
        self._elapsed_seconds = 0.0
        self._paper_bytes = 0
        self._uncoded_bytes = 0
        self._round_seconds = array("d")
        self._evaluation_seconds = 0.0
        self._cpu_seconds = 0.0
        self._watched_seconds, self._others_seconds = 0.0, 0.0  # of rounds whose `host_busy` is known
        self._phases: dict[str, dict[str, float]] = {"client": {}, "server": {}}
        self._wire_bytes = dict.fromkeys(WIRE_KINDS, 0)
        self._peak_memory: PeakMemory = {}
        self._last_scored: dict[str, Any] = {}
        self._best: dict[str, Any] = {}
        self.diverged: int | None = None

    def go_on(self, lines: Sequence[dict[str, Any]], client_bytes: WireBytes) -> None:
        """Take over earlier rounds: their lines, one or more, and the bytes by client, not in them."""
        for line in lines:
            self._count(line)
        self.client_bytes = {client: dict(kinds) for client, kinds in client_bytes.items()}
        self._elapsed_seconds = lines[-1]["elapsed_seconds"]
        self._paper_bytes = lines[-1]["paper_bytes_total"]

    def add(
        self,
        t: int,
        reports: Sequence[RankReport],
        server: ServerReport,
        score: Score | None,
        evaluation_seconds: float,
        paper_bytes: PaperBytes,
        participants: list[int],
        finite: bool,
    ) -> dict[str, Any]:
        """The line of one round.

        Args:
            t: the round, from 0.
            paper_bytes: of what has been sent, so that all of it is known.
            finite: are the weights? Where they or a loss are not, the line has `diverged`, and no score.
        """
        seconds = round_seconds(reports)
        self._elapsed_seconds += seconds
        paid = paper_bytes.coded or 0
        self._paper_bytes += paid
        wire_bytes = dict.fromkeys(WIRE_KINDS, 0)
        for report in reports:
            for client, kinds in report.wire.items():
                total = self.client_bytes.setdefault(client, dict.fromkeys(WIRE_KINDS, 0))
                for kind, bytes in kinds.items():
                    wire_bytes[kind] += bytes
                    total[kind] += bytes
        requests = by_kind({client: kinds for report in reports for client, kinds in report.requests.items()})
        loss_sum = server.loss_sum + sum(report.loss_sum for report in reports)
        samples = server.samples + sum(report.samples for report in reports)
        finite = finite and math.isfinite(loss_sum) and (score is None or math.isfinite(score.loss))
        score = score if finite else None
        line = {
            "round": t + FIRST_ROUND,
            "train_loss": loss_sum / samples if samples else math.nan,
            "train_loss_of": self._train_loss_of,
            "test_loss": score.loss if score else None,
            "test_accuracy": score.accuracy if score else None,
            **{f"test_{name}": score.metrics[name] if score else None for name in self._metrics},
            "round_seconds": seconds,
            "elapsed_seconds": self._elapsed_seconds,
            "evaluation_seconds": evaluation_seconds,
            "phases": {"client": client_phases(reports), "server": server.phases},
            "cpu_seconds": {
                "ranks": [report.cores.cpu_seconds for report in reports],
                "client": client_cpu_seconds(reports),
                "server": server.cpu_seconds,
            },
            "host_busy": host_busy([report.cores for report in reports]),
            "peak_memory": highest(report.peak_memory for report in reports),
            "requests": {kind: times.record() for kind, times in requests.items()},
            "wire_bytes": wire_bytes,
            "paper_bytes": paid,
            "paper_bytes_total": self._paper_bytes,
            "participants": participants,
            "alignment": _mean_record(server.alignments),
            "drift": _mean_record(server.drifts),
        }
        on_devices = {"client": client_device_seconds(reports), "server": server.device_seconds}
        if any(on_devices.values()):
            line["device_seconds"] = on_devices
        if paper_bytes.uncoded != paid:
            line["paper_bytes_uncoded"] = paper_bytes.uncoded
        if not finite:
            line["diverged"] = True
        line = _finite(line)
        self._count(line)
        return line

    def _count(self, line: dict[str, Any]) -> None:
        """Add a line to the totals that are made of lines."""
        self.last = line
        self._round_seconds.append(line["round_seconds"])
        self._evaluation_seconds += line["evaluation_seconds"]
        cpu_seconds = line.get("cpu_seconds")  # older lines have none
        self._cpu_seconds += sum(cpu_seconds["ranks"]) if cpu_seconds else math.nan
        if line.get("host_busy") is not None:
            self._watched_seconds += line["round_seconds"]
            self._others_seconds += line["round_seconds"] * line["host_busy"]
        for party, total in self._phases.items():
            for name, seconds in line["phases"][party].items():
                total[name] = total.get(name, 0.0) + seconds
        for kind in WIRE_KINDS:
            self._wire_bytes[kind] += line["wire_bytes"][kind]
        self._peak_memory = highest([self._peak_memory, line.get("peak_memory", {})])
        self._uncoded_bytes += line.get("paper_bytes_uncoded", line["paper_bytes"])
        if line.get("diverged") and self.diverged is None:
            self.diverged = line["round"]
        if line["test_accuracy"] is not None:
            self._last_scored = line
            if not self._best or line["test_accuracy"] > self._best["test_accuracy"]:
                self._best = line

    def summary(self, algorithm: str, interval: int) -> dict[str, Any]:
        """What `summary.json` holds: totals, accuracies, and medians over alignment intervals of `interval`
        rounds. Rounds count from `first_round`; accuracies are of finite rounds, null where there are none.
        """
        watched = self._watched_seconds > WATCHED * sum(self._round_seconds)
        return {
            "algorithm": algorithm,
            "first_round": FIRST_ROUND,
            "rounds": len(self._round_seconds),
            "diverged": self.diverged,
            "test_accuracy": {
                "last": self._last_scored.get("test_accuracy"),
                "best": self._best.get("test_accuracy"),
                "best_round": self._best.get("round"),
            },
            "test_loss": self._last_scored.get("test_loss"),
            "training_seconds": self._elapsed_seconds,
            "evaluation_seconds": self._evaluation_seconds,
            "cpu_seconds": None if math.isnan(self._cpu_seconds) else self._cpu_seconds,
            "host_busy": self._others_seconds / self._watched_seconds if watched else None,
            "peak_memory": self._peak_memory,
            "interval_rounds": interval,
            "median_round_seconds": interval_median(self._round_seconds, interval),
            "phases": self._phases,
            "wire_bytes": self._wire_bytes,
            "wire_bytes_per_client": {
                str(client): kinds for client, kinds in sorted(self.client_bytes.items()) if client != RANK
            },
            "paper_bytes_total": self._paper_bytes,
            "paper_bytes_uncoded_total": self._uncoded_bytes,
        }


def is_scored(line: dict[str, Any]) -> bool:
    """Has a round been evaluated, as a run's last one must be, as far as it can be?"""
    return line["test_accuracy"] is not None or bool(line.get("diverged"))


def interval_median(seconds: Sequence[float], interval: int) -> float | None:
    """The median over whole alignment intervals, the first left out, of the mean seconds per round within
    each.

    A median over single rounds would hide alignment. None where there are fewer than two whole intervals.
    """
    starts = range(interval, len(seconds) - interval + 1, interval)
    means = [statistics.fmean(seconds[start : start + interval]) for start in starts]
    return statistics.median(means) if means else None


def _mean_record(records: Sequence[dict[str, float]]) -> dict[str, float] | None:
    """The mean over clients, key by key; None where there are none."""
    if not records:
        return None
    return {key: sum(record[key] for record in records) / len(records) for key in records[0]}


def _finite(tree: dict[str, Any]) -> dict[str, Any]:
    """Infinities and NaN, as a diverged training gives them, become None: JSON has no word for them."""
    return {
        key: _finite(value)
        if isinstance(value, dict)
        else None
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for key, value in tree.items()
    }
