"""Where the time of the requests went: what the caller measures and what the callee tells it.

The caller measures the round trip, the callee its own queue and compute seconds; what is left is the wire
(serialising, copying and travelling, both ways). Clocks of two machines are never subtracted.

Where tensors go from GPU to GPU an answer may be under way before it is computed. There all three are device
seconds: the round trip from when the caller's GPU has made the request's tensors until it has the answer's.
"""

import threading
from dataclasses import dataclass

from fslsage_rpc.device.clock import DeviceIntervals, Reading


@dataclass
class RequestTimes:
    """Sums over requests of one kind.

    `round_trip_seconds` run from handing a request to the transport to having its answer. Of them the caller
    was kept `send_seconds` until the transport had taken the request over; at the server it waited
    `queue_seconds` for its turn and was executed for `compute_seconds`; `cpu_seconds`: of the threads that
    executed it. `up_bytes` and `down_bytes` are those of its tensors.
    """

    count: int = 0
    round_trip_seconds: float = 0.0
    send_seconds: float = 0.0
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0
    cpu_seconds: float = 0.0
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
"""per client and kind of request"""


class RequestLog:
    """Sums by client and kind; any thread may add to it."""

    def __init__(self) -> None:
        self._times: ByClient = {}
        self._round_trips: DeviceIntervals[tuple[int, str]] = DeviceIntervals()
        self._lock = threading.Lock()

    def add(self, client: int, kind: str, times: RequestTimes) -> None:
        """Count one answered request."""
        with self._lock:
            self._times.setdefault(client, {}).setdefault(kind, RequestTimes()).add(times)

    def add_round_trip(self, client: int, kind: str, sent: Reading, there: Reading) -> None:
        """Count a round trip by a GPU's clock, where there is one."""
        self._round_trips.add((client, kind), sent, there)

    def take(self) -> ByClient:
        """The sums so far; the log starts again from zero. For the end of a round: it waits for a GPU."""
        with self._lock:
            taken, self._times = self._times, {}
        for (client, kind), seconds in self._round_trips.take().items():
            taken[client][kind].round_trip_seconds += seconds
        return taken


class DeviceLog:
    """A server's queue and compute seconds by the clock of its GPU; empty on a CPU."""

    def __init__(self) -> None:
        self._intervals: DeviceIntervals[tuple[int, str, str]] = DeviceIntervals()

    def add(
        self,
        client: int,
        kind: str,
        came: Reading,
        began: Reading,
        ended: Reading,
    ) -> None:
        """Count a request, or a part of one, that came and waited, was begun, and ended."""
        self._intervals.add((client, kind, "queue_seconds"), came, began)
        self._intervals.add((client, kind, "compute_seconds"), began, ended)

    def take(self) -> ByClient:
        """The sums so far; the log starts again from zero. For the end of a round: it waits for the GPU."""
        taken: ByClient = {}
        for (client, kind, name), seconds in self._intervals.take().items():
            setattr(taken.setdefault(client, {}).setdefault(kind, RequestTimes()), name, seconds)
        return taken


def on_device(told: ByClient, measured: ByClient) -> None:
    """Put what a server's GPU measured in place of what the server told when it had only queued the work."""
    for client, kinds in told.items():
        for kind, times in kinds.items():
            of_gpu = measured.get(client, {}).get(kind)
            if of_gpu is not None:
                times.queue_seconds, times.compute_seconds = of_gpu.queue_seconds, of_gpu.compute_seconds


def by_kind(clients: ByClient) -> dict[str, RequestTimes]:
    """The sums over clients."""
    total: dict[str, RequestTimes] = {}
    for kinds in clients.values():
        for kind, times in kinds.items():
            total.setdefault(kind, RequestTimes()).add(times)
    return total
