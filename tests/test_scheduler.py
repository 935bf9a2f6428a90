"""The scheduler suspends the client that waits, never its rank, and measures the waits."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fslsage_rpc.measure.timeline import Timeline
from fslsage_rpc.parties.context import Context
from fslsage_rpc.parties.requests import Align, BeginStep, ClientRound, Exchange, Push, Request
from fslsage_rpc.parties.scheduler import Scheduler
from fslsage_rpc.parties.turns import MOST_OPEN_STEPS

Answer = Callable[[Callable[[], Any]], None]
CPU = torch.device("cpu")


def push() -> Push:
    return Push(torch.zeros(1), torch.zeros(1))


def exchange() -> Exchange:
    return Exchange(torch.zeros(1), torch.zeros(1))


def uploads(steps: int) -> ClientRound:
    """A client that uploads at every step."""
    for step in range(steps):
        yield BeginStep(step)
        yield push()


class FakeServer:
    """Keeps requests until they are answered by hand."""

    def __init__(self) -> None:
        self.pending: list[tuple[Request, Answer]] = []
        self.log: list[tuple[int, int]] = []
        self.most_uploads = 0
        self.most_pending = 0

    def send(self, request: Request, on_answer: Answer) -> None:
        self.log.append((request.client, request.number))
        self.pending.append((request, on_answer))
        mine = [r for r, _ in self.pending if r.client == request.client and isinstance(r.body, Push)]
        self.most_uploads = max(self.most_uploads, len(mine))
        self.most_pending = max(self.most_pending, len(self.pending))

    def answer_all_soon(self, stop: threading.Event, seconds: float) -> None:
        while not stop.wait(seconds):
            if self.pending:
                request, on_answer = self.pending.pop(0)
                value = None if isinstance(request.body, Push) else f"answer {request.number}"
                on_answer(lambda value=value: value)  # type: ignore[misc]  # mypy infers no lambda's default


def run(
    rounds: dict[int, ClientRound],
    window: int = 2,
    depth_first: bool = False,
    seconds: float = 0.005,
) -> tuple[FakeServer, Timeline]:
    server, timeline, stop = FakeServer(), Timeline(), threading.Event()
    thread = threading.Thread(target=server.answer_all_soon, args=(stop, seconds))
    thread.start()
    try:
        Scheduler(server.send, window, depth_first, Context(CPU, timeline)).run(rounds)
    finally:
        stop.set()
        thread.join()
    assert not server.pending  # drained
    return server, timeline


def test_the_window_bounds_the_uploads_in_flight_of_each_client() -> None:
    server, timeline = run({0: uploads(8), 1: uploads(8)}, window=3)
    assert server.most_uploads == 3
    assert [number for c, number in server.log if c == 0] == list(range(8))
    assert timeline.seconds["upload_wait"] > 0
    assert timeline.seconds["drain_wait"] > 0


def test_a_full_window_suspends_that_client_and_not_its_rank() -> None:
    seen: list[str] = []

    def uploader() -> ClientRound:
        for step in range(2):
            yield BeginStep(step)
            yield push()
            seen.append("uploaded")

    def worker() -> ClientRound:
        yield BeginStep(1)
        seen.append("worked")
        yield push()

    run({0: uploader(), 1: worker()}, window=1, seconds=0.1)
    assert seen == ["uploaded", "worked", "uploaded"]


def test_an_upload_does_not_interrupt_its_step() -> None:
    seen: list[int] = []

    def client(client_id: int) -> ClientRound:
        yield BeginStep(0)
        yield push()
        seen.append(client_id)  # before anybody else begins: its activations are free

    server, _ = run({id: client(id) for id in range(3)}, seconds=0.05)
    assert seen == [0, 1, 2]
    assert [client for client, _ in server.log] == [0, 1, 2]


@pytest.mark.parametrize("kind", [push, exchange])
def test_a_rank_has_so_many_steps_open_however_many_clients(kind: Callable[[], Any]) -> None:
    def client() -> ClientRound:
        for step in range(2):
            yield BeginStep(step)
            yield kind()

    clients = 3 * MOST_OPEN_STEPS
    server, _ = run({id: client() for id in range(clients)}, seconds=0.001)
    assert server.most_pending == MOST_OPEN_STEPS
    assert sorted(server.log) == [(id, number) for id in range(clients) for number in range(2)]


def test_the_earliest_step_is_let_in_first_whoever_has_made_more_requests() -> None:
    """Client 0 makes two requests at its first step, and its second step is still due before client 1's."""

    def client(client_id: int) -> ClientRound:
        for step in range(2):
            yield BeginStep(step)
            yield push()
            if client_id == 0 and step == 0:
                yield Align()

    server, _ = run({0: client(0), 1: client(1)}, window=5, seconds=0.05)
    assert server.log == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2)]  # 0 waits for its answer, 1 goes on
    server, _ = run({id: client(id) for id in (0, 1)}, window=5, seconds=1e-6, depth_first=True)
    assert [entry for entry in server.log if entry[0] == 0] == [(0, 0), (0, 1), (0, 2)]


