"""One round of the real scheduler, mailbox and links in simulated time.

Ranks, links and lanes take one thing at a time; clients and requests wait for them by the program's own rules
(`parties/turns.py` itself, and `parties/mailbox.py` with `round_robin`). All times are in seconds.
"""

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fslsage_rpc.algorithms.bound import LinkSpeed
from fslsage_rpc.parties.turns import Turns
from fslsage_rpc.plan.cores import Cores
from fslsage_rpc.plan.wire import RPC_LANES, Connection


@dataclass(frozen=True)
class Step:
    """Client compute, and what follows it: a request, the turn to begin a local step with requests in it, or
    (None) the end of the round.
    """

    compute_seconds: float
    kind: str | None = None
    turn: int = 0
    """the local step that is begun or that the request is made at: its place in the server's order"""
    server_seconds: float = 0.0
    up_bytes: float = 0.0
    down_bytes: float = 0.0


@dataclass
class Progress:
    """How far a client is."""

    client: int
    rank: int
    steps: Sequence[Step]
    at: int = 0


@dataclass
class SimulatedLane:
    """What a lane has still to do in this round, in order, and what has arrived of it."""

    turns: deque[tuple[int, int, int]]
    arrived: dict[tuple[int, int, int], tuple[Progress, Step]] = field(default_factory=dict)
    busy: bool = False


class RoundSimulation:
    """Runs the clients' steps through ranks, links and lanes.

    Args:
        steps: per client what it does; clients are on rank `client % ranks`.
        lane_of: per client the lane that takes its requests; empty where there is no server model.
        workers: lanes that are executed at the same time, and fits of auxiliary models likewise.
        window: uploads of one client that the server may still have to train on.
        sending_seconds: for which a request keeps its client's rank busy.
        client_handling_seconds: of the transport's threads on that rank, for a request and its answer.
        server_handling_seconds: likewise on the server's.
        shared_cores: of the one machine that all ranks are on; infinite where each has its own.

    Attributes:
        cores: that they share.
    """

    def __init__(
        self,
        steps: Mapping[int, Sequence[Step]],
        lane_of: Mapping[int, int],
        ranks: int,
        link: LinkSpeed,
        workers: int,
        window: int,
        sending_seconds: float,
        client_handling_seconds: float,
        server_handling_seconds: float,
        shared_cores: float = math.inf,
    ):
        self._delay = link.round_trip_seconds / 2
        self._at_client, self._at_server = client_handling_seconds / 2, server_handling_seconds / 2
        self._sending = sending_seconds
        self._now = self._ended = self._served = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()
        self.cores = Cores(shared_cores, lambda: self._now, self._after)
        self._turns = [Turns(window, depth_first=False) for _ in range(ranks)]
        self._rank_busy = [False] * ranks
        rates = {"up": link.up_bytes_per_second, "down": link.down_bytes_per_second}
        self._connections = {
            way: [Connection(rate, link.round_trip_seconds, RPC_LANES) for _ in range(ranks)]
            for way, rate in rates.items()
        }
        self._free_workers = workers
        self._free_fitters = workers
        self._unfitted: deque[tuple[Progress, Step]] = deque()
        self._lane_of = lane_of
        turns: dict[int, list[tuple[int, int, int]]] = {}
        for client, mine in steps.items():
            for place, step in enumerate(mine):
                if step.kind not in (None, "turn"):
                    turns.setdefault(lane_of[client], []).append((step.turn, client, place))
        self._lanes = {lane: SimulatedLane(deque(sorted(mine))) for lane, mine in turns.items()}
        self._clients = {client: Progress(client, client % ranks, mine) for client, mine in steps.items()}
        for progress in self._clients.values():
            self._turns[progress.rank].begin(progress.client, 0)
        for rank in range(ranks):
            self._compute(rank)

    def run(self) -> tuple[float, float]:
        """Seconds until every client has ended and has all answers, also those to its uploads, and until the
        server has executed every request.
        """
        while self._events:
            self._now, _, happen = heapq.heappop(self._events)
            happen()
        return self._ended, self._served

    def _after(self, seconds: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self._now + seconds, next(self._number), happen))

    def _compute(self, rank: int) -> None:
        """The rank takes the client whose turn it is, if it is free and there is one."""
        if self._rank_busy[rank]:
            return
        turn = self._turns[rank].take()
        if turn is not None:
            self._rank_busy[rank] = True
            self._advance(self._clients[turn])

    def _advance(self, progress: Progress) -> None:
        """Let a client compute until it has to wait."""
        place, step = progress.at, progress.steps[progress.at]
        asks = step.kind not in (None, "turn")

        def done() -> None:
            progress.at += 1
            self._ended = self._now
            if asks:
                self._send(progress, place)
            if step.kind == "push":
                self._advance(progress)
                return
            if step.kind == "turn":
                self._turns[progress.rank].begin(progress.client, step.turn)
            elif step.kind is None:
                self._turns[progress.rank].leave(progress.client)
            self._rank_busy[progress.rank] = False
            self._compute(progress.rank)

        self.cores.run(step.compute_seconds + (self._sending if asks else 0.0), done)

    def _send(self, progress: Progress, place: int) -> None:
        step = progress.steps[place]
        key = (step.turn, progress.client, place)
        lane = self._lanes[self._lane_of[progress.client]]

        def arrive() -> None:
            lane.arrived[key] = progress, step
            self._execute(lane)

        self._turns[progress.rank].sent(progress.client, step.kind == "push")
        self._carry("up", progress.rank, step.up_bytes, arrive)

    def _execute(self, lane: SimulatedLane) -> None:
        """The lane takes its next turn, if it is free, a worker is, and the request has arrived."""
        if lane.busy or not self._free_workers or not lane.turns or lane.turns[0] not in lane.arrived:
            return
        progress, step = lane.arrived.pop(lane.turns.popleft())
        if step.kind == "align":  # on the lane only the targets are computed, a small part of it
            self._unfitted.append((progress, step))
            self._fit()
            self._execute(lane)
            return
        lane.busy = True
        self._free_workers -= 1

        def done() -> None:
            lane.busy = False
            self._free_workers += 1
            self._reply(progress, step)
            for waiting in self._lanes.values():
                self._execute(waiting)

        self.cores.run(step.server_seconds, done)

    def _fit(self) -> None:
        """The longest waiting client's auxiliary model is fitted, if there is one and a worker is free."""
        if not self._unfitted or not self._free_fitters:
            return
        progress, step = self._unfitted.popleft()
        self._free_fitters -= 1

        def done() -> None:
            self._free_fitters += 1
            self._reply(progress, step)
            self._fit()

        self.cores.run(step.server_seconds, done)

    def _reply(self, progress: Progress, step: Step) -> None:
        self._served = self._now
        self._carry("down", progress.rank, step.down_bytes, lambda: self._answer(progress, step))

    def _answer(self, progress: Progress, step: Step) -> None:
        self._ended = self._now
        self._turns[progress.rank].settled(progress.client, step.turn, step.kind == "push")
        self._compute(progress.rank)

    def _carry(self, way: str, rank: int, bytes: float, done: Callable[[], None]) -> None:
        """Bytes go over the rank's link, handled at both of its ends."""
        before, behind = (self._at_client, self._at_server)[:: 1 if way == "up" else -1]

        def travel() -> None:
            ended = self._connections[way][rank].carry(self._now, bytes)
            self._after(ended - self._now + self._delay, lambda: self.cores.run(behind, done))

        self.cores.run(before, travel)
