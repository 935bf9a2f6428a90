"""A stand-in for torch RPC, and for a job's ranks, in one process: each rank is a thread and a `Process`.

Calls are carried as TensorPipe does. Tensors of a GPU travel on streams of torch's pool, which wait for the
caller's current one. Functions and callbacks run on other threads, with such a stream as their current one.
Answers come at the worst moment: while the rank that waits for them captures, or once it can do nothing else.
"""

import io
import pickle
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fslsage_rpc.config.schema import Comm, Config
from fslsage_rpc.device.placement import GpuPlace, open_device
from fslsage_rpc.device.workers import Workers
from fslsage_rpc.job.rpc_world import RpcWorld
from fslsage_rpc.training.experiment import Experiment
from fslsage_rpc.transport import rpc as production
from support.rank_program import Outcome, train
from support.stand_in_cuda import Block, Cuda, HostQueue, Process, Stream, Times, bare, merged

PATIENCE_SECONDS = 0.2
"""after which an answer comes at any rate"""
CAPTURE_SECONDS = 0.02
"""for which a capture waits for what is to come in the middle of it"""
LIMIT_SECONDS = 60
"""for a run"""


def dump(value: Any) -> tuple[bytes, list[Tensor]]:
    """A value without its tensors, and these."""
    tensors: list[Tensor] = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, part: Any) -> int | None:
            if not isinstance(part, Tensor):
                return None
            tensors.append(part)
            return len(tensors) - 1

    buffer = io.BytesIO()
    Pickler(buffer).dump(value)
    return buffer.getvalue(), tensors


def load(dumped: bytes, tensors: list[Tensor]) -> Any:
    """The value, with these tensors."""

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, number: Any) -> Tensor:
            return tensors[number]

    return Unpickler(io.BytesIO(dumped)).load()


class Message:
    """A value under way, sent from the stream that is current, which the sending one waits for."""

    def __init__(self, cuda: Cuda, value: Any, mapped: bool):
        self._cuda = cuda
        self._dumped, tensors = dump(value)
        self._on_gpu = [cuda.block_of(tensor) is not None for tensor in tensors]
        if any(self._on_gpu) and not mapped:
            raise RuntimeError("TensorPipe RPC backend only supports CPU tensors by default")
        self.host = cuda.thread.host.knows
        self._done: Times = {}
        if any(self._on_gpu):
            sending = cuda.stream()
            sending.wait_stream(cuda.current_stream())
            blocks = [block for block in map(cuda.block_of, tensors) if block is not None]
            cuda.launch("send", sending, blocks, ())
            for block in blocks:
                block.recorded.add(sending)
            self._done = dict(sending.done)
        with bare():
            self._tensors = [tensor.detach().clone() for tensor in tensors]

    def receive(self) -> Any:
        """The value, on the stream that is current."""
        cuda, stream = self._cuda, self._cuda.current_stream()
        with cuda.lock:
            cuda.know(self.host)
            stream.done = merged(stream.done, self._done)
            with bare():
                tensors = [tensor.clone() for tensor in self._tensors]
                blocks = [
                    cuda.place(tensor) for tensor, gpu in zip(tensors, self._on_gpu, strict=True) if gpu
                ]
            if blocks:
                cuda.launch("receive", stream, (), blocks)
        return load(self._dumped, tensors)


