"""Simulates a round of given pieces by the program's own `Turns` and `Mailbox`: a schedule that is possible.

What goes on in it is a process: it yields what it waits for, which is called with how the process goes on.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from heapq import heappop, heappush
from typing import NamedTuple

from fslsage_rpc.algorithms.bound import LinkSpeed
from fslsage_rpc.parties.mailbox import Mailbox
from fslsage_rpc.parties.requests import KINDS, Align, Announced, Ask, BeginStep, Request
from fslsage_rpc.parties.turns import Turns

GoOn = Callable[[], None]
Process = Iterator[Callable[[GoOn], None]]


class Clock:
    """Simulated time."""

    def __init__(self) -> None:
        self.now = 0.0
        self._number = itertools.count()
        self._waits: list[tuple[float, int, GoOn]] = []

    def wait(self, seconds: float, go_on: GoOn) -> None:
        """Go on in so many seconds."""
        heappush(self._waits, (self.now + seconds, next(self._number), go_on))

    def run(self) -> None:
        """Go on until nothing waits."""
        while self._waits:
            self.now, _, go_on = heappop(self._waits)
            go_on()


class Threads:
    """A pool of threads, which takes processes in the order that they ask."""

    def __init__(self, count: int, clock: Clock):
        self._free, self._clock = count, clock
        self._waiting: deque[GoOn] = deque()

    def take(self, go_on: GoOn) -> None:
        """Go on once a thread is free."""
        self._waiting.append(go_on)
        self.give(0)

    def give(self, count: int = 1) -> None:
        """So many threads become free."""
        self._free += count
        if self._free and self._waiting:
            self._free -= 1
            self._clock.wait(0.0, self._waiting.popleft())


class Stretch(NamedTuple):
    """Client compute, and the request (or turn) that follows it; None: the end of the client's round."""

    seconds: float
    then: Ask | BeginStep | None = None
    server_seconds: float = 0.0


def _in_order(ask: Ask) -> bool:
    return KINDS[ask.kind].in_order


class SimulatedRound:
    """Runs the stretches of clients through ranks, links and lanes, each of which takes one at a time.

    Args:
        links: by client rank.
        replicas: each client has a lane of its own.
        workers: lanes that are executed at the same time, and fits of auxiliary models likewise.
        window: of uploads.
        clients: what each does; they are on rank `client % ranks`.
    """

    def __init__(
        self,
        links: Mapping[int, LinkSpeed],
        replicas: bool,
        workers: int,
        window: int,
        clients: Mapping[int, Sequence[Stretch]],
    ):
        self._clock, self._links, self._ended, self._served = Clock(), links, 0.0, 0.0
        self._turns = [Turns(window, depth_first=False) for _ in links]
        self._link_free = {(rank, way): 0.0 for rank in links for way in (0, 1)}
        self._computing = [False] * len(links)
        self._stretches = {client: iter(mine) for client, mine in clients.items()}
        self._numbers = {client: itertools.count() for client in clients}
        plans: dict[int, Announced] = {
            client: [each.then.step for each in mine if isinstance(each.then, Ask) and _in_order(each.then)]
            for client, mine in clients.items()
        }
        self._arrived: dict[tuple[int, int], GoOn] = {}
        self._lanes: dict[int, tuple[Mailbox, Threads]] = {}
        for plan in [{client: steps} for client, steps in plans.items()] if replicas else [plans]:
            lane = Mailbox("round_robin"), Threads(1, self._clock)
            lane[0].announce(plan, list(plan))
            self._lanes |= dict.fromkeys(plan, lane)
        self._workers = {fits: Threads(workers, self._clock) for fits in (False, True)}

    def run(self) -> tuple[float, float]:
        """Seconds until every client has ended and has all answers, and until the server has executed all."""
        for client in self._stretches:
            self._turns[client % len(self._turns)].begin(client, 0)
        for rank in range(len(self._turns)):
            self._go_on(self._compute(rank))
        self._clock.run()
        return self._ended, self._served

    def _go_on(self, process: Process) -> None:
        if wait := next(process, None):
            wait(partial(self._go_on, process))

    def _wait(self, seconds: float) -> Callable[[GoOn], None]:
        return partial(self._clock.wait, seconds)

    def _compute(self, rank: int) -> Process:
        """A rank, if it does nothing yet, has the clients compute whose turn it is, until all wait."""
        turns = self._turns[rank]
        while not self._computing[rank] and (client := turns.take()) is not None:
            self._computing[rank] = True
            for seconds, then, server_seconds in self._stretches[client]:
                yield self._wait(seconds)
                self._ended = self._clock.now
                if isinstance(then, Ask):
                    self._go_on(self._request(client, then, server_seconds))
                    if not KINDS[then.kind].blocks:
                        continue
                elif then:
                    turns.begin(client, then.step)
                else:
                    turns.leave(client)
                break
            self._computing[rank] = False

    def _request(self, client: int, ask: Ask, seconds: float) -> Process:
        """A request goes to its lane, takes its turn there, if it has one, and its answer comes back."""
        rank, kind, lane = client % len(self._turns), KINDS[ask.kind], self._lanes[client][1]
        self._turns[rank].sent(client, not kind.blocks)
        number = next(self._numbers[client]) if kind.in_order else None
        yield self._carry(rank, 0, ask.smashed_bytes + ask.label_bytes)
        if number is not None:
            yield partial(self._deliver, Request(client, number, ask.step, Align()))  # no matter what it asks
            if kind.fits:  # of which the lane computes the targets only, a small part
                lane.give()
        yield self._workers[kind.fits].take
        yield self._wait(seconds)
        self._workers[kind.fits].give()
        if not kind.fits:
            lane.give()
        self._served = self._clock.now
        yield self._carry(rank, 1, ask.answer_bytes)
        self._ended = self._clock.now
        self._turns[rank].settled(client, ask.step, not kind.blocks)
        self._go_on(self._compute(rank))

    def _deliver(self, request: Request, go_on: GoOn) -> None:
        """Go on once it is the request's turn, and its lane is free."""
        mailbox, lane = self._lanes[request.client]
        self._arrived[request.client, request.number] = go_on
        for released in mailbox.deliver(request):
            lane.take(self._arrived.pop((released.client, released.number)))

    def _carry(self, rank: int, way: int, size: float) -> Callable[[GoOn], None]:
        """So many bytes go up (0) or down (1) a rank's link, behind those before them."""
        link = self._links[rank]
        rate = (link.up_bytes_per_second, link.down_bytes_per_second)[way]
        free = self._link_free[rank, way] = max(self._clock.now, self._link_free[rank, way]) + size / rate
        return self._wait(free - self._clock.now + link.round_trip_seconds / 2)
