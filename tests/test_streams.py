"""What is asked of CUDA's streams and events, told to stand-ins: so much can be checked without a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fslsage_rpc.measure.timeline import Timeline
from fslsage_rpc.parties.streams import WorkQueue, current_place

GPU = torch.device("cuda", 0)


class Cuda:
    """Streams that write down what they are asked, and the one that is current."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.current = Stream("default", self)
        self.made = 0
        self.milliseconds = 0.0

    def stream(self, device: torch.device) -> "Stream":
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
        self.stream = stream.name
        cuda.milliseconds += 2.0
        self.reading = cuda.milliseconds

    def synchronize(self) -> None:
        pass

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
    return cuda


def test_a_queue_of_its_own_starts_behind_what_was_queued_before(cuda: Cuda) -> None:
    WorkQueue.beside_others(GPU)
    assert cuda.asked == ["stream 1 waits for default"]


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
    lane.after_queue(fit)
    assert cuda.asked == [
        "stream 1 waits for default",
        "stream 2 waits for stream 1",
        "stream 1 waits for stream 2",
    ]
    assert (request.kept_for, target.kept_for) == (["stream 1"], ["stream 2"])
    end: Any = lane.end()
    assert end.stream == "stream 1"


def test_a_queue_without_a_stream_leaves_work_where_the_caller_is(cuda: Cuda) -> None:
    queue = WorkQueue()
    with queue.after(current_place(GPU)):
        assert cuda.current.name == "default"
    queue.keep(OnGpu())  # type: ignore[arg-type]
    queue.after_queue(WorkQueue.beside_others(GPU))
    assert queue.end() is None
    assert cuda.asked == ["stream 1 waits for default"]


def test_device_seconds_are_those_between_the_events_of_each_phase_but_waits(cuda: Cuda) -> None:
    timeline = Timeline(device=GPU)
    for name in ("step", "upload_wait", "step", "drift"):
        with timeline.phase(name):
            pass
    assert timeline.take_device_seconds() == pytest.approx({"step": 0.004, "drift": 0.002})
    assert timeline.take_device_seconds() == {}
    assert timeline.take().keys() == {"step", "upload_wait", "drift"}