class Inbox:
    """Holds what has come to a rank until threads of its RPC agent take it, out of turn.

    Args:
        holds: keep it back until the rank captures, or waits.
    """

    def __init__(self, job: "Job", process: Process, holds: bool):
        self._job, self._process, self._holds = job, process, holds
        self._changed = threading.Condition()
        self._there: list[tuple[float, Callable[[], None]]] = []
        self._open = 0
        self.expected = 0
        """answers that have yet to be handed over"""
        self._threads = [
            threading.Thread(target=self._work, name=f"rpc {number} of {process}", daemon=True)
            for number in range(1 if holds else 2)
        ]
        for thread in self._threads:
            thread.start()

    def expect(self, more: int) -> None:
        with self._changed:
            self.expected += more
            self._changed.notify_all()

    def put(self, action: Callable[[], None]) -> None:
        with self._changed:
            self._there.append((time.monotonic(), action))
            self._changed.notify_all()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hand over at once what comes meanwhile."""
        with self._changed:
            self._open += 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._open -= 1

    def flush(self, seconds: float) -> None:
        """Have all that is expected handed over, if it comes in time."""
        with self.opened(), self._changed:
            self._changed.wait_for(lambda: not self.expected, seconds)

    def close(self) -> None:
        for thread in self._threads:
            thread.join(LIMIT_SECONDS)

    def _due(self) -> bool:
        late = self._there and time.monotonic() - self._there[0][0] > PATIENCE_SECONDS
        return bool(self._there) and bool(not self._holds or self._open or late)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._due():
                    if self._job.ended:
                        return
                    self._changed.wait(0.02)
                _, action = self._there.pop(self._job.chance.randrange(len(self._there)))
            try:
                action()
            except BaseException as error:
                self._job.fail(error)


@dataclass
class Raised:
    """An error in place of an answer."""

    error: Exception


class Future:
    """A `torch.futures.Future`: its tensors are waited for by streams, where it has devices."""

    def __init__(self, job: "Job", devices: Any = None):
        self._job, self._cuda = job, job.cuda
        self._devices = devices
        self._changed = threading.Condition()
        self._is_done = False
        self._value: Any = None
        self._event: Any = None
        self._blocks: list[Block] = []
        self._callbacks: list[Callable[[Future], None]] = []

    def __class_getitem__(cls, of: Any) -> Any:
        return cls

    def set_result(self, value: Any) -> None:
        blocks = [block for block in map(self._cuda.block_of, dump(value)[1]) if block is not None]
        if blocks and not self._devices:
            raise ValueError(
                "The result contained tensors residing on device(s) cuda:0 which are not expected"
            )
        if blocks:
            self._event = self._cuda.current_stream().record_event()
        self._blocks, self._value = blocks, value
        with self._changed:
            assert not self._is_done
            self._is_done = True
            callbacks, self._callbacks = self._callbacks, []
            self._changed.notify_all()
        for callback in callbacks:
            self._call(callback)

    def add_done_callback(self, callback: Callable[["Future"], None]) -> None:
        with self._changed:
            if not self._is_done:
                self._callbacks.append(callback)
                return
        self._call(callback)

    def _call(self, callback: Callable[["Future"], None]) -> None:
        """By this thread, with a stream of torch's pool that has waited."""
        with self._cuda.use(self._cuda.stream() if self._devices else None):
            self._synchronise()
            callback(self)

    def wait(self) -> Any:
        if not self._is_done:
            with self._job.inbox_of_this_thread().opened(), self._changed:
                while not self._is_done:
                    self._changed.wait(0.1)
                    self._job.go_on()
        with self._changed:
            pass  # what was done before it was completed is known
        self._synchronise()
        if isinstance(self._value, Raised):
            raise self._value.error
        return self._value

    def _synchronise(self) -> None:
        stream: Stream = self._cuda.current_stream()
        if self._event is not None:
            stream.wait_event(self._event)
        for block in self._blocks:
            block.recorded.add(stream)


