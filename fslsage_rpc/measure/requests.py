"""Where the time of the requests went: what the caller measures and what the callee tells it.

The caller measures the round trip, the callee its own queue and compute seconds; what is left is the wire
(serialising, copying and travelling, both ways). Clocks of two machines are never subtracted.
"""

import threading
from dataclasses import dataclass


@dataclass
class RequestTimes:
    """Sums over requests of one kind.

    `round_trip_seconds` run from handing a request to the transport to having its answer. Of them the caller
    was kept `send_seconds` until the transport had taken the request over; at the server it waited
    `queue_seconds` for its turn and was executed for `compute_seconds`. `up_bytes` and `down_bytes` are those
    of its tensors.
    """

    count: int = 0
    round_trip_seconds: float = 0.0
    send_seconds: float = 0.0
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0
    up_bytes: int = 0
    down_bytes: int = 0

    @property
    def wire_seconds(self) -> float:
        """Round trip - queue - compute."""
        return self.round_trip_seconds - self.queue_seconds - self.compute_seconds

    def record(self) -> dict[str, float]:
        """What `metrics.jsonl` says of these requests."""
        return {**vars(self), "wire_seconds": self.wire_seconds}

    def add(self, other: "RequestTimes") -> None:
        """Add another sum to this one."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


ByClient = dict[int, dict[str, RequestTimes]]
"""per client and kind (push, exchange, align)"""


class RequestLog:
    """Sums by client and kind; any thread may add to it."""

    def __init__(self) -> None:
        self._times: ByClient = {}
        self._lock = threading.Lock()

    def add(self, client: int, kind: str, times: RequestTimes) -> None:
        """Count one answered request."""
        with self._lock:
            self._times.setdefault(client, {}).setdefault(kind, RequestTimes()).add(times)

    def take(self) -> ByClient:
        """The sums so far; the log starts again from zero."""
        with self._lock:
            taken, self._times = self._times, {}
        return taken


def by_kind(clients: ByClient) -> dict[str, RequestTimes]:
    """The sums over clients."""
    total: dict[str, RequestTimes] = {}
    for kinds in clients.values():
        for kind, times in kinds.items():
            total.setdefault(kind, RequestTimes()).add(times)
    return total
