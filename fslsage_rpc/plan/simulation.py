"""A round that nobody has run, in simulated seconds: by the program's own `Turns` and `Mailbox`.

What goes on in it is a process: it yields what it waits for, which is called with how the process goes on.
"""

import itertools
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from heapq import heappop, heappush
from typing import NamedTuple

from fslsage_rpc.parties.mailbox import Mailbox
from fslsage_rpc.parties.requests import KINDS, Align, Announced, Ask, BeginStep, Request
from fslsage_rpc.parties.turns import Turns
from fslsage_rpc.plan.scenario import Costs, PlannedRound, Scenario

INITIAL_WINDOW_BYTES = 10 * 1448
"""what a connection may send before the first acknowledgement (RFC 6928, with Ethernet's segments)"""
RPC_CONNECTIONS = 16
"""that TensorPipe's `uv` spreads a tensor over"""
SHORTEST_REST_SECONDS = 0.2
"""beside a round trip: after such a rest a connection begins anew (RFC 5681; Linux's shortest time-out)"""
BEHIND_FORWARD = 2.0
"""forward passes that the rest of a client's local step costs, which is mostly its backward pass"""
GoOn = Callable[[], None]
Process = Iterator[Callable[[GoOn], None]]


class Machine:
    """Simulated time, and cores: n pieces of work on c cores go on at min(1, c / n) of full speed each."""

    def __init__(self, cores: float):
        self.now = 0.0
        self._cores = cores
        self._worked = 0.0  # a clock as fast as the work goes on
        self._number = itertools.count()
        self._waits: list[tuple[float, int, GoOn]] = []  # by their ends on `now`
        self._works: list[tuple[float, int, GoOn]] = []  # and on `_worked`

    def wait(self, seconds: float, go_on: GoOn) -> None:
        """Go on in so many seconds."""
        heappush(self._waits, (self.now + seconds, next(self._number), go_on))

    def work(self, seconds: float, go_on: GoOn) -> None:
        """Go on after work of so many seconds on a core of its own."""
        heappush(self._works, (self._worked + seconds, next(self._number), go_on))

    def run(self) -> None:
        """Go on until nothing waits or works."""
        while self._waits or self._works:
            speed = min(1.0, self._cores / max(1, len(self._works)))
            left = max(0.0, self._works[0][0] - self._worked) if self._works else math.inf
            if not self._works or (self._waits and self._waits[0][0] < self.now + left / speed):
                then, _, go_on = heappop(self._waits)
                self._worked += (then - self.now) * speed
                self.now = then
            else:  # the work has ended, even where `now` is too coarse to say so
                self._worked, _, go_on = heappop(self._works)
                self.now += left / speed
            go_on()


class Threads:
    """A pool of threads, which takes processes in the order that they ask."""

    def __init__(self, count: int, machine: Machine):
        self._free, self._machine = count, machine
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
            self._machine.wait(0.0, self._waiting.popleft())


class Connection:
    """A TCP connection: one transfer at a time, at the link's rate once its window covers a round trip.

    Until then it sends one window per round trip, and the window doubles. Losses are not in it. The rate is
    in bytes per second; so many connections `beside` each other share a transfer.
    """

    def __init__(self, rate: float, round_trip: float, beside: int = 1):
        self._rate, self._round_trip, self._free = rate, round_trip, 0.0
        self._initial = self._window = float(beside * INITIAL_WINDOW_BYTES)

    def carry(self, now: float, size: float) -> float:
        """When the last of so many bytes has left, if they are handed over now."""
        started = max(now, self._free)
        if started - self._free > SHORTEST_REST_SECONDS + self._round_trip:
            self._window = self._initial
        while size > self._window and self._window < self._rate * self._round_trip:
            started += self._round_trip
            size -= self._window
            self._window *= 2
        self._window += size
        self._free = started + size / self._rate
        return self._free


class Stretch(NamedTuple):
    """Client compute, and the request (or turn) that follows it; None: the end of the client's round."""

    seconds: float
    then: Ask | BeginStep | None = None
    server_seconds: float = 0.0