class Job:
    """Ranks in one process.

    Args:
        seed: of the order in which calls and answers come.
    """

    def __init__(self, cuda: Cuda, ranks: int, mapped: bool, seed: int):
        self.cuda, self.mapped = cuda, mapped
        self.chance = random.Random(seed)
        self.processes = [
            Process(cuda, "server" if rank == 0 else f"clients {rank}", rank) for rank in range(ranks)
        ]
        self.failure: BaseException | None = None
        self.ended = False
        self.groups = {(): Group(self, range(ranks)), "clients": Group(self, range(1, ranks))}
        self._inboxes: dict[Process, Inbox] = {}
        cuda.capture_begun = self._capture_begun

    def go_on(self) -> None:
        """Raise where another rank has failed."""
        if self.failure is not None:
            raise RuntimeError("another rank has failed")

    def fail(self, error: BaseException) -> None:
        self.failure = self.failure or error
        for group in self.groups.values():
            group.barrier.abort()

    def inbox_of_this_thread(self) -> Inbox:
        return self._inboxes[self.cuda.thread.process]

    def _capture_begun(self, process: Process) -> None:
        """Let answers come to a client rank in the middle of it, and other lanes of the server go on."""
        if process.rank:
            self._inboxes[process].flush(CAPTURE_SECONDS)
            return
        others = [stream for stream in process.streams if stream.capture is None]
        before, ends = sum(stream.count for stream in others), time.monotonic() + CAPTURE_SECONDS
        while sum(stream.count for stream in others) == before and time.monotonic() < ends:
            time.sleep(0.0005)

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """Have every rank do it; what they return."""
        results: list[Any] = [None] * len(self.processes)

        def of_rank(rank: int) -> None:
            with self.cuda.inside(self.processes[rank]):
                try:
                    results[rank] = work(rank)
                except BaseException as error:
                    self.fail(error)

        for process in self.processes:
            with self.cuda.inside(process):
                self._inboxes[process] = Inbox(self, process, holds=process.rank > 0)
        threads = [
            threading.Thread(target=of_rank, args=(rank,), name=f"rank {rank}", daemon=True)
            for rank in range(len(self.processes))
        ]
        for thread in threads:
            thread.start()
        ends = time.monotonic() + LIMIT_SECONDS
        while any(thread.is_alive() for thread in threads) and self.failure is None:
            threads[0].join(0.01)
            if time.monotonic() > ends:
                self.fail(TimeoutError(f"ranks did not end within {LIMIT_SECONDS} s"))
        self.ended = True
        for inbox in self._inboxes.values():
            inbox.close()
        if self.failure is not None:
            raise self.failure
        return results

    # What torch.distributed.rpc has

    def rpc_async(self, to: str, func: Callable[..., Any], args: Any = (), timeout: float = 0) -> Future:
        caller, server = self.cuda.thread.process, self.processes[0]
        future = Future(self, [self.cuda] if self.mapped else None)
        request = Message(self.cuda, args, self.mapped)
        self._inboxes[caller].expect(1)
        self._inboxes[server].put(partial(self._serve, func, request, caller, future))
        return future

    def rpc_sync(self, to: str, func: Callable[..., Any], args: Any = (), timeout: float = 0) -> Any:
        return self.rpc_async(to, func, args).wait()

    def _serve(self, func: Callable[..., Any], request: Message, caller: Process, future: Future) -> None:
        """On a thread of the server's."""
        with self.cuda.use(self.cuda.stream()):
            try:
                result = func(*request.receive())
            except Exception as error:
                result = Raised(error)
            if isinstance(result, Future):
                result.add_done_callback(lambda done: self._send(done.wait(), caller, future))
            else:
                self._send(result, caller, future)

    def _send(self, value: Any, caller: Process, future: Future) -> None:
        answer, inbox = Message(self.cuda, value, self.mapped), self._inboxes[caller]

        def hand_over() -> None:
            with self.cuda.use(self.cuda.stream()):
                future.set_result(answer.receive())
            inbox.expect(-1)

        inbox.put(hand_over)

    # What torch.distributed has

    def _group(self, group: Any) -> "Group":
        return self.groups[group or ()]

    def barrier(self, group: Any = None) -> None:
        self._group(group).exchange(None)

    def gather_object(self, value: Any, values: list[Any] | None) -> None:
        got = self.groups[()].exchange(value)
        if values is not None:
            values[:] = got

    def broadcast_object_list(self, box: list[Any]) -> None:
        box[:] = self.groups[()].exchange(box)[0]

    def all_reduce(self, tensor: Tensor, op: Any, group: Any) -> None:
        parts = self._group(group).exchange(tensor.clone())
        total = parts[0].clone()
        for part in parts[1:]:
            total = total + part if op == torch.distributed.ReduceOp.SUM else torch.maximum(total, part)
        tensor.copy_(total)


class Group:
    """Ranks that meet."""

    def __init__(self, job: Job, ranks: range):
        self._job, self._ranks = job, ranks
        self.barrier = threading.Barrier(len(ranks), timeout=LIMIT_SECONDS)
        self._brought: dict[int, tuple[Any, Times]] = {}

    def exchange(self, value: Any) -> list[Any]:
        """Everybody's, by rank."""
        thread = self._job.cuda.thread
        with self._job.inbox_of_this_thread().opened():
            self._brought[thread.process.rank] = value, thread.host.knows
            self.barrier.wait()
            brought = [self._brought[rank] for rank in self._ranks]
            self.barrier.wait()
        for _, host in brought:
            self._job.cuda.know(host)
        return [value for value, _ in brought]


