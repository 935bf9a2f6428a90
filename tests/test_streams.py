"""What is asked of CUDA's streams and events, told to stand-ins: so much can be checked without a GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from fslsage_rpc.comm import world
from fslsage_rpc.comm.ledger import WireLedger
from fslsage_rpc.comm.local import LocalLink
from fslsage_rpc.comm.world import open_device
from fslsage_rpc.config import Alignment, OptimizerKeys
from fslsage_rpc.configuration import from_tree
from fslsage_rpc.measure.requests import RequestLog, RequestTimes, on_device
from fslsage_rpc.measure.timeline import Timeline
from fslsage_rpc.models.flat import flatten
from fslsage_rpc.parties.alignment import AlignmentBuffer, AuxiliaryFit
from fslsage_rpc.parties.lane import Lane
from fslsage_rpc.parties.optimizers import ScheduledOptimizer
from fslsage_rpc.parties.requests import Align, Exchange, Push, Request
from fslsage_rpc.parties.server import Server
from fslsage_rpc.parties.streams import PRIORITY, WorkQueue, can_capture, current_place

GPU = torch.device("cuda", 0)
Start = Callable[[str, int, Callable[[], None]], Any]


def at_once(kind: str, number: int, work: Callable[[], None]) -> None:
    work()


class Cuda:
    """Streams that write down what they are asked, and the one that is current."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.current = Stream("default", self)
        self.made = 0
        self.milliseconds = 0.0

    def stream(self, device: torch.device, priority: int = 0) -> "Stream":
        assert priority == PRIORITY  # torch's own calls take others
        self.made += 1
        return Stream(f"stream {self.made}", self)

    @contextmanager
    def use(self, stream: "Stream") -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


class Event:
    """A place in a stream; as a clock it reads 2 ms more each time."""

    def __init__(self, stream: "Stream", cuda: Cuda):
        self.stream, self._cuda = stream.name, cuda
        cuda.milliseconds += 2.0
        self.reading = cuda.milliseconds

    def synchronize(self) -> None:
        self._cuda.asked.append(f"host waits for {self.stream}")

    def elapsed_time(self, end: "Event") -> float:
        return end.reading - self.reading


class Stream:
    def __init__(self, name: str, cuda: Cuda):
        self.name, self._cuda = name, cuda

    def record_event(self, event: object = None) -> Event:
        return Event(self, self._cuda)

    def wait_event(self, event: Event) -> None:
        self._cuda.asked.append(f"{self.name} waits for {event.stream}")

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())


class OnGpu:
    """A tensor of which only this is asked."""

    is_cuda = True

    def __init__(self) -> None:
        self.kept_for: list[str] = []

    def record_stream(self, stream: Stream) -> None:
        self.kept_for.append(stream.name)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    cuda = Cuda()
    monkeypatch.setattr(torch.cuda, "Stream", cuda.stream)
    monkeypatch.setattr(torch.cuda, "Event", lambda **how: how)
    monkeypatch.setattr(torch.cuda, "stream", cuda.use)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: cuda.current)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return cuda


def test_a_queue_of_its_own_starts_behind_what_was_queued_before(cuda: Cuda) -> None:
    WorkQueue.beside_others(GPU)
    assert cuda.asked == ["stream 1 waits for default"]


def test_graphs_need_a_priority_that_nobody_else_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        highest = -3

        def priority_range(self) -> tuple[int, int]:
            return 0, self.highest

    stream = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    assert can_capture(GPU)
    assert not can_capture(torch.device("cpu"))
    stream.highest = PRIORITY
    assert not can_capture(GPU)


def test_work_goes_to_the_queue_and_waits_for_its_place_elsewhere(cuda: Cuda) -> None:
    lane, fit = WorkQueue.beside_others(GPU), WorkQueue.beside_others(GPU)
    cuda.asked.clear()
    request, target, at_home = OnGpu(), OnGpu(), torch.ones(1)
    with lane.after(current_place(GPU)):
        assert cuda.current.name == "stream 1"
        lane.keep(request, at_home)  # type: ignore[arg-type]
        behind_targets = current_place(GPU)
    assert cuda.current.name == "default"
    with fit.after(behind_targets):
        fit.keep(target)  # type: ignore[arg-type]
    assert cuda.asked == [
        "stream 1 waits for default",
        "stream 2 waits for stream 1",
    ]
    assert (request.kept_for, target.kept_for) == (["stream 1"], ["stream 2"])
    end: Any = lane.end()
    assert end.stream == "stream 1"


def test_a_queue_without_a_stream_leaves_work_where_the_caller_is(cuda: Cuda) -> None:
    queue = WorkQueue()
    with queue.after(current_place(GPU)):
        assert cuda.current.name == "default"
    queue.keep(OnGpu())  # type: ignore[arg-type]
    assert queue.end() is None
    assert cuda.asked == []


def test_device_seconds_are_those_between_the_events_of_each_phase_but_waits(cuda: Cuda) -> None:
    timeline = Timeline(device=GPU)
    for name in ("step", "upload_wait", "step", "drift"):
        with timeline.phase(name):
            pass
    assert timeline.take_device_seconds() == pytest.approx({"step": 0.004, "drift": 0.002})
    assert timeline.take_device_seconds() == {}
    assert timeline.take().keys() == {"step", "upload_wait", "drift"}


class ThereAlready:
    """Of a request whose tensors a stand-in for a GPU needs not move."""

    def to(self, device: torch.device) -> Any:
        return self


class ExchangeThere(ThereAlready, Exchange):
    pass


class PushThere(ThereAlready, Push):
    pass


