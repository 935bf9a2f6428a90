"""Whose turn it is on a rank that hosts many clients."""

import heapq
from collections import Counter

MOST_OPEN_STEPS = 16
"""steps with requests that may be open on one rank: its activations do not grow with its clients"""


class Turns:
    """The clients of a rank that could go on, and the one that goes on next.

    A local step with requests is open from the turn that it begins with until its client has come to its next
    one and all its requests are answered; only then may its slot hold activations or uploads of another. A
    client that begins a step holds none yet, so it is let in only where its upload window has room and fewer
    than `MOST_OPEN_STEPS` are open. One that has its answer always goes on. Among these the earliest step is
    first, then the first client: the server's `round_robin`, so that what the server waits for is always let
    in (with `client_major`, `depth_first`: the first client, then its earliest step).

    Clients are numbered in the order in which they compete.

    Args:
        window: uploads of one client that the server may still have to train on when it begins a step.
    """

    def __init__(self, window: int, depth_first: bool):
        self._window = window
        self._depth_first = depth_first
        self._most_open = max(MOST_OPEN_STEPS, window)
        self._beginning: list[tuple[int, int, int, int]] = []
        self._answered: list[tuple[int, int, int, int]] = []
        self._held: dict[int, int] = {}  # the steps of clients whose window is full
        self._uploads: Counter[int] = Counter()
        self._at: dict[int, int] = {}  # the open step that each client is in
        # Of each open step: unanswered requests, and 1 while the client is in it.
        self._open: Counter[tuple[int, int]] = Counter()
        self.in_flight = 0

    def begin(self, client: int, step: int) -> None:
        """This client has come to a step with requests in it."""
        self.leave(client)
        self._compete(client, step)

    def leave(self, client: int) -> None:
        """This client is through with its step."""
        if client in self._at:
            self._close(client, self._at.pop(client))

    def sent(self, client: int, upload: bool) -> int:
        """A request has gone out.

        Returns:
            The step that it belongs to.
        """
        self.in_flight += 1
        self._uploads[client] += upload
        self._open[client, self._at[client]] += 1
        return self._at[client]

    def settled(self, client: int, step: int, upload: bool) -> None:
        """A request of this step has been answered: an upload, or what the client waits for."""
        self.in_flight -= 1
        self._close(client, step)
        if not upload:
            # Behind those that begin the same step: the server should have their requests meanwhile.
            heapq.heappush(self._answered, self._entry(client, step + 1))
            return
        self._uploads[client] -= 1
        if client in self._held:
            self._compete(client, self._held.pop(client))

    def take(self) -> int | None:
        """The client that goes on now; None where all wait."""
        queue = self._answered
        if self._beginning and len(self._open) < self._most_open:
            queue = min(queue for queue in (self._beginning, self._answered) if queue)
        if not queue:
            return None
        *_, client, step = heapq.heappop(queue)
        if queue is self._beginning:
            self._at[client] = step
            self._open[client, step] = 1
        return client

    def _compete(self, client: int, step: int) -> None:
        if self._uploads[client] < self._window:
            heapq.heappush(self._beginning, self._entry(client, step))
        else:
            self._held[client] = step

    def _close(self, client: int, step: int) -> None:
        self._open[client, step] -= 1
        if not self._open[client, step]:
            del self._open[client, step]

    def _entry(self, client: int, step: int) -> tuple[int, int, int, int]:
        return (*((client, step) if self._depth_first else (step, client)), client, step)
