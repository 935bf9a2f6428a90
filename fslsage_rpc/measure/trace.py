"""Traces: what every rank did when, as one Chrome-trace file that Perfetto opens.

A process of the trace is a rank, a row (Chrome says thread) one of its clients or lanes. Each rank's clock is
laid on the server's by an offset that is estimated once, from the call with the shortest round trip: it read
the server's clock at its middle, right to half that round trip. That serves to draw, and for nothing else: no
figure subtracts two ranks' clocks.
"""

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fslsage_rpc.device.clock import clock

PINGS = 21


@dataclass(frozen=True)
class Arrow:
    """One end of the arrow from where a request was made to where it was executed."""

    end: Literal["request", "execution"]
    client: int
    number: int
    """of the request in its client's round"""


@dataclass(frozen=True)
class Span:
    """A phase on one row of the trace, in seconds by the rank's own clock."""

    name: str
    row: str
    started: float
    seconds: float
    arrow: Arrow | None = None


class Tracer:
    """Collects a rank's spans, from any thread."""

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._lock = threading.Lock()

    def add(self, span: Span) -> None:
        """Keep a span."""
        with self._lock:
            self._spans.append(span)

    def take(self) -> list[Span]:
        """The spans so far; the tracer starts again with none."""
        with self._lock:
            taken, self._spans = self._spans, []
        return taken


@dataclass(frozen=True)
class ClockOffset:
    """What to add to a rank's clock to have the server's, and how wrong that may be, in seconds."""

    seconds: float
    error_seconds: float


def estimate_offset(server_clock: Callable[[], float]) -> ClockOffset:
    """The offset to the clock that a remote call reads."""
    best: ClockOffset | None = None
    for _ in range(PINGS):
        asked = clock()
        there = server_clock()
        answered = clock()
        error = (answered - asked) / 2
        if best is None or error < best.error_seconds:
            best = ClockOffset(there - (asked + answered) / 2, error)
    assert best is not None
    return best


class TraceFile:
    """Gathers all ranks' spans, round by round, and writes them as Chrome-trace JSON.

    Args:
        processes: what each rank hosts, by rank.
        offsets: of the ranks' clocks to the server's, by rank.
    """

    def __init__(self, processes: Sequence[str], offsets: Sequence[ClockOffset]):
        self._processes = [f"rank {rank}: {hosts}" for rank, hosts in enumerate(processes)]
        self._offsets = offsets
        self._events: list[dict[str, Any]] = []
        self._rows: dict[tuple[int, str], int] = {}

    def add_round(self, number: int, spans: Sequence[Sequence[Span]]) -> None:
        """The spans of one round, by rank."""
        for rank, mine in enumerate(spans):
            for span in mine:
                self._add(number, rank, span)

    def text(self) -> str:
        """The file: times in microseconds from the first span on."""
        first = min((event["ts"] for event in self._events), default=0.0)
        events = [{**event, "ts": event["ts"] - first} for event in self._events]
        names = [_name("process_name", rank, 0, name) for rank, name in enumerate(self._processes)]
        names += [_name("thread_name", rank, row, name) for (rank, name), row in self._rows.items()]
        offsets = dict(zip(self._processes, map(vars, self._offsets), strict=True))
        other = {"clock_offsets_to_rank_0": offsets}
        return json.dumps({"traceEvents": names + events, "displayTimeUnit": "ms", "otherData": other})

    def _add(self, number: int, rank: int, span: Span) -> None:
        place = {
            "pid": rank,
            "tid": self._rows.setdefault((rank, span.row), len(self._rows) + 1),
            "ts": 1e6 * (span.started + self._offsets[rank].seconds),
        }
        timed = {"ph": "X", "name": span.name, "dur": 1e6 * span.seconds, "args": {"round": number}}
        self._events.append({**place, **timed})
        if span.arrow is not None:
            kind = {"ph": "s"} if span.arrow.end == "request" else {"ph": "f", "bp": "e"}
            id = f"{number}.{span.arrow.client}.{span.arrow.number}"
            self._events.append({**place, **kind, "name": "request", "cat": "request", "id": id})


def _name(kind: str, rank: int, row: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": rank, "tid": row, "args": {"name": name}}
