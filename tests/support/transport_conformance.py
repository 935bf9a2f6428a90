"""Everything that a transport must do, as checks of an open one: each is called by all ranks alike.

`CHECKS` has them all. They leave the transport open, and may be made in any order, of any number of ranks.
Two more are for transports between processes: `assert_errors_after_the_servers_death` and
`assert_errors_after_a_clients_death`.
"""

import os
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from fslsage_rpc.device.clock import synchronise
from fslsage_rpc.errors import ConnectionLost
from fslsage_rpc.measure.request_times import RequestLog
from fslsage_rpc.models.flat import Weights
from fslsage_rpc.parties.context import Context
from fslsage_rpc.parties.requests import Align, Answer, BeginStep, Body, Exchange, Push, Request
from fslsage_rpc.parties.scheduler import Scheduler
from fslsage_rpc.transport.base import Transport
from fslsage_rpc.transport.endpoint import ServerEndpoint
from fslsage_rpc.transport.link import ServerLink
from fslsage_rpc.transport.local import LocalTransport
from fslsage_rpc.transport.wire_ledger import RANK, WIRE_KINDS, WireLedger, ring_share

LIMIT_SECONDS = 60
SOON_SECONDS = 20
"""within which a death is noticed"""
WINDOW = 2


class Endpoint(ServerEndpoint):
    """Doubles what it gets, and answers later, in another order; where it holds, when it is told to.

    It counts requests by client and number, and by client those that have yet to be answered.
    """

    def __init__(self, device: torch.device, holds: bool = False):
        self.device = device
        self._holds = holds
        self._held: list[Callable[[], None]] = []
        self._chance = random.Random(0)
        self._lock = threading.Lock()
        self._came: Counter[tuple[int, int]] = Counter()
        self._open: Counter[int] = Counter()
        self._most_open = 0
        self.arrived = 0

    def submit(self, request: Request, reply: Callable[[Answer], None]) -> None:
        body, value = request.body, None
        if isinstance(body, Push | Exchange):
            if body.z.sum() < 0:
                raise ValueError("the server takes nothing below zero")
            assert torch.equal(body.z.cpu(), smashed(request)), request
            assert torch.equal(body.y.cpu(), torch.arange(len(body.z))), request
        if isinstance(body, Exchange):
            value = 2 * body.z.to(self.device)
        elif isinstance(body, Align):
            value = weights(10.0 * request.client + request.number).to(self.device)
        synchronise(self.device)
        with self._lock:
            self._came[request.client, request.number] += 1
            self._open[request.client] += 1
            self._most_open = max(self._most_open, *self._open.values())

        def answer() -> None:
            with self._lock:
                self._open[request.client] -= 1
            reply(Answer(value, 0.0, 0.0))

        if self._holds:
            self._held.append(answer)
        else:
            threading.Timer(self._chance.uniform(0.0, 0.02), answer).start()

    def release(self) -> None:
        self._holds, held = False, self._held
        for answer in held:
            answer()

    def came(self) -> dict[tuple[int, int], int]:
        return dict(self._came)

    def most_open(self) -> int:
        return self._most_open

    def doubled(self, value: Any) -> Any:
        if isinstance(value, Weights):
            return weights(2 * float(value.floats[0]))
        return 2 * value if value is not None else None

    def arrive(self) -> None:
        with self._lock:
            self.arrived += 1

    def how_many_arrived(self) -> int:
        return self.arrived

    def refuse(self) -> None:
        raise ValueError("the server refuses")

    def die(self) -> None:
        os._exit(0)

    def initial(self) -> tuple[Weights, Weights | None]:
        return weights(1.0), weights(2.0)

    def deposit_average(self, weights: Weights) -> None:
        assert float(weights.floats[0]) == 3.0

    def deposit_auxiliary(self, weights: Weights) -> None:
        assert float(weights.floats[0]) == 4.0


def weights(first: float) -> Weights:
    return Weights(torch.tensor([first, first + 1]), torch.tensor([int(first)]))


def smashed(request: Request) -> Tensor:
    """By client and number: z `[2, 3]`."""
    return torch.full((2, 3), 100.0 * request.client + request.number)


def upload(kind: type[Push | Exchange], request: Request, device: torch.device) -> Request:
    request.body = kind(smashed(request).to(device), torch.arange(2, device=device))
    return request


class Answers:
    """A client rank's answers, as they come."""

    def __init__(self, transport: Transport):
        self._transport = transport
        self._came: queue.Queue[tuple[int, Callable[[], Answer]]] = queue.Queue()

    def ask(self, request: Request) -> None:
        number = request.number
        self._transport.submit(request, lambda take, there: self._came.put((number, take)))

    def none(self) -> bool:
        return self._came.empty()

    def take(self) -> tuple[int, Any]:
        """The number of a request, and the value of its answer."""
        number, take = self._came.get(timeout=LIMIT_SECONDS)
        return number, take().value

    def ask_and_take(self, request: Request) -> Any:
        self.ask(request)
        return self.take()


