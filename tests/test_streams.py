"""Streams and the GPU's clock, on a stand-in: so much can be checked without a GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.config.schema import AlignmentKeys, OptimizerKeys
from fslsage_rpc.device.placement import open_device
from fslsage_rpc.device.streams import PRIORITY, WorkQueue, can_capture, current_place
from fslsage_rpc.measure.request_times import RequestLog, RequestTimes, on_device
from fslsage_rpc.measure.timeline import Timeline
from fslsage_rpc.models.flat import flatten
from fslsage_rpc.parties.auxiliary_fit import AuxiliaryFit
from fslsage_rpc.parties.context import Context
from fslsage_rpc.parties.lane import Lane
from fslsage_rpc.parties.optimizers import ScheduledOptimizer
from fslsage_rpc.parties.requests import Align, Exchange, Push, Request
from fslsage_rpc.parties.server import Server
from fslsage_rpc.transport.link import connect
from fslsage_rpc.transport.local import LocalTransport
from fslsage_rpc.transport.wire_ledger import WireLedger
from support.stand_in_cuda import GPU, Cuda, Process, Stream, cuda, process

__all__ = ["cuda", "process"]
Start = Callable[[str, int, Callable[[], None]], Any]


def at_once(kind: str, number: int, work: Callable[[], None]) -> None:
    work()


def test_a_queue_of_its_own_starts_behind_what_was_queued_before(cuda: Cuda, process: Process) -> None:
    before = current_place(GPU)
    x = torch.zeros(2, device=GPU)
    queue = WorkQueue.beside_others(GPU)
    queue.keep(x)
    with queue.after(before):
        x.sum()
    cuda.check()


def test_graphs_need_a_priority_that_nobody_else_takes(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert can_capture(GPU)
    assert not can_capture(torch.device("cpu"))
    monkeypatch.setattr(Stream, "priority_range", lambda stream: (0, PRIORITY))
    assert not can_capture(GPU)


def test_device_seconds_are_those_between_the_events_of_each_phase_but_waits(process: Process) -> None:
    timeline = Timeline(device=GPU)
    for name in ("step", "upload_wait", "step", "drift"):
        with timeline.phase(name):
            pass
    assert timeline.take_device_seconds() == pytest.approx({"step": 0.004, "drift": 0.002})
    assert timeline.take_device_seconds() == {}
    assert timeline.take().keys() == {"step", "upload_wait", "drift"}


def test_a_pause_is_in_no_phases_device_seconds_and_what_came_before_may_be_taken(process: Process) -> None:
    timeline = Timeline(device=GPU)
    with timeline.phase("alignment"):
        with timeline.paused():
            assert timeline.take_device_seconds() == pytest.approx({"alignment": 0.002})
            current_place(GPU)  # a reading of the clock, 2 ms later
        with timeline.paused():
            pass
    assert timeline.take_device_seconds() == pytest.approx({"alignment": 0.004})


def server_on(
    device: torch.device, queue: Callable[[], WorkQueue] = WorkQueue, start: Start = at_once
) -> Server:
    """One client, whose auxiliary model is aligned; every phase of the device takes 2 ms of the stand-in."""
    server_model, auxiliary = nn.Linear(4, 3).to(device), nn.Linear(4, 3).to(device)

    def optimizer(model: nn.Module) -> ScheduledOptimizer:
        return ScheduledOptimizer(OptimizerKeys(name="sgd", lr=0.1), model.parameters())

    def context() -> Context:
        return Context(device, Timeline(device=device), queue=queue())

    keys = AlignmentKeys(epochs=2, buffer_size=8)
    fit = AuxiliaryFit(auxiliary, optimizer(auxiliary), keys, context())
    return Server(
        initial=(flatten(nn.Linear(2, 4)), None),
        averaged=nn.Linear(2, 4),
        lanes={0: Lane(server_model, optimizer(server_model), "arrival", context())},
        fits={0: fit},
        measure_drift=False,
        start=start,
        context=context(),
    )


def test_requests_on_a_gpu_are_timed_by_its_clock(process: Process) -> None:
    """Each reading of the stand-in's clock is 2 ms after the one before."""
    server, log = server_on(GPU), RequestLog()
    link = connect(LocalTransport(GPU), server, WireLedger(), log)
    assert link is not None
    link.announce(0, {0: [0, 0, 0, 1]}, [0])
    z, y = torch.randn(5, 4, device=GPU), torch.arange(5, device=GPU) % 3
    bodies = [Push(z, y), Exchange(z, y), Align(), Exchange(z, y)]
    for number, body in enumerate(bodies):
        link.send(Request(0, number, 0, body), lambda take: take())
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
        {"step": 0.006, "targets": 0.002, "drift": 0.0, "encode": 0.0, "decode": 0.0, "alignment": 0.002}
    )
    assert log.take() == server.report(1.0).requests == {}


