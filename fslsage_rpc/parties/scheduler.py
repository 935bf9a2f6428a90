"""Drives the rounds of all clients of a rank, so that one client's wait is another's time to compute."""

import queue
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fslsage_rpc.device.clock import clock, synchronise
from fslsage_rpc.measure.phases import Phase
from fslsage_rpc.measure.trace import Arrow
from fslsage_rpc.parties.context import Context
from fslsage_rpc.parties.requests import BeginStep, Body, ClientRound, Request
from fslsage_rpc.parties.turns import Turns

TakeValue = Callable[[], Any]
"""Takes an answer's value in, on this thread, or raises what the request came to."""
Send = Callable[[Request, Callable[[TakeValue], None]], None]
"""Hands a request to the transport, which calls back, from any thread, with what takes the answer."""


@dataclass
class ClientProgress:
    """How far one client is in its round; `place` is its number among the clients of its rank."""

    client: int
    place: int
    generator: ClientRound
    requests: int = 0  # that are in order
    answer: Any = None


class Scheduler:
    """Interleaves the client rounds of one rank.

    Clients take turns by local step (`Turns`). A client that waits, for its turn or for an answer, is
    suspended; the rank waits only when all its clients do, and that time is entered under what ended it.

    Args:
        send: hands a request to the transport.
        window: uploads of one client that the server may still have to train on.
        depth_first: `client_major`: the first client goes on as long as it can, as the server wants its
            requests first.
        context: of the clients.
        staged: what is sent passes through host memory, so that it must be there.
    """

    def __init__(
        self,
        send: Send,
        window: int,
        depth_first: bool,
        context: Context,
        staged: bool = False,
    ):
        self._send = send
        self._turns = Turns(window, depth_first)
        self._timeline, self._device = context.timeline, context.device
        self._staged = staged
        self._replies: queue.SimpleQueue[tuple[ClientProgress, int, Body, TakeValue]] = queue.SimpleQueue()

    def run(self, rounds: Mapping[int, ClientRound]) -> None:
        """Run these clients' rounds (in this order where they compete) to their end and drain all requests in
        flight.

        Raises:
            Exception: what a client's round, or the transport, raised.
        """
        clients = [
            ClientProgress(id, place, generator) for place, (id, generator) in enumerate(rounds.items())
        ]
        unfinished = sum(self._advance(progress) for progress in clients)
        while unfinished:
            while not self._replies.empty():
                self._settle_next()
            turn = self._turns.take()
            if turn is None:
                self._settle_next()
            elif not self._advance(clients[turn]):
                unfinished -= 1
        with self._timeline.phase(Phase.FORWARD_BACKWARD):
            synchronise(self._device)
        while self._turns.in_flight:
            self._settle_next(Phase.DRAIN_WAIT)

    def _advance(self, progress: ClientProgress) -> bool:
        """Let a client compute until it has to wait.

        Returns:
            Has it anything left to do?
        """
        while True:
            answer, progress.answer = progress.answer, None
            try:
                wanted = progress.generator.send(answer)
            except StopIteration:
                self._turns.leave(progress.place)
                return False
            if isinstance(wanted, BeginStep):
                self._turns.begin(progress.place, wanted.step)
                return True
            self._request(progress, wanted)
            if wanted.blocks:
                return True

    def _request(self, progress: ClientProgress, body: Body) -> None:
        """Send a request."""
        step = self._turns.sent(progress.place, not body.blocks)
        request = Request(progress.client, progress.requests, step, body)
        progress.requests += body.in_order
        if self._staged:
            with self._timeline.phase(Phase.FORWARD_BACKWARD):
                synchronise(self._device)
        row = f"client {request.client}"
        arrow = Arrow("request", request.client, request.number) if body.in_order else None
        # Handing over: serialising, and in the local transport the server's work too.
        with self._timeline.phase(body.waits_as, row, arrow):
            self._send(request, lambda take: self._replies.put((progress, step, body, take)))

    def _settle_next(self, phase: str | None = None) -> None:
        """Take in the next answer, waiting for it if need be.

        Args:
            phase: that the time is entered under; None: what the request waits as.
        """
        began = clock()
        progress, step, body, take = self._replies.get()
        answer = take()
        self._timeline.add(phase or body.waits_as, began, clock() - began)
        if body.blocks:  # an upload's own, None, may come between another request's and the client's turn
            progress.answer = answer
        self._turns.settled(progress.place, step, not body.blocks)