class WaitingQueue(HostQueue):
    """A rank that waits for an answer has nothing else to do."""

    def __init__(self, job: Job):
        super().__init__(job.cuda)
        self._job = job

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        if not self.empty():
            return super().get()
        with self._job.inbox_of_this_thread().opened():
            while self.empty():
                time.sleep(0.0005)
                self._job.go_on()
        return super().get()


def stand_in(job: Job, patch: pytest.MonkeyPatch) -> None:
    """Have the real transport call this in place of torch."""

    class OfJob(Future):
        def __init__(self, devices: Any = None):
            super().__init__(job, devices)

    def nothing(*arguments: Any, **keywords: Any) -> None:
        pass

    distributed = SimpleNamespace(
        init_process_group=nothing,
        destroy_process_group=nothing,
        is_nccl_available=lambda: False,
        new_group=lambda *_, **__: "clients",
        PrefixStore=lambda *_: SimpleNamespace(set_timeout=nothing),
        barrier=job.barrier,
        gather_object=job.gather_object,
        broadcast_object_list=job.broadcast_object_list,
        all_reduce=job.all_reduce,
        ReduceOp=torch.distributed.ReduceOp,
    )
    patch.setattr(production, "dist", distributed)
    patch.setattr(production, "Future", OfJob)
    patch.setattr(production.choices, "bind_interface", nothing)
    patch.setattr(production.autograd, "_init", nothing)
    patch.setattr(production.rpc, "_init_rpc_backend", nothing)
    patch.setattr(production.rpc, "shutdown", nothing)
    patch.setattr(production.rpc, "rpc_async", job.rpc_async)
    patch.setattr(production.rpc, "rpc_sync", job.rpc_sync)


def transport_between_threads(
    job: Job, rank: int, device: torch.device, keys: Comm
) -> production.RpcTransport:
    """The real one, of a rank that is a thread; without an RRef, which would need agents of torch."""
    ranks = len(job.processes)
    workers = [production.SERVER, *(f"clients{number}" for number in range(1, ranks))]
    devices, places, store = [device] * ranks, [GpuPlace("here", None)] * ranks, SimpleNamespace()
    keys = replace(keys, transports=["uv"])
    return production.RpcTransport(store, rank, keys, devices, places, workers, rank)  # type: ignore[arg-type]


class ThreadsWorld(RpcWorld):
    """An `RpcWorld` whose ranks are threads."""

    def __init__(self, config: Config, job: Job, rank: int):
        self.number, self.homes = rank, len(job.processes) - 1
        self.home = rank - 1 if rank else None
        self.device = open_device(config, 0)
        self._workers = Workers(self.device)
        self._signs = SimpleNamespace(stop=lambda: None)  # type: ignore[assignment]
        self.transport = transport_between_threads(job, rank, self.device, config.comm)


def train_on_threads(
    cuda: Cuda,
    config: Config,
    patch: pytest.MonkeyPatch,
    ranks: int = 2,
    seed: int = 0,
    training: Callable[[Experiment, Any], Outcome] = train,
) -> Outcome:
    """Train on ranks that are threads; the parties' tensors of all ranks together.

    Args:
        training: done by every rank.
    """
    job = Job(cuda, ranks, config.comm.device_maps != "never", seed)

    stand_in(job, patch)
    patch.setattr(
        "fslsage_rpc.parties.scheduler.queue", SimpleNamespace(SimpleQueue=lambda: WaitingQueue(job))
    )
    experiment = Experiment.prepare(config)

    def work(rank: int) -> Outcome:
        world = ThreadsWorld(config, job, rank)
        outcome = training(replace(experiment), world)
        world.close()
        return outcome

    joint = Outcome()
    for outcome in job.run(work):
        joint.tensors |= outcome.tensors
        joint.lines += outcome.lines
    return joint