def served(transport: Transport, holds: bool = False) -> Endpoint | None:
    """Collective: a new endpoint; on rank 0, which has it."""
    endpoint = None if transport.rank else Endpoint(transport.device, holds)
    transport.serve(endpoint)
    return endpoint


def requests_arrive_once_and_answers_are_their_own(transport: Transport) -> None:
    endpoint, client, device = served(transport), transport.client_rank, transport.device
    if client is not None:
        answers = Answers(transport)
        kinds: list[type[Push | Exchange] | None] = [Push, Exchange, None] * 5
        for number, kind in enumerate(kinds):
            request = Request(client, number, 0, Align())
            answers.ask(request if kind is None else upload(kind, request, device))
        values = dict(answers.take() for _ in kinds)
        assert values.keys() == set(range(len(kinds)))
        for number, kind in enumerate(kinds):
            value, request = values[number], Request(client, number, 0, Align())
            if kind is Push:
                assert value is None
            elif kind is Exchange:
                assert value.device == device
                assert torch.equal(value.cpu(), 2 * smashed(request))
            else:
                assert value.floats.device == device
                assert torch.equal(value.floats.cpu(), weights(10.0 * client + number).floats)
                assert value.integers.tolist() == [10 * client + number]
    transport.barrier()
    if endpoint:
        expected = {(client, number): 1 for client in range(transport.client_ranks) for number in range(15)}
        assert endpoint.came() == expected


def uploads_wait_for_no_answer(transport: Transport) -> None:
    served(transport, holds=True)
    if transport.client_rank is not None:
        answers = Answers(transport)
        for number in range(3):
            answers.ask(upload(Push, Request(transport.client_rank, number, 0, Align()), transport.device))
        assert answers.none()
    transport.barrier()
    if transport.client_rank is not None:
        while sum(transport.call("came").values()) < 3 * transport.client_ranks:
            time.sleep(0.01)
    transport.barrier()
    if transport.client_rank == 0:
        transport.call("release")
    if transport.client_rank is not None:
        assert sorted(answers.take() for _ in range(3)) == [(0, None), (1, None), (2, None)]
    transport.barrier()


def calls_return_their_own_answers(transport: Transport) -> None:
    served(transport)
    if transport.client_rank is not None:
        for number in range(10):
            mine = 100 * transport.client_rank + number
            assert transport.call("doubled", mine) == 2 * mine
        z = torch.full((3,), float(transport.client_rank), device=transport.device)
        assert torch.equal(transport.call("doubled", z).cpu(), 2 * z.cpu())
        there = transport.call("doubled", weights(3.0).to(transport.device))
        assert (there.floats.tolist(), there.integers.tolist()) == ([6.0, 7.0], [6])
        assert transport.call("doubled", None) is None
        transport.echo(torch.zeros(5, dtype=torch.uint8, device=transport.carrier), 7)
    transport.barrier()


def calls_go_to_the_endpoint_that_is_served(transport: Transport) -> None:
    for _ in range(2):
        served(transport)
        if transport.client_rank is not None:
            transport.call("arrive")
        transport.barrier()
        if transport.client_rank is not None:
            assert transport.call("how_many_arrived") == transport.client_ranks
        transport.barrier()


def errors_of_the_server_reach_the_caller(transport: Transport) -> None:
    served(transport)
    if transport.client_rank is not None:
        with pytest.raises(ValueError, match="the server refuses"):
            transport.call("refuse")
        answers = Answers(transport)
        body = Push(-torch.ones(1, 3, device=transport.device), torch.arange(1, device=transport.device))
        with pytest.raises(ValueError, match="nothing below zero"):
            answers.ask_and_take(Request(transport.client_rank, 0, 0, body))
        assert transport.call("doubled", 3) == 6
    transport.barrier()


def windows_are_kept(transport: Transport) -> None:
    """By the scheduler, on what the transport tells it."""
    served(transport)
    if transport.client_rank is not None:
        link = ServerLink(transport, WireLedger(), RequestLog())
        scheduler = Scheduler(link.send, WINDOW, False, Context(transport.device), transport.staged)
        clients = [transport.client_rank, transport.client_ranks + transport.client_rank]

        def steps(client: int) -> Iterator[BeginStep | Body]:
            for step in range(8):
                yield BeginStep(step)
                yield upload(Push, Request(client, step, step, Align()), transport.device).body

        rounds: Mapping[int, Any] = {client: steps(client) for client in clients}
        scheduler.run(rounds)
    transport.barrier()
    if transport.client_rank is not None:
        assert transport.call("most_open") == WINDOW
        assert set(transport.call("came").values()) == {1}
        assert len(transport.call("came")) == 2 * 8 * transport.client_ranks
    transport.barrier()