def server_on(
    device: torch.device, queue: Callable[[], WorkQueue] = WorkQueue, start: Start = at_once
) -> Server:
    """One client, whose auxiliary model is aligned; every phase of the device takes 2 ms of the stand-in."""
    server_model, auxiliary = nn.Linear(4, 3), nn.Linear(4, 3)
    keys = OptimizerKeys(name="sgd", lr=0.1)

    def optimizer(model: nn.Module) -> ScheduledOptimizer:
        return ScheduledOptimizer(keys, model.parameters())

    timeline = Timeline(device=device)
    fit = AuxiliaryFit(
        auxiliary,
        flatten(auxiliary),
        optimizer(auxiliary),
        AlignmentBuffer(8),
        Alignment(epochs=2),
        Timeline(device=device),
        queue(),
    )
    return Server(
        initial=(flatten(nn.Linear(2, 4)), None),
        averaged=nn.Linear(2, 4),
        lanes={0: Lane(server_model, optimizer(server_model), "arrival", timeline, queue())},
        fits={0: fit},
        measure_drift=False,
        device=device,
        start=start,
        timeline=Timeline(device=device),
    )


def test_requests_on_a_gpu_are_timed_by_its_clock(cuda: Cuda) -> None:
    """Each reading of the stand-in's clock is 2 ms after the one before."""
    server, log = server_on(GPU), RequestLog()
    link = LocalLink(server, WireLedger(), log, GPU)
    link.announce(0, {0: [0, 0, 0, 1]}, [0])
    z, y = torch.randn(5, 4), torch.arange(5) % 3
    bodies = [PushThere(z, y), ExchangeThere(z, y), Align(), ExchangeThere(z, y)]
    for number, body in enumerate(bodies):
        link.send(Request(0, number, body), lambda take: take())
    server.wait()
    told, report = log.take(), server.report(1.0)
    on_device(told, report.requests)
    # sent, came, begun, the phase of the lane, done, there
    for kind, count in (("push", 1), ("exchange", 2)):
        times = told[0][kind]
        assert times.count == count
        assert times.round_trip_seconds == pytest.approx(count * 0.012)
        assert times.queue_seconds == pytest.approx(count * 0.002)
        assert times.compute_seconds == pytest.approx(count * 0.006)
        assert times.wire_seconds == pytest.approx(count * 0.004)
    # sent, came, begun, the targets, done; begun, the fit, done, there
    times = told[0]["align"]
    assert times.round_trip_seconds == pytest.approx(0.020)
    assert times.queue_seconds == pytest.approx(0.004)
    assert times.compute_seconds == pytest.approx(0.012)
    assert report.device_seconds == pytest.approx(
        {"step": 0.006, "targets": 0.002, "drift": 0.0, "alignment": 0.002}
    )
    assert log.take() == server.report(1.0).requests == {}


def test_pushes_and_alignments_are_answered_when_the_device_is_through_with_them(cuda: Cuda) -> None:
    """Sooner, the caller's stream would wait for the whole fit; an exchange's answer is sent behind it."""
    pieces: list[tuple[str, Callable[[], None]]] = []
    server = server_on(
        GPU, lambda: WorkQueue.beside_others(GPU), lambda kind, _, work: pieces.append((kind, work))
    )
    answered: list[str] = []
    server.announce(0, {0: [0, 0, 0]}, [0])
    z, y = torch.randn(5, 4), torch.arange(5) % 3
    for number, body in enumerate([PushThere(z, y), Align(), ExchangeThere(z, y)]):
        server.submit(Request(0, number, body), lambda answer, kind=body.kind: answered.append(kind))  # type: ignore[misc]  # mypy infers no lambda's default
    for expected_kind, said, waits in [
        ("lane", ["exchange"], []),
        ("answers of a lane", ["exchange", "push"], ["host waits for stream 2"]),
        ("fit", ["exchange", "push"], []),
        ("answers of a fit", ["exchange", "push", "align"], ["host waits for stream 1"]),
    ]:
        cuda.asked.clear()
        kind, work = pieces.pop(0)
        work()
        assert (kind, answered) == (expected_kind, said)
        assert [asked for asked in cuda.asked if asked.startswith("host")] == waits
    assert not pieces


def test_on_a_cpu_requests_are_timed_by_the_hosts() -> None:
    server, log = server_on(torch.device("cpu")), RequestLog()
    link = LocalLink(server, WireLedger(), log, torch.device("cpu"))
    link.announce(0, {0: [0]}, [0])
    link.send(Request(0, 0, Exchange(torch.randn(5, 4), torch.arange(5) % 3)), lambda take: take())
    told, report = log.take(), server.report(1.0)
    before = RequestTimes(**vars(told[0]["exchange"]))
    on_device(told, report.requests)
    assert report.requests == {}
    assert told[0]["exchange"] == before
    assert before.round_trip_seconds >= before.compute_seconds > 0


def test_a_thread_gets_one_stream_for_captures_and_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second world in the process must not move it: the first one's link waits in the stream before."""
    cuda = Cuda()
    default = cuda.current
    for name, stand_in in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "set_device": lambda device: None,
        "default_stream": lambda device: default,
        "current_stream": lambda device=None: cuda.current,
        "set_stream": lambda stream: setattr(cuda, "current", stream),
        "Stream": cuda.stream,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(world, "set_tf32", lambda allowed: None)
    assert open_device(from_tree({"graphs": "never"}), 0) == GPU
    assert cuda.current is default
    open_device(from_tree({"graphs": "auto"}), 0)
    first = cuda.current
    assert first is not default
    open_device(from_tree({"graphs": "auto"}), 0)
    assert cuda.current is first
    assert cuda.made == 1
