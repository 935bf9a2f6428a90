"""Requests in, requests out in the order that the configuration asks for. No threads, no clocks."""

from collections import deque
from collections.abc import Sequence

from fslsage_rpc.parties.requests import Announced, End, Request

RequestKey = tuple[int, int]  # (client, number)


class Mailbox:
    """Holds a lane's requests of one round back until it is their turn.

    Each client announces the local steps at which it will make requests (several at one step are allowed).
    From that:

    - `round_robin`: by step, then client, then number;
    - `client_major`: by client, then number;
    - `arrival`: as they come, each client's own requests by number. A client may then announce that it will
      say when it has ended, and make any requests until it does.

    Finished and absent clients have no turns, so nobody waits for a request that will not come.
    """

    def __init__(self, order: str):
        self.order = order
        self._queue_of: dict[int, deque[RequestKey]] = {}  # one queue for all clients, or (arrival) one each
        self._expected: set[RequestKey] = set()
        self._open: set[int] = set()  # clients that will announce their end
        self._waiting: dict[RequestKey, Request] = {}

    def announce(self, plans: dict[int, Announced], ranking: Sequence[int]) -> None:
        """Open a round.

        Args:
            plans: for each client of this lane what it announces.
            ranking: the order of the clients within a step.

        Raises:
            RuntimeError: the previous round is not finished.
        """
        if not self.finished:
            raise RuntimeError(f"a round was announced while the last waits for {self.next_turns()}")
        self._open = {client for client, steps in plans.items() if steps is None}
        turns = [
            (step, client, number)
            for client, steps in plans.items()
            for number, step in enumerate(steps or ())
        ]
        self._expected = {(client, number) for _, client, number in turns}
        if self.order == "arrival":
            self._queue_of = {
                client: deque((client, number) for number in range(1 if steps is None else len(steps)))
                for client, steps in plans.items()
            }
            return
        if self._open:
            raise RuntimeError(f"requests that are not announced have no place in {self.order}")
        if self.order == "round_robin":
            rank = {client: position for position, client in enumerate(ranking)}
            turns.sort(key=lambda turn: (turn[0], rank[turn[1]], turn[2]))
        else:
            turns.sort(key=lambda turn: turn[1:])
        shared = deque((client, number) for _, client, number in turns)
        self._queue_of = dict.fromkeys(plans, shared)

    def deliver(self, request: Request) -> list[Request]:
        """Take in a request and return those, in order, whose turn has come.

        Raises:
            RuntimeError: the request was not announced, came twice, or is behind its client's end.
        """
        turn = (request.client, request.number)
        queue = self._queue_of.get(request.client, deque())
        if request.client in self._open:
            awaited = turn not in self._waiting and turn >= queue[0]
        else:
            awaited = turn in self._expected
        if not awaited:
            raise RuntimeError(
                f"client {request.client} sent request {request.number}, which it had not announced"
            )
        self._expected.discard(turn)
        self._waiting[turn] = request
        released = []
        while queue and queue[0] in self._waiting:
            request = self._waiting.pop(queue.popleft())
            released.append(request)
            if isinstance(request.body, End):
                self._close(request.client)
            elif request.client in self._open:
                queue.append((request.client, request.number + 1))
        return released

    def _close(self, client: int) -> None:
        """The client's end has had its turn."""
        self._open.discard(client)
        behind = [number for waiting, number in self._waiting if waiting == client]
        if behind:
            raise RuntimeError(f"client {client} sent request {min(behind)}, which is behind its end")

    @property
    def finished(self) -> bool:
        """Has every request had its turn, and every client announced its end that had to?"""
        return not (self._expected or self._waiting or self._open)

    def next_turns(self) -> list[RequestKey]:
        """The requests that this lane waits for: what to name when a round does not end."""
        queues = {id(queue): queue for queue in self._queue_of.values()}
        return [queue[0] for queue in queues.values() if queue]
