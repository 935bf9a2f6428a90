"""TCP connections in simulated time."""

INITIAL_WINDOW_BYTES = 10 * 1448
"""what a connection may send before the first acknowledgement (RFC 6928, with Ethernet's segments)"""
RPC_LANES = 16
"""connections that TensorPipe's `uv` spreads a tensor over"""
SHORTEST_REST_SECONDS = 0.2
"""beside a round trip: after such a rest a connection begins anew (RFC 5681; Linux's shortest time-out)"""


class Connection:
    """Carries one transfer at a time, at its link's rate once its window covers a round trip.

    Until then it sends one window per round trip, and the window doubles. Losses are not in it.

    Args:
        rate: bytes per second.
        round_trip: seconds.
        lanes: connections that share a transfer.
    """

    def __init__(self, rate: float, round_trip: float, lanes: int = 1):
        self._rate, self._round_trip = rate, round_trip
        self._initial: float = lanes * INITIAL_WINDOW_BYTES
        self._window: float = self._initial
        self._free = 0.0

    def carry(self, now: float, bytes: float) -> float:
        """When the last of these bytes has left, if they are handed over now."""
        started = max(now, self._free)
        if started - self._free > SHORTEST_REST_SECONDS + self._round_trip:
            self._window = self._initial
        while bytes > self._window and self._window < self._rate * self._round_trip:
            started += self._round_trip
            bytes -= self._window
            self._window *= 2
        self._window += bytes
        self._free = started + bytes / self._rate
        return self._free
