"""Drives the rounds of all clients of a rank, so that one client's wait is another's time to compute."""

import heapq
import queue
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fslsage_rpc.measure.clock import clock, synchronise
from fslsage_rpc.measure.timeline import Timeline
from fslsage_rpc.measure.trace import Arrow
from fslsage_rpc.parties.requests import Align, ClientRound, Exchange, Push, Request

Send = Callable[[Request, Callable[[Any], None]], None]
"""Hands a request to the transport, which calls back, from any thread, with the answer or the exception."""


@dataclass
class ClientProgress:
    """How far one client is in its round."""

    client: int
    position: int
    generator: ClientRound
    requests: int = 0
    uploads_in_flight: int = 0
    held: Push | None = None
    """an upload that waits for room in the window"""
    answer: Any = None
    waited_as: str = ""


class Scheduler:
    """Interleaves the client rounds of one rank.

    The clients that can go on take turns by request (with `client_major`: the first one goes on as long as it
    can, as the server wants its requests first). A client that waits, for room in its window or for an
    answer, is suspended; the rank waits only when all its clients do, and that time is entered under what the
    wait was for.

    Args:
        send: hands a request to the transport.
        window: uploads of one client that the server may still have to train on.
        depth_first: `client_major`.
        device: of the clients.
        staged: what is sent passes through host memory, so that it must be there.
    """

    def __init__(
        self,
        send: Send,
        window: int,
        depth_first: bool,
        timeline: Timeline,
        device: torch.device,
        staged: bool = False,
    ):
        self._send = send
        self._window = window
        self._depth_first = depth_first
        self._timeline = timeline
        self._device = device
        self._staged = staged
        self._replies: queue.SimpleQueue[tuple[ClientProgress, Push | Exchange | Align, Any]] = (
            queue.SimpleQueue()
        )
        self._ready: list[tuple[int, int, ClientProgress]] = []
        self._in_flight = 0

    def run(self, rounds: Mapping[int, ClientRound]) -> None:
        """Run these clients' rounds (in this order where they compete) to their end and drain all requests in
        flight.

        Raises:
            Exception: what a client's round, or the transport, raised.
        """
        unfinished = len(rounds)
        for position, (client, generator) in enumerate(rounds.items()):
            self._resume(ClientProgress(client, position, generator), None)
        while unfinished:
            while not self._replies.empty():
                self._settle(*self._replies.get())
            if not self._ready:
                self._wait()
            progress = heapq.heappop(self._ready)[-1]
            try:
                body = progress.generator.send(progress.answer)
            except StopIteration:
                unfinished -= 1
            else:
                self._request(progress, body)
        with self._timeline.phase("forward_backward"):
            synchronise(self._device)
        while self._in_flight:
            with self._timeline.phase("drain_wait"):
                reply = self._replies.get()
            self._settle(*reply)

    def _wait(self) -> None:
        """Wait until some client can go on, and enter the time under what that client waited for."""
        waited, began = 0.0, clock()
        while not self._ready:
            started = clock()
            reply = self._replies.get()
            waited += clock() - started
            self._settle(*reply)
        self._timeline.add(self._ready[0][-1].waited_as, began, waited)

    def _resume(self, progress: ClientProgress, answer: Any) -> None:
        progress.answer = answer
        turn = 0 if self._depth_first else progress.requests
        heapq.heappush(self._ready, (turn, progress.position, progress))

    def _request(self, progress: ClientProgress, body: Push | Exchange | Align) -> None:
        """Send a request, or hold it until there is room in the client's window."""
        progress.waited_as = body.waits_as
        if isinstance(body, Push):
            if progress.uploads_in_flight == self._window:
                progress.held = body
                return
            progress.uploads_in_flight += 1
        request = Request(progress.client, progress.requests, body)
        progress.requests += 1
        self._in_flight += 1
        if self._staged:
            with self._timeline.phase("forward_backward"):
                synchronise(self._device)
        row, arrow = f"client {request.client}", Arrow("request", request.client, request.number)
        # Handing over: serialising, and in the local transport the server's work too.
        with self._timeline.phase(body.waits_as, row, arrow):
            self._send(request, lambda answer: self._replies.put((progress, body, answer)))
        if isinstance(body, Push):
            self._resume(progress, None)

    def _settle(self, progress: ClientProgress, body: Push | Exchange | Align, answer: Any) -> None:
        """Take in the answer to one request."""
        if isinstance(answer, BaseException):
            raise answer
        self._in_flight -= 1
        if not isinstance(body, Push):
            self._resume(progress, answer)
            return
        progress.uploads_in_flight -= 1
        if progress.held is not None:
            held, progress.held = progress.held, None
            self._request(progress, held)
