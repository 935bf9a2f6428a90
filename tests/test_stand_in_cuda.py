"""Planted mistakes, which the stand-in for CUDA finds, and their correct counterparts."""

import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fslsage_rpc.device.placement import choose_device
from support import stand_in_rpc
from support.stand_in_cuda import GPU, Cuda, Process, cuda, process
from support.stand_in_rpc import Future, Job

__all__ = ["cuda", "process"]


def on_a_thread(work: Callable[[], object]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def assert_found(cuda: Cuda, *texts: str) -> None:
    """So many mistakes, with these texts."""
    assert len(cuda.violations) == len(texts), cuda.violations
    for text, said in zip(texts, cuda.violations, strict=True):
        assert text in said


def test_tensors_compute_as_on_a_cpu_and_say_that_they_are_on_the_gpu(cuda: Cuda, process: Process) -> None:
    assert choose_device("cuda", 0) == GPU
    model = nn.Linear(3, 2).to(GPU)
    x = torch.tensor([[1.0, 2.0, 3.0]], device=GPU)
    model(x).sum().backward()
    made = torch.zeros_like(x), x.to(GPU, torch.float64), model.weight.grad, torch.arange(3, device="cuda")
    for tensor in made:
        assert tensor is not None
        assert tensor.device == GPU
        assert tensor.is_cuda
    assert torch.equal(model.weight.grad.cpu(), x.cpu().expand(2, 3))  # type: ignore[union-attr]  # it is there
    for tensor in (x.cpu(), x.to("cpu"), torch.ones(2), torch.zeros_like(x, device="cpu")):
        assert tensor.device.type == "cpu"
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        x.numpy()
    cuda.check()
    x + torch.ones(3)
    assert_found(cuda, "takes tensors of the host and of the GPU")


@pytest.mark.parametrize("ordered_by", [None, "event", "stream", "host"])
@pytest.mark.parametrize("second", ["reads", "writes"])
def test_what_another_stream_has_written_is_waited_for(
    second: str, ordered_by: str | None, cuda: Cuda, process: Process
) -> None:
    x = torch.zeros(3, device=GPU)
    mine, other = torch.cuda.current_stream(), torch.cuda.Stream()
    if ordered_by == "event":
        other.wait_event(mine.record_event())
    elif ordered_by == "stream":
        other.wait_stream(mine)
    elif ordered_by == "host":
        mine.synchronize()
    with torch.cuda.stream(other):
        _ = x.sum() if second == "reads" else x.zero_()
    x.record_stream(other)
    assert_found(cuda, *([] if ordered_by else [f"{second} what is written by zeros"]))


@pytest.mark.parametrize("waits", [False, True])
def test_what_another_stream_still_reads_is_not_written(waits: bool, cuda: Cuda, process: Process) -> None:
    x = torch.zeros(3, device=GPU)
    torch.cuda.synchronize()
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        x.sum()
    if waits:
        torch.cuda.current_stream().wait_stream(other)
    x.fill_(1.0)
    x.record_stream(other)
    assert_found(cuda, *([] if waits else ["writes what is read by sum"]))


def test_an_event_that_is_recorded_too_early_orders_nothing(cuda: Cuda, process: Process) -> None:
    early = torch.cuda.current_stream().record_event()
    x = torch.zeros(3, device=GPU)
    other = torch.cuda.Stream()
    other.wait_event(early)
    x.record_stream(other)
    with torch.cuda.stream(other):
        x.sum()
    assert_found(cuda, "reads what is written by zeros")


@pytest.mark.parametrize("safe_by", [None, "record_stream", "stream", "host"])
def test_memory_is_freed_behind_its_last_use(safe_by: str | None, cuda: Cuda, process: Process) -> None:
    x = torch.zeros(3, device=GPU)
    torch.cuda.synchronize()
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        x.sum()
    if safe_by == "record_stream":
        x.record_stream(other)
    elif safe_by == "stream":
        torch.cuda.current_stream().wait_stream(other)
    elif safe_by == "host":
        other.synchronize()
    del x
    assert_found(cuda, *([] if safe_by else ["may still be used by sum"]))


@pytest.mark.parametrize("told_by", [None, "queue", "condition"])
def test_a_thread_knows_only_what_it_has_waited_for_or_is_told(
    told_by: str | None, cuda: Cuda, process: Process
) -> None:
    x = torch.zeros(3, device=GPU)
    news, changed = queue.SimpleQueue(), threading.Condition()  # type: ignore[var-annotated]  # of None

    def wait() -> None:
        torch.cuda.synchronize()
        with changed:
            news.put(None)

    other = torch.cuda.Stream()
    x.record_stream(other)
    on_a_thread(wait)
    if told_by == "queue":
        news.get()
    elif told_by == "condition":
        with changed:
            pass
    with torch.cuda.stream(other):
        x.sum()
    assert_found(cuda, *([] if told_by else ["reads what is written by zeros"]))


def test_the_host_waits_for_what_it_reads(cuda: Cuda, process: Process) -> None:
    began = torch.cuda.current_stream().record_event()
    x = torch.zeros(3, device=GPU)
    ended = torch.cuda.current_stream().record_event()
    began.elapsed_time(ended)
    assert_found(cuda, "an event is not known to be done")
    cuda.violations.clear()
    assert x.tolist() == [0.0] * 3
    assert began.elapsed_time(ended) > 0
    cuda.check()


def test_another_process_has_streams_of_its_own(cuda: Cuda, process: Process) -> None:
    mine = torch.cuda.Stream()
    assert torch.cuda.Stream() is not mine
    for _ in range(30):
        torch.cuda.Stream()
    assert torch.cuda.Stream() is mine  # torch has so many

    def touch() -> None:
        with cuda.inside(Process(cuda, "two")):
            mine.record_event()

    cuda.thread.inside = False  # the thread to come is nobody's yet
    on_a_thread(touch)
    cuda.thread.inside = True
    assert_found(cuda, "is another process's")


class Captured:
    """One step, captured in a stream of its own, in the middle of which something is done."""

    def __init__(self, cuda: Cuda, meanwhile: Callable[[], object] = lambda: None):
        self.stream = torch.cuda.Stream(priority=-1)
        self.x, self.total = torch.ones(3, device=GPU), torch.zeros(3, device=GPU)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        for tensor in (self.x, self.total):
            tensor.record_stream(self.stream)
        with torch.cuda.stream(self.stream):
            self.graph.capture_begin(capture_error_mode="thread_local")
            self.total += self.x
            meanwhile()
            self.twice = self.total * 2
            self.graph.capture_end()


def test_a_capture_computes_nothing_and_a_replay_computes_again(cuda: Cuda, process: Process) -> None:
    step = Captured(cuda)
    assert torch.equal(step.total.cpu(), torch.zeros(3))
    with torch.cuda.stream(step.stream):
        for times in (1, 2):
            step.graph.replay()
            assert torch.equal(step.twice.cpu(), torch.full((3,), 2.0 * times))
            step.x.fill_(1.0)
    cuda.check()
    step.graph.replay()  # in the default stream, which has not waited
    step.stream.synchronize()
    assert "unordered" in cuda.violations[0]


MISTAKES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "the device is waited for": (lambda other: torch.cuda.synchronize(), "waits for the device"),
    "the stream is waited for": (
        lambda other: torch.cuda.current_stream().synchronize(),
        "synchronize (, thread MainThread) while this thread captures",
    ),
    "a number is read": (lambda other: torch.ones(1, device=GPU).item(), "_local_scalar_dense"),
    "numbers come from the host": (lambda other: torch.ones(1).to(GPU), "_to_copy"),
    "an event escapes": (
        lambda other: other.wait_event(torch.cuda.current_stream().record_event()),
        "crosses the edge",
    ),
    "an event comes in": (
        lambda other: torch.cuda.current_stream().wait_event(other.record_event()),
        "crosses the edge",
    ),
    "an event is waited for": (
        lambda other: torch.cuda.current_stream().record_event().synchronize(),
        "the event is of a capture",
    ),
    "a product is planned": (lambda other: product(), "by a thread that has not computed it before"),
    "another capture is begun": (lambda other: on_a_thread(begin_capture), "another capture is under way"),
    "all threads are to wait": (lambda other: on_a_thread(begin_capture), "for all threads"),
}