def bytes_are_those_of_the_tensors(transport: Transport) -> None:
    """By kind and client."""
    served(transport)
    client, device = transport.client_rank, transport.device
    if client is not None:
        ledger = WireLedger()
        link = ServerLink(transport, ledger, RequestLog())
        link.initial_weights(client)
        answers: queue.Queue[Callable[[], Any]] = queue.Queue()
        bodies = [Push, Exchange, None]
        for number, kind in enumerate(bodies):
            request = Request(client, number, 0, Align())
            link.send(upload(kind, request, device) if kind else request, answers.put)
        for _ in bodies:
            answers.get(timeout=LIMIT_SECONDS)()
        link.deposit_average(weights(3.0).to(device))
        link.deposit_auxiliary(weights(4.0).to(device))
        z, y, model = 2 * 3 * 4, 2 * 8, 2 * 4 + 8
        none = dict.fromkeys(WIRE_KINDS, 0)
        mine = {"smashed_up": 2 * z, "labels_up": 2 * y, "gradient_down": z, "auxiliary_down": model}
        assert ledger.take() == {
            client: none | mine | {"initial_broadcast": 2 * model},
            RANK: none | {"evaluation": model, "weights_allreduce": model},
        }
    transport.barrier()


def values_are_gathered_and_broadcast(transport: Transport) -> None:
    rank, size = transport.rank, transport.size
    for _ in range(3):
        gathered = transport.gather({"rank": rank})
        assert gathered == (None if rank else [{"rank": each} for each in range(size)])
        assert transport.broadcast(("from", rank)) == ("from", 0)


def barriers_wait_for_all(transport: Transport) -> None:
    served(transport)
    for turn, barrier in enumerate((transport.barrier, transport.client_barrier)):
        if transport.client_rank is not None:
            time.sleep(0.05 * transport.client_rank)
            transport.call("arrive")
            barrier()
            assert transport.call("how_many_arrived") >= (turn + 1) * transport.client_ranks
        elif turn == 0:
            barrier()
        transport.barrier()


def all_reduce_sums_and_takes_the_maximum(transport: Transport) -> None:
    mine, ranks = transport.client_rank, transport.client_ranks
    if mine is not None:
        floats = torch.arange(1000, dtype=torch.float64, device=transport.device) / 7 + mine
        summed = Weights(floats.clone(), torch.tensor([mine, -mine], device=transport.device))
        synchronise(transport.device)
        sent = transport.all_reduce(summed)
        others = sum(range(ranks))
        torch.testing.assert_close(summed.floats.cpu(), ranks * (floats.cpu() - mine) + others)
        assert summed.integers.tolist() == [ranks - 1, 0]
        assert sent == ring_share(summed.nbytes, ranks, mine)
        empty = Weights(floats[:1].clone(), torch.zeros(0, dtype=torch.int64, device=transport.device))
        transport.all_reduce(empty)
        assert empty.integers.numel() == 0
        bits = summed.floats.cpu().numpy().tobytes()
    gathered = transport.gather(None if mine is None else bits)
    assert gathered is None or len(set(gathered) - {None}) == 1


def ranks_are_numbered(transport: Transport) -> None:
    numbers = transport.broadcast(transport.gather((transport.rank, transport.client_rank)))
    clients = [0] if transport.size == 1 else [None, *range(transport.size - 1)]
    assert numbers == list(enumerate(clients))
    assert transport.describe().keys() == LocalTransport(transport.device).describe().keys()


CHECKS: list[Callable[[Transport], None]] = [
    ranks_are_numbered,
    requests_arrive_once_and_answers_are_their_own,
    uploads_wait_for_no_answer,
    calls_return_their_own_answers,
    calls_go_to_the_endpoint_that_is_served,
    errors_of_the_server_reach_the_caller,
    windows_are_kept,
    bytes_are_those_of_the_tensors,
    values_are_gathered_and_broadcast,
    barriers_wait_for_all,
    all_reduce_sums_and_takes_the_maximum,
]


def raises_soon(work: Callable[[], Any]) -> None:
    began = time.monotonic()
    with pytest.raises(ConnectionLost):
        work()
    assert time.monotonic() - began < SOON_SECONDS


def assert_errors_after_the_servers_death(transport: Transport) -> None:
    """Kill rank 0 of at least three: a request under way fails, and so does all that follows."""
    served(transport, holds=True)
    answers = Answers(transport)
    if transport.rank:
        answers.ask(upload(Push, Request(transport.rank - 1, 0, 0, Align()), transport.device))
    transport.barrier()
    if transport.rank == 0:
        os._exit(0)
    raises_soon(answers.take)
    raises_soon(lambda: transport.call("doubled", 1))
    again = upload(Push, Request(transport.rank - 1, 1, 0, Align()), transport.device)
    raises_soon(lambda: answers.ask_and_take(again))
    raises_soon(transport.barrier)
    transport.abandon()


def assert_errors_after_a_clients_death(transport: Transport) -> None:
    """Kill the last of at least three: collectives fail, and calls of those that are left go on."""
    endpoint = served(transport)
    transport.barrier()
    if transport.rank == transport.size - 1:
        os._exit(0)
    if transport.rank:
        raises_soon(lambda: transport.all_reduce(weights(1.0)))
        raises_soon(transport.client_barrier)
        assert transport.call("doubled", 1) == 2
        transport.call("arrive")
    else:
        raises_soon(lambda: transport.gather(None))
    while endpoint and endpoint.arrived < transport.client_ranks - 1:
        time.sleep(0.01)
    transport.abandon()