def test_pushes_and_alignments_are_answered_when_the_device_is_through_with_them(
    cuda: Cuda, process: Process
) -> None:
    """Sooner, the caller's stream would wait for the whole fit; an exchange's answer is sent behind it."""
    pieces: list[tuple[str, Callable[[], None]]] = []
    server = server_on(
        GPU, lambda: WorkQueue.beside_others(GPU), lambda kind, _, work: pieces.append((kind, work))
    )
    answered: list[str] = []
    server.announce(0, {0: [0, 0, 0]}, [0])
    pushed, exchanged = torch.randn(5, 4, device=GPU), torch.randn(5, 4, device=GPU)
    y = torch.arange(5, device=GPU) % 3
    torch.cuda.synchronize()
    for number, body in enumerate([Push(pushed, y), Align(), Exchange(exchanged, y)]):
        server.submit(Request(0, number, 0, body), lambda answer, kind=body.kind: answered.append(kind))  # type: ignore[misc]  # mypy infers no lambda's default

    def known_to_be_done(tensor: torch.Tensor) -> bool:
        block = cuda.block_of(tensor)
        assert block is not None
        return all(use.before(cuda.thread.host.knows) for use in block.uses.values())

    used = {"push": pushed, "exchange": exchanged, "align": server.fits[0].weights.floats}
    for expected_kind, said, under_way in [
        ("lane", ["exchange"], ["push", "exchange"]),
        ("answers of a lane", ["exchange", "push"], ["exchange"]),
        ("fit", ["exchange", "push"], ["exchange", "align"]),
        ("answers of a fit", ["exchange", "push", "align"], ["exchange"]),
    ]:
        kind, work = pieces.pop(0)
        work()
        assert (kind, answered) == (expected_kind, said)
        assert [name for name, tensor in used.items() if not known_to_be_done(tensor)] == under_way
    assert not pieces


def test_on_a_cpu_requests_are_timed_by_the_hosts() -> None:
    server, log = server_on(torch.device("cpu")), RequestLog()
    link = connect(LocalTransport(torch.device("cpu")), server, WireLedger(), log)
    assert link is not None
    link.announce(0, {0: [0]}, [0])
    link.send(Request(0, 0, 0, Exchange(torch.randn(5, 4), torch.arange(5) % 3)), lambda take: take())
    told, report = log.take(), server.report(1.0)
    before = RequestTimes(**vars(told[0]["exchange"]))
    on_device(told, report.requests)
    assert report.requests == {}
    assert told[0]["exchange"] == before
    assert before.round_trip_seconds >= before.compute_seconds > 0


def test_a_thread_gets_one_stream_for_captures_and_keeps_it(process: Process) -> None:
    """A second world in the process must not move it: the first one's link waits in the stream before."""
    opened = []
    for graphs in ("never", "auto", "auto"):
        assert open_device(from_tree({"graphs": graphs}), 0) == GPU
        opened.append(torch.cuda.current_stream())
    assert opened == [process.default, *process.streams[1:] * 2]
    assert f"stream {PRIORITY}/" in str(opened[1])