def product() -> None:
    ones = torch.ones(2, 2, device=GPU)
    ones @ ones


def begin_capture() -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.CUDAGraph().capture_begin()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_a_capture(mistake: str, cuda: Cuda, process: Process) -> None:
    plant, text = MISTAKES[mistake]
    other = torch.cuda.Stream()
    Captured(cuda, lambda: plant(other))
    assert any(text in said for said in cuda.violations), cuda.violations


def test_a_thread_captures_what_it_has_computed_itself(cuda: Cuda, process: Process) -> None:
    product()
    Captured(cuda, product)
    cuda.check()
    on_a_thread(lambda: Captured(cuda, product))
    assert_found(cuda, "mm (, thread")


TOUCHES: dict[str, Callable[[Any], Any]] = {
    "record_event": lambda stream: stream.record_event(),
    "wait_event": lambda stream: stream.wait_event(torch.cuda.current_stream().record_event()),
    "synchronize": lambda stream: stream.synchronize(),
    "zeros": lambda stream: zeros_in(stream),
}


def zeros_in(stream: Any) -> None:
    with torch.cuda.stream(stream):
        torch.zeros(3, device=GPU)


@pytest.mark.parametrize("touch", TOUCHES)
def test_only_the_capturing_thread_touches_its_stream(touch: str, cuda: Cuda, process: Process) -> None:
    other = torch.cuda.Stream()
    step = Captured(cuda, lambda: on_a_thread(lambda: TOUCHES[touch](other)))
    on_a_thread(lambda: TOUCHES[touch](step.stream))  # which nobody captures now
    cuda.check()

    def in_the_middle() -> None:
        captured = torch.cuda.current_stream()
        on_a_thread(lambda: TOUCHES[touch](captured))

    Captured(cuda, in_the_middle)
    assert f"{touch} (" in cuda.violations[0]
    assert "which another thread captures" in cuda.violations[0]