class RoundSimulation:
    """Runs the stretches of clients through ranks, links and lanes, each of which takes one at a time.

    Args:
        workers: lanes that are executed at the same time, and fits of auxiliary models likewise.
        clients: what each does; they are on rank `client % client_ranks`.
    """

    def __init__(
        self, scenario: Scenario, costs: Costs, workers: int, clients: Mapping[int, Sequence[Stretch]]
    ):
        self._machine, self._costs, link = Machine(scenario.shared_cores), costs, scenario.link
        self._delay, self._ended, self._served = link.round_trip_seconds / 2, 0.0, 0.0
        self._turns, self._links = [], []  # by rank
        for _ in range(scenario.client_ranks):
            self._turns.append(Turns(scenario.config.comm.upload_window, depth_first=False))
            rates = (link.up_bytes_per_second, link.down_bytes_per_second)
            self._links.append([Connection(rate, 2 * self._delay, RPC_CONNECTIONS) for rate in rates])
        self._computing = [False] * scenario.client_ranks
        self._stretches = {client: iter(mine) for client, mine in clients.items()}
        self._numbers = {client: itertools.count() for client in clients}
        plans: dict[int, Announced] = {
            client: [each.then.step for each in mine if isinstance(each.then, Ask)]
            for client, mine in clients.items()
        }
        self._arrived: dict[tuple[int, int], GoOn] = {}
        self._lanes: dict[int, tuple[Mailbox, Threads]] = {}
        replicas = [{client: steps} for client, steps in plans.items()]
        for plan in replicas if scenario.algorithm.server_replicas else [plans]:
            lane = Mailbox("round_robin"), Threads(1, self._machine)
            lane[0].announce(plan, list(plan))
            self._lanes |= dict.fromkeys(plan, lane)
        self._workers = {fits: Threads(workers, self._machine) for fits in (False, True)}

    def run(self) -> tuple[float, float]:
        """Seconds until every client has ended and has all answers, and until the server has executed all."""
        for client in self._stretches:
            self._turns[client % len(self._turns)].begin(client, 0)
        for rank in range(len(self._turns)):
            self._go_on(self._compute(rank))
        self._machine.run()
        return self._ended, self._served

    def _go_on(self, process: Process) -> None:
        if wait := next(process, None):
            wait(partial(self._go_on, process))

    def _work(self, seconds: float) -> Callable[[GoOn], None]:
        return partial(self._machine.work, seconds)

    def _compute(self, rank: int) -> Process:
        """A rank, if it does nothing yet, has the clients compute whose turn it is, until all wait."""
        turns = self._turns[rank]
        while not self._computing[rank] and (client := turns.take()) is not None:
            self._computing[rank] = True
            for seconds, then, server_seconds in self._stretches[client]:
                yield self._work(seconds + (self._costs.sending if isinstance(then, Ask) else 0.0))
                self._ended = self._machine.now
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
        """A request goes to its lane, takes its turn there, and its answer comes back."""
        rank, kind, lane = client % len(self._turns), KINDS[ask.kind], self._lanes[client][1]
        self._turns[rank].sent(client, not kind.blocks)
        request = Request(
            client, next(self._numbers[client]), ask.step, Align()
        )  # no matter what its body is
        yield from self._carry(rank, 0, ask.smashed_bytes + ask.label_bytes)
        yield partial(self._deliver, request)
        if kind.fits:  # of which the lane computes the targets only, a small part
            lane.give()
        yield self._workers[kind.fits].take
        yield self._work(seconds)
        self._workers[kind.fits].give()
        if not kind.fits:
            lane.give()
        self._served = self._machine.now
        yield from self._carry(rank, 1, ask.answer_bytes)
        self._ended = self._machine.now
        self._turns[rank].settled(client, ask.step, not kind.blocks)
        self._go_on(self._compute(rank))

    def _deliver(self, request: Request, go_on: GoOn) -> None:
        """Go on once it is the request's turn, and its lane is free."""
        mailbox, lane = self._lanes[request.client]
        self._arrived[request.client, request.number] = go_on
        for released in mailbox.deliver(request):
            lane.take(self._arrived.pop((released.client, released.number)))

    def _carry(self, rank: int, way: int, size: float) -> Process:
        """So many bytes go up (0) or down (1) a rank's link."""
        yield self._work(self._costs.handling / 2)
        now = self._machine.now
        yield partial(self._machine.wait, self._links[rank][way].carry(now, size) - now + self._delay)


