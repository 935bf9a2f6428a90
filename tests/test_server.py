"""The server: lanes at the same time, one request at a time in each, failures that reach the main thread."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from fslsage_rpc.config import OptimizerKeys
from fslsage_rpc.measure.timeline import Timeline
from fslsage_rpc.models.flat import flatten
from fslsage_rpc.parties.optimizers import ScheduledOptimizer
from fslsage_rpc.parties.requests import Exchange, Request
from fslsage_rpc.parties.server import Lane, Server

TIMEOUT = 20
SGD = OptimizerKeys(name="sgd", lr=0.1)


class Meeting(nn.Module):
    """A model whose forward pass waits until so many lanes are inside theirs."""

    def __init__(self, barrier: threading.Barrier):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.barrier = barrier

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        self.barrier.wait(TIMEOUT)
        return self.linear(z)


def make_server(models: dict[int, nn.Module], pool: ThreadPoolExecutor) -> Server:
    lanes = {
        c: Lane(m, ScheduledOptimizer(SGD, m.parameters()), "round_robin", Timeline())
        for c, m in models.items()
    }
    averaged = nn.Linear(2, 4)
    initial = flatten(nn.Linear(2, 4))
    return Server((initial, None), averaged, lanes, {}, False, torch.device("cpu"), pool.submit, Timeline())


def exchange(client: int, number: int = 0) -> Request:
    generator = torch.Generator().manual_seed(client)
    return Request(client, number, Exchange(torch.randn(5, 4, generator=generator), torch.arange(5) % 3))


def test_replicas_are_trained_at_the_same_time() -> None:
    barrier = threading.Barrier(2)
    replies: list[Any] = []
    with ThreadPoolExecutor(2) as pool:
        server = make_server({c: Meeting(barrier) for c in (0, 1)}, pool)
        server.announce({0: [0], 1: [0]}, [0, 1])
        for client in (0, 1):  # each forward pass returns only once the other lane is in its own
            server.submit(exchange(client), replies.append)
        server.wait()
    assert len(replies) == 2
    assert not barrier.broken


def test_replicas_are_averaged_by_weight_and_counted() -> None:
    with ThreadPoolExecutor(2) as pool:
        server = make_server({c: nn.Linear(4, 3) for c in (0, 1, 2)}, pool)
        before = [lane.weights.floats.clone() for lane in server.lanes.values()]
        server.average(
            {0: 0.25, 1: 0.75}, auxiliaries=False
        )  # client 2 was absent, and goes on from the mean too
        for lane in server.lanes.values():
            assert torch.allclose(lane.weights.floats, 0.25 * before[0] + 0.75 * before[1])
        report = server.report(round_seconds=1.0)
    assert report.samples == 0
    assert report.phases["averaging"] > 0
    assert sum(report.phases.values()) == pytest.approx(1.0)


def test_a_lane_takes_one_request_at_a_time_in_order() -> None:
    lock, order = threading.Lock(), []

    class Alone(nn.Linear):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            assert lock.acquire(blocking=False), "two requests in one lane"
            try:
                return super().forward(z)
            finally:
                lock.release()

    with ThreadPoolExecutor(4) as pool:
        model = Alone(4, 3)
        lane = Lane(model, ScheduledOptimizer(SGD, model.parameters()), "round_robin", Timeline())
        server = make_server({}, pool)
        server = Server(
            server.initial,
            nn.Linear(2, 4),
            {0: lane, 1: lane},
            {},
            False,
            torch.device("cpu"),
            pool.submit,
            Timeline(),
        )
        server.announce({0: [0, 1, 2]}, [0, 1])
        server.announce({1: [0, 1, 2]}, [0, 1])  # each rank announces its own clients
        for number in (2, 1, 0):
            for client in (1, 0):
                turn = (number, client)
                server.submit(exchange(client, number), lambda _, turn=turn: order.append(turn))
        server.wait()
    assert order == [(n, c) for n in range(3) for c in range(2)]
    assert server.report(1.0).samples == 30


def test_a_request_that_fails_reaches_whoever_waits_for_the_round() -> None:
    class Broken(nn.Linear):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            raise ZeroDivisionError("broken lane")

    with ThreadPoolExecutor(1) as pool:
        server = make_server({0: Broken(4, 3)}, pool)
        server.announce({0: [0]}, [0])
        server.submit(exchange(0), lambda answer: None)
        with pytest.raises(ZeroDivisionError, match="broken lane"):
            server.wait()
