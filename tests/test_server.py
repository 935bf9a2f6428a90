"""The server: lanes at the same time, one request at a time in each, failures that reach the main thread."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from fslsage_rpc.config.schema import AggregationKeys, AlignmentKeys, OptimizerKeys
from fslsage_rpc.device.streams import WorkQueue
from fslsage_rpc.models.flat import Weights, flatten
from fslsage_rpc.parties.aggregation import Aggregator
from fslsage_rpc.parties.auxiliary_fit import AuxiliaryFit
from fslsage_rpc.parties.context import Context
from fslsage_rpc.parties.lane import Lane
from fslsage_rpc.parties.optimizers import ScheduledOptimizer
from fslsage_rpc.parties.requests import Align, Answer, Exchange, Push, Request
from fslsage_rpc.parties.server import Server
from fslsage_rpc.parties.snapshot import Snapshot

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


def lane_of(model: nn.Module) -> Lane:
    return Lane(model, ScheduledOptimizer(SGD, model.parameters()), "round_robin", Context())


def make_server(
    lanes: dict[int, Lane],
    pool: ThreadPoolExecutor,
    fits: dict[int, AuxiliaryFit] | None = None,
    replicas: Aggregator | None = None,
) -> Server:
    return Server(
        initial=(flatten(nn.Linear(2, 4)), None),
        averaged=nn.Linear(2, 4),
        lanes=lanes,
        fits=fits or {},
        measure_drift=False,
        start=lambda kind, number, work: pool.submit(work),
        context=Context(),
        replicas=replicas,
    )


def exchange(client: int, number: int = 0) -> Request:
    generator = torch.Generator().manual_seed(client)
    return Request(client, number, 0, Exchange(torch.randn(5, 4, generator=generator), torch.arange(5) % 3))


def test_replicas_are_trained_at_the_same_time() -> None:
    barrier = threading.Barrier(2)
    replies: list[Any] = []
    with ThreadPoolExecutor(2) as pool:
        server = make_server({c: lane_of(Meeting(barrier)) for c in (0, 1)}, pool)
        server.announce(0, {0: [0], 1: [0]}, [0, 1])
        for client in (0, 1):  # each forward pass returns only once the other lane is in its own
            server.submit(exchange(client), replies.append)
        server.wait()
    assert len(replies) == 2
    assert not barrier.broken


def test_replicas_are_averaged_by_weight_and_counted() -> None:
    with ThreadPoolExecutor(2) as pool:
        lanes = {c: lane_of(nn.Linear(4, 3)) for c in (0, 1, 2)}
        replicas = Aggregator(AggregationKeys(), {c: lane.weights for c, lane in lanes.items()}, 15)
        server = make_server(lanes, pool, replicas=replicas)
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
        lane = lane_of(model)
        server = make_server({0: lane, 1: lane}, pool)
        server.announce(0, {0: [0, 1, 2]}, [0, 1])
        server.announce(0, {1: [0, 1, 2]}, [0, 1])  # each rank announces its own clients
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
        server = make_server({0: lane_of(Broken(4, 3))}, pool)
        server.announce(0, {0: [0]}, [0])
        server.submit(exchange(0), lambda answer: None)
        with pytest.raises(ZeroDivisionError, match="broken lane"):
            server.wait()


def test_an_upload_is_answered_when_the_device_has_trained_on_it() -> None:
    class Device(WorkQueue):
        """A queue on a device that has not come to its end yet."""

        def __init__(self) -> None:
            super().__init__()
            self.done = threading.Event()

        def end(self) -> Any:
            return self

        def synchronize(self) -> None:
            assert self.done.wait(TIMEOUT)

    device, answers = Device(), []
    model, gone_on = nn.Linear(4, 3), threading.Event()
    optimizer = ScheduledOptimizer(SGD, model.parameters())
    lane = Lane(model, optimizer, "round_robin", Context(queue=device))

    def take(answer: Answer) -> None:
        answers.append(answer)
        gone_on.set()

    with ThreadPoolExecutor(2) as pool:
        server = make_server({0: lane}, pool)
        server.announce(0, {0: [0, 0, 1]}, [0])
        push = Push(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
        server.submit(Request(0, 0, 0, push), take)
        server.submit(exchange(0, number=1), take)  # the lane goes on meanwhile
        server.submit(Request(0, 2, 0, push), take)
        assert gone_on.wait(TIMEOUT)
        assert [answer.value is None for answer in answers] == [False]
        device.done.set()
        server.wait()
    assert [answer.value is None for answer in answers] == [False, True, True]
    assert server.report(1.0).samples == 15


def test_an_answer_that_cannot_be_sent_fails_the_round() -> None:
    def lost(answer: Answer) -> None:
        raise ZeroDivisionError("lost answer")

    with ThreadPoolExecutor(1) as pool:
        server = make_server({0: lane_of(nn.Linear(4, 3))}, pool)
        server.announce(0, {0: [0]}, [0])
        server.submit(exchange(0), lost)
        with pytest.raises(ZeroDivisionError, match="lost answer"):
            server.wait()


def test_auxiliary_models_are_fitted_side_by_side_while_the_lane_goes_on() -> None:
    together = threading.Barrier(3)  # the fits of two clients, and the lane's next step

    class LaneModel(nn.Linear):
        passes = 0

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            self.passes += 1
            if self.passes > 4:  # two uploads, and the targets of two alignments
                together.wait(TIMEOUT)
            return super().forward(z)

    fits, two_passes = {}, AlignmentKeys(epochs=2, buffer_size=8)
    for client in range(2):
        model = Meeting(together)
        optimizer = ScheduledOptimizer(SGD, model.parameters())
        fits[client] = AuxiliaryFit(model, optimizer, two_passes, Context())
    answers: dict[tuple[int, int], Answer] = {}
    with ThreadPoolExecutor(3) as pool:
        lane = lane_of(LaneModel(4, 3))
        server = make_server(dict.fromkeys(range(3), lane), pool, fits)
        server.announce(0, {0: [0, 0], 1: [0, 0], 2: [1, 2]}, [0, 1, 2])
        push = Push(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))

        def submit(client: int, number: int, body: Push | Align) -> None:
            server.submit(
                Request(client, number, 0, body), lambda answer: answers.update({(client, number): answer})
            )

        for client in range(2):
            submit(client, 0, push)
            submit(client, 1, Align())
        for number in range(2):  # each fit passes its model twice
            submit(2, number, push)
        server.wait()
    assert len(answers) == 6
    assert isinstance(answers[0, 1].value, Weights)
    report = server.report(1.0)
    assert report.samples == 20
    assert len(report.alignments) == 2
    assert report.phases["alignment"] > 0


def test_true_gradients_are_of_the_model_at_the_alignments_turn_whenever_they_are_computed() -> None:
    def weights(fits_wait: bool, snapshot: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
        lane, fits, waiting = lane_of(model), {}, []
        lane.snapshot = Snapshot(model, torch.device("cpu")) if snapshot else None
        for client in range(3):
            auxiliary = nn.Linear(4, 3)
            optimizer = ScheduledOptimizer(SGD, auxiliary.parameters())
            keys = AlignmentKeys(epochs=3, buffer_size=8)
            fits[client] = AuxiliaryFit(auxiliary, optimizer, keys, Context())
        with ThreadPoolExecutor(1) as pool:
            server = make_server(dict.fromkeys(range(3), lane), pool, fits)
            server._crew._start = lambda kind, number, work: (
                waiting.append(work) if kind == "fit" and fits_wait else work()
            )
            for round in range(2):
                server.announce(round, {client: [0, 0] for client in range(3)}, [0, 1, 2])
                for client in range(3):
                    push = Push(torch.randn(5, 4), torch.randint(3, (5,)))
                    server.submit(Request(client, 0, 0, push), lambda answer: None)
                    server.submit(Request(client, 1, 0, Align()), lambda answer: None)
                assert len(waiting) == 3 * fits_wait  # the lane has not waited for the fits
                while waiting:
                    waiting.pop()()
                server.wait()
        return [lane.weights.floats, *(fit.weights.floats for fit in fits.values())]

    expected = weights(fits_wait=False, snapshot=False)
    for fits_wait, snapshot in ((False, True), (True, True), (True, False)):
        assert all(map(torch.equal, weights(fits_wait, snapshot), expected))