class Prediction(NamedTuple):
    """Means over the rounds of one alignment interval; on the wire are smashed data, labels, gradients,
    auxiliary models and averaging.
    """

    round_seconds: float
    wire_bytes: float
    paper_bytes: float


def predict(scenario: Scenario, costs: Costs, server_workers: int) -> Prediction | str:
    """The alignment interval in the middle of the run: buffers fill as it goes on. Never the first.

    Returns:
        Why it is unknown, where clients make requests of a kind that has no costs.
    """
    interval = scenario.algorithm.interval
    first = max(1, scenario.config.rounds // interval // 2) * interval
    rounds = [scenario.round(number) for number in range(first, first + interval)]
    asks = [ask for each in rounds for client in each.clients.values() for ask in client.asks]
    if not {ask.kind for ask in asks} <= {*costs.kinds}:
        return "it makes requests of a kind that was not measured"
    asked = sum(ask.smashed_bytes + ask.label_bytes + ask.answer_bytes for ask in asks)
    averaged = sum(2 * (scenario.client_ranks - 1) * each.averaged_bytes for each in rounds)
    return Prediction(
        statistics.fmean(_seconds(scenario, costs, server_workers, each) for each in rounds),
        (asked + averaged) / interval,
        statistics.fmean(each.paper_bytes for each in rounds),
    )


def _seconds(scenario: Scenario, costs: Costs, server_workers: int, planned: PlannedRound) -> float:
    """The simulated round; clients average once they have ended and all requests are answered."""
    clients = {client: stretches(scenario, costs, client, planned) for client in planned.clients}
    ended, _ = RoundSimulation(scenario, costs, server_workers, clients).run()
    # The barrier of the client ranks before they average, and the last one of all ranks.
    hops = sum(math.ceil(math.log2(scenario.client_ranks + more)) for more in (0, 1))
    averaging = costs.averaging + averaging_seconds(scenario, planned.averaged_bytes, rest=ended)
    return ended + averaging + hops * scenario.link.round_trip_seconds


def averaging_seconds(scenario: Scenario, size: int, rest: float) -> float:
    """Two ring all-reduces of so many bytes among the n client ranks, of floats and of integers.

    Each takes 2 (n-1) steps, of 1/n of the bytes up one link and down another: as far as to the server and
    back.

    Args:
        rest: seconds since the last averaging, over the same connections.
    """
    link, ranks = scenario.link, scenario.client_ranks
    rate, way = min(link.up_bytes_per_second, link.down_bytes_per_second), 2 * link.round_trip_seconds
    neighbour, began, ended = Connection(rate, way), 0.0, -rest
    for _ in range(2):  # the last averaging, and this one
        began = ended = ended + rest
        for _ in range(2 * (ranks - 1)):
            ended = neighbour.carry(ended, size / ranks) + way
    return ended - began


def stretches(scenario: Scenario, costs: Costs, client: int, planned: PlannedRound) -> list[Stretch]:
    """A client's compute and requests in one round, in order."""
    buffered = iter(planned.aligned.get(client, ()))
    sizes, found = scenario.federation.batch_sizes[client], list[Stretch]()
    seconds = 0.0  # of compute since the last request or turn
    for k, (size, events) in enumerate(zip(sizes, planned.clients[client].steps, strict=True)):
        calls = [event for event in events if isinstance(event, str)]
        forward, behind = calls.count("forward"), BEHIND_FORWARD if {*calls} - {"forward"} else 0.0
        one = costs.client.seconds(size) / ((forward + behind) or 1.0)  # of forward passes
        if len(calls) < len(events):
            found.append(Stretch(seconds, BeginStep(k)))
            seconds = 0.0
        if not calls:
            seconds += one  # a mean over all local steps, those without a call among them
        for event in events:
            if isinstance(event, str):
                seconds += one if event == "forward" else one * behind / (len(calls) - forward)
                continue
            work, samples = (
                (costs.alignment, next(buffered))
                if event.kind == Align.kind
                else (costs.server, event.samples)
            )
            found.append(Stretch(seconds, event, work.seconds(samples)))
            seconds = 0.0
    return [*found, Stretch(seconds)]