def test_answers_reach_the_client_that_asked() -> None:
    answers: dict[int, list[Any]] = {0: [], 1: []}

    def client(client_id: int) -> ClientRound:
        yield BeginStep(0)
        answers[client_id].append((yield exchange()))
        answers[client_id].append((yield Align()))

    _, timeline = run({0: client(0), 1: client(1)})
    assert answers == {0: ["answer 0", "answer 1"], 1: ["answer 0", "answer 1"]}
    assert timeline.seconds["gradient_wait"] > 0
    assert timeline.seconds["alignment_wait"] > 0


def test_an_answer_stays_when_an_uploads_own_comes_after_it() -> None:
    """The transport does not keep the order of answers."""
    answers: list[Any] = []
    uploads: list[Answer] = []

    def send(request: Request, on_answer: Answer) -> None:
        if isinstance(request.body, Push):
            uploads.append(on_answer)
            return
        on_answer(lambda: "fitted")
        uploads.pop()(lambda: None)

    def client() -> ClientRound:
        yield BeginStep(0)
        yield push()
        answers.append((yield Align()))

    Scheduler(send, 1, False, Context(CPU)).run({0: client()})
    assert answers == ["fitted"]


@pytest.mark.nightly
def test_a_wait_of_one_client_is_another_ones_time_to_compute() -> None:
    """Four clients share a rank that always has one to go on with: waiting is measured only at the end."""

    def client(client_id: int) -> ClientRound:
        for step in range(5):
            yield BeginStep(step)
            time.sleep(0.02)  # stands for computation
            yield exchange()

    _, timeline = run({id: client(id) for id in range(4)}, seconds=0.001)
    waited = timeline.seconds.get("gradient_wait", 0.0)
    assert waited < 0.5 * 20 * 0.02  # one after the other it would be a wait for each of the 20 requests


@pytest.mark.parametrize(
    ("depth_first", "expected"), [(False, [0, 1, 0, 1, 0, 1]), (True, [0, 0, 0, 1, 1, 1])]
)
def test_clients_take_turns_by_step_or_one_goes_ahead(depth_first: bool, expected: list[int]) -> None:
    server, _ = run({0: uploads(3), 1: uploads(3)}, window=5, depth_first=depth_first)
    assert [client for client, _ in server.log] == expected


def test_an_error_from_the_transport_ends_the_run() -> None:
    def client() -> ClientRound:
        yield BeginStep(0)
        yield exchange()

    def lost() -> None:
        raise ValueError("lost")

    with pytest.raises(ValueError, match="lost"):
        Scheduler(lambda _, on_answer: on_answer(lost), 1, False, Context(CPU)).run({0: client()})


def test_an_answer_is_taken_by_the_thread_that_computes() -> None:
    """Whoever brings it may not touch the streams of a GPU that this thread may be capturing on."""
    brought: list[threading.Thread] = []
    taken: list[threading.Thread] = []

    def take() -> str:
        taken.append(threading.current_thread())
        return "gradient"

    def send(request: Request, on_answer: Answer) -> None:
        brought.append(threading.Thread(target=on_answer, args=[take]))
        brought[-1].start()

    def client() -> ClientRound:
        yield BeginStep(0)
        yield push()
        assert (yield exchange()) == "gradient"

    timeline = Timeline()
    Scheduler(send, 1, False, Context(CPU, timeline)).run({0: client()})
    assert taken == [threading.current_thread()] * 2
    assert timeline.seconds["gradient_wait"] > 0


def test_phases_do_not_nest() -> None:
    timeline = Timeline()
    with pytest.raises(RuntimeError, match="inside"), timeline.phase("outer"), timeline.phase("inner"):
        pass
    with timeline.phase("next"):
        pass
    assert set(timeline.take()) == {"outer", "next"}
    assert timeline.take() == {}


def test_a_pause_in_a_phase_costs_no_cpu_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fslsage_rpc.measure.timeline.cpu_clock", iter([1.0, 3.0, 7.0, 15.0]).__next__)
    timeline = Timeline()
    with timeline.phase("alignment"), timeline.paused():
        assert timeline.take_cpu_seconds() == {"alignment": 2.0}
        assert timeline.open_phase == "alignment"
    assert timeline.take_cpu_seconds() == {"alignment": 8.0}