def test_nobody_waits_for_the_device_or_replays_while_another_thread_captures(
    cuda: Cuda, process: Process
) -> None:
    step = Captured(cuda)

    def replay() -> None:
        with torch.cuda.stream(step.stream):
            step.graph.replay()

    on_a_thread(replay)
    cuda.check()
    Captured(cuda, lambda: on_a_thread(replay))
    assert_found(cuda, "replay (, thread")
    cuda.violations.clear()
    Captured(cuda, lambda: on_a_thread(torch.cuda.synchronize))
    assert "waits for the device while one's stream" in cuda.violations[0]


def test_the_default_stream_is_not_captured(cuda: Cuda, process: Process) -> None:
    with pytest.raises(RuntimeError, match="non-default stream"):
        torch.cuda.CUDAGraph().capture_begin()


@pytest.mark.parametrize("place", ["begin", "end"])
def test_after_a_capture_that_failed_the_allocator_must_be_told(
    place: str, cuda: Cuda, process: Process
) -> None:
    """As up to torch 2.11."""
    cuda.refuses[place] = 1
    pool = torch.cuda.graph_pool_handle()
    graph = torch.cuda.CUDAGraph()

    def capture() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            graph.capture_begin(pool)
            graph.capture_end()

    with pytest.raises(RuntimeError, match="not permitted"):
        capture()
    with pytest.raises(AssertionError, match="captures_underway"):
        torch.cuda.empty_cache()
    x = torch.ones(3, device=GPU)
    x.record_stream(torch.cuda.Stream())
    del x
    assert process.deferred == 1
    torch._C._cuda_endAllocateToPool(0, pool)
    torch.cuda.empty_cache()
    assert process.deferred == 0
    with pytest.raises(RuntimeError, match="not currently recording"):
        torch._C._cuda_endAllocateToPool(0, pool)
    assert process.draws_captured
    Captured(cuda)
    assert not process.draws_captured


def served(x: torch.Tensor) -> torch.Tensor:
    return x * 2


class Caller:
    """A client rank that asks the server to double a tensor, which it makes in a stream of its own."""

    def __init__(self, cuda: Cuda, mapped: bool = True):
        self.cuda = cuda
        self.job = Job(cuda, 2, mapped, seed=0)

    def run(self, work: Callable[["Caller"], Any]) -> Any:
        return self.job.run(lambda rank: work(self) if rank else None)[1]

    def call(self, x: torch.Tensor) -> Future:
        return self.job.rpc_async("server", served, (x,))


def test_calls_and_answers_are_waited_for(cuda: Cuda) -> None:
    def work(caller: Caller) -> list[float]:
        doubled: list[float] = caller.call(torch.ones(3, device=GPU)).wait().tolist()
        return doubled

    assert Caller(cuda).run(work) == [2.0] * 3
    cuda.check()


def test_without_a_device_map_no_tensor_of_the_gpu_is_sent(cuda: Cuda) -> None:
    with pytest.raises(RuntimeError, match="only supports CPU tensors"):
        Caller(cuda, mapped=False).run(lambda caller: caller.call(torch.ones(3, device=GPU)).wait())


def test_an_answer_that_is_not_waited_for_is_a_race(cuda: Cuda) -> None:
    def work(caller: Caller) -> None:
        future = caller.call(torch.ones(3, device=GPU))
        future.wait()
        with torch.cuda.stream(torch.cuda.Stream()):
            future._value.sum()

    Caller(cuda).run(work)
    assert "reads what is written by receive" in cuda.violations[0]


def test_a_callback_that_queues_in_the_callers_stream_is_caught_while_that_captures(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stand_in_rpc, "CAPTURE_SECONDS", stand_in_rpc.LIMIT_SECONDS)

    def work(caller: Caller, taken_by: str) -> None:
        mine = torch.cuda.Stream(priority=-1)
        x = torch.ones(3, device=GPU)
        torch.cuda.synchronize()
        future = caller.call(x)

        def callback(future: Future) -> None:
            with torch.cuda.stream(mine):
                future.wait()

        if taken_by == "callback":
            future.add_done_callback(callback)
        with torch.cuda.stream(mine):
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")
            graph.capture_end()
            future.wait()

    Caller(cuda).run(lambda caller: work(caller, "caller"))
    cuda.check()
    Caller(cuda).run(lambda caller: work(caller, "callback"))
    assert "wait_event (, thread rpc 0 of clients 1) touches clients 1's stream" in cuda.violations[0]


def test_a_future_without_devices_takes_no_tensor_of_the_gpu(cuda: Cuda) -> None:
    def work(caller: Caller) -> None:
        Future(caller.job).set_result(torch.ones(3, device=GPU))

    with pytest.raises(ValueError, match="not expected"):
        Caller(cuda).run(work)
