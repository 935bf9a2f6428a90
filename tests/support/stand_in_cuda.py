"""A stand-in for CUDA on a CPU that finds races: streams, events, the allocator and graphs, all logical.

Every operation computes at once, on the CPU, so numbers are a CPU's. What would order operations on a GPU is
kept beside them: the stream of each, and vector clocks of what comes before it. `Cuda.check` reports:

- an access to memory that nothing orders behind the last one;
- memory that is freed while another stream may still use it;
- a touch of a stream that another thread captures;
- whatever else a capture does not allow: waits of the host, events across its edge, a library's first plan;
- tensors of the host and of the GPU in one operation, and times of events that nobody knows to be done.

A thread of the host knows what it has waited for. What another one knows it is told through the package's
queues and conditions, by the starts of threads and by calls. A `Process` has streams and an allocator of its
own, so threads can stand for the ranks of a job.
"""

import os
import queue
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

import fslsage_rpc

Times = dict["Stream", int]
"""a vector clock: of each stream, how much of it has been done"""
GPU = torch.device("cuda", 0)
POOL = 32
"""streams of a priority, which torch hands out in turn"""
OF_A_THREAD = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "convolution", "convolution_backward")
"""what cuBLAS and cuDNN compute, by handles and plans that are a thread's own"""
UNDECLARED = ("running_mean", "running_var")
"""BatchNorm's schema does not say that it writes these"""
WAITING = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim")
"""what the host waits for"""
HERE = os.path.dirname(fslsage_rpc.__file__)
OURS = HERE, os.path.dirname(os.path.dirname(__file__))


def merged(a: Times, b: Times) -> Times:
    """The later of two for each stream."""
    both = dict(a)
    for stream, count in b.items():
        if count > both.get(stream, 0):
            both[stream] = count
    return both


def covers(known: Times, done: Times) -> bool:
    """Is all this known to be done?"""
    return all(known.get(stream, 0) >= count for stream, count in done.items())


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors of an operation's arguments, or of its outputs."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_of(each)


@contextmanager
def bare() -> Iterator[None]:
    """Operations that nobody is told of."""
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
        yield


class Access:
    """One stream's last access to a block, of one kind: its number in the stream, and where it came from."""

    __slots__ = ("count", "stream", "thread", "where")

    def __init__(self, stream: "Stream", count: int, where: str, thread: "HostThread"):
        self.stream, self.count, self.where, self.thread = stream, count, where, thread

    def before(self, times: Times) -> bool:
        """Is it done where so much is done?"""
        return times.get(self.stream, 0) >= self.count

    def __str__(self) -> str:
        return f"{self.where} on {self.stream}"


class Block:
    """Memory of the GPU: of one storage, which holds it."""

    def __init__(self, cuda: "Cuda", stream: "Stream", private: bool):
        self.cuda, self.stream = cuda, stream
        self.private = private
        """a graph's own"""
        self.write: Access | None = None
        self.reads: dict[Stream, Access] = {}
        self.uses: dict[Stream, Access] = {}
        self.recorded: set[Stream] = set()

    def __del__(self) -> None:
        self.cuda.freed(self)


class Process:
    """Stands for a process that uses the GPU.

    Attributes:
        captures: pools that the allocator takes a capture to be under way for.
        deferred: freed blocks that wait for the end of all captures.
        draws_captured: the random generator takes itself for captured. Up to torch 2.11 it does so until a
            capture ends well, and no graph can be replayed meanwhile.
    """

    def __init__(self, cuda: "Cuda", name: str, rank: int = 0):
        self.cuda, self.name, self.rank = cuda, name, rank
        self.default = Stream(self, f"{name}'s default stream")
        self.streams = [self.default]
        self._pools: dict[int, list[Stream]] = {}
        self._taken: Counter[int] = Counter()
        cuda.processes.append(self)
        self.captures: list[Any] = []
        self.deferred = 0
        self.draws_captured = False

    def stream(self, priority: int = 0) -> "Stream":
        """The next stream of a priority."""
        with self.cuda.lock:
            pool, number = self._pools.setdefault(priority, []), self._taken[priority] % POOL
            self._taken[priority] += 1
            if number == len(pool):
                pool.append(Stream(self, f"{self.name}'s stream {priority}/{number}"))
                self.streams.append(pool[number])
            return pool[number]

    def capture_ended(self, pool: Any) -> None:
        """The allocator is told."""
        if pool not in self.captures:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.captures.remove(pool)
        if not self.captures:
            self.deferred = 0

    def __str__(self) -> str:
        return self.name


class Stream:
    """A queue of the GPU: what is done there when its end is reached, by a vector clock."""

    def __init__(self, process: Process, name: str):
        self.process, self._name = process, name
        self.done: Times = {}
        self.count = 0
        self.capture: Capture | None = None
        self._host: Times | None = None  # whose knowledge it has

    def __str__(self) -> str:
        return self._name

    @property
    def cuda(self) -> "Cuda":
        return self.process.cuda

    def touch(self, how: str) -> None:
        """Is this thread allowed to?"""
        thread = self.cuda.thread
        if self.capture is not None and self.capture.thread != threading.get_ident():
            self.cuda.say(f"{self.cuda.where(how)} touches {self}, which another thread captures")
        if thread.process is not self.process:
            self.cuda.say(f"{self.cuda.where(how)}: {self} is another process's")

    def advance(self) -> int:
        """Something is queued: what the host knows to be done comes before it."""
        host = self.cuda.thread.host.knows
        if self._host is not host:
            self.done, self._host = merged(self.done, host), host
        self.count += 1
        self.done[self] = self.count
        return self.count

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or self.cuda.event()
        event.record(self)
        return event

    def wait_event(self, event: "Event") -> None:
        with self.cuda.lock:
            self.touch("wait_event")
            if event.capture is not self.capture:
                self.cuda.say(f"{self.cuda.where('wait_event')}: an event crosses the edge of a capture")
            self.done = merged(self.done, event.done)
            self._host = None

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        with self.cuda.lock:
            self.touch("synchronize")
            self.cuda.host_waits("Stream.synchronize", {**self.done, self: self.count})

    def is_capturing(self) -> bool:
        return self.capture is not None

    def priority_range(self) -> tuple[int, int]:
        return 0, -5


class Event:
    """A place in a stream; as a clock it reads 2 ms more each time."""

    def __init__(self, cuda: "Cuda"):
        self.cuda = cuda
        self.done: Times = {}
        self.capture: Capture | None = None
        self.milliseconds = 0.0

    def record(self, stream: Stream) -> None:
        with self.cuda.lock:
            stream.touch("record_event")
            stream.advance()
            self.done, self.capture = dict(stream.done), stream.capture
            self.cuda.milliseconds += 2.0
            self.milliseconds = self.cuda.milliseconds

    def synchronize(self) -> None:
        with self.cuda.lock:
            if self.capture is not None:
                self.cuda.say(f"{self.cuda.where('synchronize')}: the event is of a capture")
            self.cuda.host_waits("Event.synchronize", self.done)

    def elapsed_time(self, end: "Event") -> float:
        for event in (self, end):
            if not covers(self.cuda.thread.host.knows, event.done):
                self.cuda.say(f"{self.cuda.where('elapsed_time')}: an event is not known to be done")
        return end.milliseconds - self.milliseconds


class Capture:
    """Operations that a stream is asked for while it is captured, and a replay does again.

    What they write over is put back at the end, as nothing has been computed.
    """

    def __init__(self, stream: Stream):
        self.stream = stream
        self.thread = threading.get_ident()
        self.before: dict[Block, tuple[Tensor, Tensor]] = {}
        self.fresh: list[Tensor] = []
        self.operations: list[tuple[Any, Any, Any, list[Tensor | None]]] = []
        self.reads: set[Block] = set()
        self.writes: set[Block] = set()

    def end(self) -> None:
        for whole, values in self.before.values():
            whole.copy_(values)
        for tensor in self.fresh:
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
        self.before.clear()

    def save(self, tensor: Tensor, block: Block) -> None:
        """Keep what is about to be written over."""
        if block not in self.before and not (block.private and block in self.writes):
            storage = tensor.untyped_storage()
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            self.before[block] = whole, whole.clone()

    def add(self, func: Any, args: Any, kwargs: Any, outputs: list[Tensor], fresh: set[int]) -> None:
        kept = [output.data if id(output) in fresh else None for output in outputs]
        self.fresh += [tensor for tensor in kept if tensor is not None]
        args, kwargs = tree_map(lambda x: x.data if isinstance(x, Tensor) else x, (args, kwargs))
        self.operations.append((func, args, kwargs, kept))

    def compute(self) -> None:
        with bare():
            for func, args, kwargs, kept in self.operations:
                for mine, new in zip(kept, tensors_of(func(*args, **kwargs)), strict=False):
                    if mine is not None:
                        mine.copy_(new)


class Graph:
    """A `torch.cuda.CUDAGraph`."""

    def __init__(self, cuda: "Cuda"):
        self._cuda = cuda
        self._capture: Capture | None = None
        self._pool: Any = None
        self._process: Process | None = None
        self._ended = False

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        cuda = self._cuda
        with cuda.lock:
            stream, process = cuda.current_stream(), cuda.thread.process
            if stream is process.default:
                raise RuntimeError("CUDA graphs must be captured on a non-default stream")
            if capture_error_mode != "thread_local":
                cuda.say(f"{cuda.where('capture_begin')} for all threads, but others go on")
            if any(other.capture for other in process.streams):
                cuda.say(f"{cuda.where('capture_begin')} while another capture is under way")
            self._pool, self._process = pool or cuda.pool_handle(), process
            process.draws_captured = True
            process.captures.append(self._pool)
            cuda.refuse_at("begin")
            self._capture = stream.capture = cuda.thread.capture = Capture(stream)
        cuda.captures += 1
        cuda.capture_begun(process)

    def capture_end(self) -> None:
        cuda = self._cuda
        with cuda.lock:
            capture = self._capture
            assert capture is not None
            with bare():
                capture.end()
            capture.stream.capture = cuda.thread.capture = None
            cuda.refuse_at("end")
            assert self._process is not None
            self._process.capture_ended(self._pool)
            self._process.draws_captured = False
            self._ended = True

    def replay(self) -> None:
        capture = self._capture
        assert capture is not None
        assert self._ended
        with self._cuda.lock:
            self._cuda.say_if_capturing("replay")
            if self._cuda.thread.process.draws_captured:
                self._cuda.say(f"{self._cuda.where('replay')} while random numbers are captured")
            self._cuda.launch("replay", self._cuda.current_stream(), capture.reads, capture.writes)
            self._cuda.replays += 1
            capture.compute()


class HostThread:
    """Knows what is done, as one thread of the host does."""

    def __init__(self) -> None:
        self.knows: Times = {}


class ThreadState(threading.local):
    """A thread's own: its process and current stream, what it knows, and its libraries' plans."""

    def __init__(self, process: Process) -> None:
        self.process, self.current = process, process.default
        self.inside = False
        self.host = HostThread()
        self.target: str | None = None
        self.capture: Capture | None = None
        self.planned: set[Any] = set()


class Cuda:
    """The stand-in as a whole.

    Attributes:
        violations: what is wrong with the program, once each.
        refuses: at "begin" or "end": how many captures fail there from now on.
        capture_begun: called in the middle of each capture.
        captures, replays: how many there were.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.processes: list[Process] = []
        self.thread = ThreadState(Process(self, "nobody"))
        self.violations: list[str] = []
        self.refuses: Counter[str] = Counter()
        self.capture_begun: Callable[[Process], None] = lambda process: None
        self.captures = self.replays = 0
        self.milliseconds = 0.0
        self.active = True
        self._handles = 0
        self._schemas: dict[Any, tuple[set[int | str], bool]] = {}

    @contextmanager
    def inside(self, process: Process) -> Iterator[Process]:
        """Let a process, on the GPU, do what this thread does inside."""
        thread = self.thread
        assert not thread.inside
        outside = thread.process, thread.current
        thread.inside, thread.process, thread.current = True, process, process.default
        try:
            with Redirection(self), Tracking(self):
                yield process
        finally:
            thread.inside = False
            thread.process, thread.current = outside

    def say(self, violation: str) -> None:
        with self.lock:
            if self.active and violation not in self.violations:
                self.violations.append(violation)

    def check(self) -> None:
        """Raise where something was wrong.

        Raises:
            AssertionError: with all of it.
        """
        assert not self.violations, "\n".join(["", *self.violations])

    def refuse_at(self, place: str) -> None:
        """Fail as torch up to 2.11 does: before the allocator is told."""
        if self.refuses[place]:
            self.refuses[place] -= 1
            raise RuntimeError("CUDA error: operation not permitted\nsecond line")

    def say_if_capturing(self, what: str) -> None:
        if self.thread.capture is not None:
            self.say(f"{self.where(what)} while this thread captures")

    def where(self, what: str) -> str:
        """Says what is done, and the lines of the package that do it."""
        frame, lines = sys._getframe(1), []
        while frame is not None and len(lines) < 3:
            if frame.f_code.co_filename.startswith(HERE):
                lines.append(f"{os.path.relpath(frame.f_code.co_filename, HERE)}:{frame.f_lineno}")
            frame = frame.f_back  # type: ignore[assignment]  # None ends the loop
        return f"{what} ({' < '.join(lines)}, thread {threading.current_thread().name})"

    # What torch.cuda has

    def event(self, **how: Any) -> Event:
        return Event(self)

    def stream(self, device: Any = None, priority: int = 0) -> Stream:
        return self.thread.process.stream(priority)

    def current_stream(self, device: Any = None) -> Stream:
        return self.thread.current

    def default_stream(self, device: Any = None) -> Stream:
        return self.thread.process.default

    def set_stream(self, stream: Stream) -> None:
        self.thread.current = stream

    @contextmanager
    def use(self, stream: Stream | None) -> Iterator[None]:
        before = self.thread.current
        self.thread.current = stream or before
        try:
            yield
        finally:
            self.thread.current = before

    def pool_handle(self) -> tuple[int, int]:
        self._handles += 1
        return 0, self._handles

    def synchronize(self, device: Any = None) -> None:
        with self.lock:
            streams = self.thread.process.streams
            for stream in streams:
                if stream.capture is not None:
                    self.say(f"{self.where('synchronize')} waits for the device while {stream} is captured")
            done: Times = {}
            for stream in streams:
                done = merged(done, {**stream.done, stream: stream.count})
            self.host_waits("synchronize", done)

    def empty_cache(self) -> None:
        assert not self.thread.process.captures, "captures_underway.empty() INTERNAL ASSERT FAILED"

    def end_allocation(self, device: Any, pool: Any) -> None:
        with self.lock:
            self.thread.process.capture_ended(pool)

    # What happens on the GPU

    def host_waits(self, what: str, done: Times) -> None:
        """From here on this thread of the host knows so much to be done."""
        self.say_if_capturing(what)
        self.know(done)

    def know(self, done: Times) -> None:
        """News of what is done reach this thread."""
        host = self.thread.host
        if not covers(host.knows, done):
            host.knows = merged(host.knows, done)

    def record_stream(self, tensor: Tensor, stream: Stream) -> None:
        block = self.block_of(tensor)
        assert block is not None, "only tensors of the GPU have streams"
        block.recorded.add(stream)

    def launch(self, what: str, stream: Stream, reads: Any, writes: Any) -> Access:
        """Something is queued that reads and writes blocks."""
        where = self.where(what)
        with self.lock:
            stream.touch(what)
            now = Access(stream, stream.advance(), where, self.thread.host)
            done = stream.done
            for block in reads:
                if block.write is not None and not block.write.before(done):
                    self.say(f"{now} reads what is written by {block.write}: unordered")
                block.reads[stream] = block.uses[stream] = now
            for block in writes:
                if block.write is not None and not block.write.before(done):
                    self.say(f"{now} writes what is written by {block.write}: unordered")
                for read in block.reads.values():
                    if not read.before(done):
                        self.say(f"{now} writes what is read by {read}: unordered")
                block.reads.clear()
                block.write = block.uses[stream] = now
            return now

    def freed(self, block: Block) -> None:
        """The allocator may hand the block out again in the stream that it was allocated in."""
        if not self.active or block.private:
            return
        with self.lock:
            if block.recorded:
                block.stream.process.deferred += bool(block.stream.process.captures)
            for stream, use in block.uses.items():
                if stream is block.stream or stream in block.recorded or use.before(block.stream.done):
                    continue
                # A thread that has waited for its own use held the block until then.
                if not use.before(self.thread.host.knows) and not use.before(use.thread.knows):
                    freed = self.where("freed")
                    self.say(f"{freed}: a block of {block.stream} that may still be used by {use}")

    def block_of(self, tensor: Tensor) -> Block | None:
        """The block of a tensor on the GPU."""
        block: Block | None = tensor.untyped_storage().__dict__.get("block")
        return block

    def place(self, tensor: Tensor, private: bool = False) -> Block:
        """Have a new tensor's memory be the GPU's."""
        block = Block(self, self.current_stream(), private)
        tensor.untyped_storage().__dict__["block"] = block
        return block

    def dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operation of torch, as autograd and everybody else asks for it."""
        thread = self.thread
        written, view = self._schema(func)
        inputs = [
            (tensor, index in written) for index, each in enumerate(args) for tensor in tensors_of(each)
        ]
        inputs += [(tensor, name in written) for name, each in kwargs.items() for tensor in tensors_of(each)]
        blocks = [(tensor, self.block_of(tensor), writes) for tensor, writes in inputs]
        on_gpu = any(block is not None for _, block, _ in blocks)
        if view or not (on_gpu or thread.target == "cuda"):
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        on_host = [t for t, block, _ in blocks if block is None and t.dim() and t.untyped_storage().nbytes()]
        copies = name in ("copy_", "_to_copy")
        if on_host and not copies and thread.target is None and not name.startswith("index"):
            self.say(f"{self.where(name)} takes tensors of the host and of the GPU")
        crosses = thread.target is not None if name == "_to_copy" else bool(on_host)
        blocking = not (kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,)))
        empty = not any(tensor.numel() for tensor, _ in inputs)
        waits = name in WAITING or (copies and crosses and blocking and not empty)
        if name.startswith("index"):
            waits = bool(on_host) or any(t.dtype is torch.bool for t, _, _ in blocks[1:] if name == "index")
        stream = self.current_stream()
        capture = thread.capture if thread.capture and thread.capture.stream is stream else None
        if name in OF_A_THREAD:
            self._plan(name, inputs, capture)
        if capture is not None:
            for tensor, block, writes in blocks:
                if writes and block is not None:
                    capture.save(tensor, block)
        outputs = func(*args, **kwargs)
        new = [] if thread.target == "cpu" else self._new(outputs, blocks, capture is not None)
        mine = [(b, w) for t, b, w in blocks if b is not None and t.untyped_storage().nbytes()]
        reads, writes = {b for b, w in mine if not w}, {b for b, w in mine if w}
        writes |= {block for block, tensor in new if tensor.untyped_storage().nbytes()}
        if capture is not None:
            capture.reads |= reads
            capture.writes |= writes
            flat = list(tensors_of(outputs))
            fresh = {id(tensor) for _, tensor in new}
            capture.add(func, args, kwargs, flat, fresh)
        elif reads or writes:
            self.launch(name, stream, reads, writes)
        if waits:
            self.host_waits(name, {**stream.done, stream: stream.count})
        return outputs

    def _new(self, outputs: Any, blocks: Any, private: bool) -> list[tuple[Block, Tensor]]:
        old = {tensor.untyped_storage()._cdata for tensor, _, _ in blocks}
        new = []
        for tensor in tensors_of(outputs):
            if self.block_of(tensor) is None and tensor.untyped_storage()._cdata not in old:
                new.append((self.place(tensor, private), tensor))
        return new

    def _plan(self, name: str, inputs: Any, capture: Capture | None) -> None:
        """Libraries plan at a thread's first use."""
        key = name, tuple(tuple(tensor.shape) for tensor, _ in inputs)
        if capture is None:
            self.thread.planned.add(key)
        elif key not in self.thread.planned:
            self.say(f"{self.where(name)} is captured by a thread that has not computed it before")

    def _schema(self, func: Any) -> tuple[set[int | str], bool]:
        """The arguments that an operation writes, by number and name; and does it only give views?"""
        if func not in self._schemas:
            arguments = func._schema.arguments
            names = [
                (number, argument.name)
                for number, argument in enumerate(arguments)
                if (argument.alias_info is not None and argument.alias_info.is_write)
                or argument.name in UNDECLARED
            ]
            returns = func._schema.returns
            view = bool(returns) and all(
                one.alias_info is not None and not one.alias_info.is_write for one in returns
            )
            self._schemas[func] = {each for pair in names for each in pair}, view
        return self._schemas[func]


class Tracking(TorchDispatchMode):
    """Tells the stand-in of every operation of a thread."""

    def __init__(self, cuda: Cuda):
        super().__init__()
        self._cuda = cuda

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return self._cuda.dispatch(func, args, kwargs or {})


class Redirection(TorchFunctionMode):
    """Has the stand-in's tensors made on the CPU, where a GPU is asked for; they say that they are on it."""

    def __init__(self, cuda: Cuda):
        super().__init__()
        self._cuda = cuda
        self._own = {
            Tensor.device.__get__: self._device,  # type: ignore[attr-defined]
            Tensor.is_cuda.__get__: self._is_cuda,  # type: ignore[attr-defined]
            Tensor.to: self._to,
            Tensor.cpu: lambda tensor: self._to(tensor, "cpu"),
            Tensor.pin_memory: lambda tensor: tensor.clone(),
            Tensor.tolist: self._tolist,
            Tensor.numpy: self._numpy,
            Tensor.__deepcopy__: self._deepcopy,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        own = self._own.get(func)
        if own is not None:
            return own(*args, **kwargs)
        if kwargs.get("device") is None:
            return func(*args, **kwargs)
        target = torch.device(kwargs["device"]).type
        with self._towards(target):
            made = func(*args, **{**kwargs, "device": "cpu"})
        if target == "cuda" and self._cuda.block_of(made) is None:  # made of the host's numbers
            with self._cuda.lock:
                stream = self._cuda.current_stream()
                self._cuda.launch(func.__name__, stream, (), (self._cuda.place(made),))
                self._cuda.host_waits(func.__name__, {**stream.done, stream: stream.count})
        return made

    @contextmanager
    def _towards(self, target: str) -> Iterator[None]:
        before, self._cuda.thread.target = self._cuda.thread.target, target
        try:
            yield
        finally:
            self._cuda.thread.target = before

    def _is_cuda(self, tensor: Tensor) -> bool:
        return self._cuda.block_of(tensor) is not None

    def _device(self, tensor: Tensor) -> torch.device:
        return GPU if self._is_cuda(tensor) else tensor.device

    def _to(self, tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        dtype = dtype or tensor.dtype
        format = {} if memory_format is None else {"memory_format": memory_format}
        if device is None or (device.type == "cuda") == self._is_cuda(tensor):
            return tensor.to("cpu", dtype, non_blocking, copy, **format)
        with self._towards(device.type):
            return tensor.to("cpu", dtype, non_blocking, True, **format)

    def _tolist(self, tensor: Tensor) -> Any:
        return (self._to(tensor, "cpu") if self._is_cuda(tensor) else tensor).tolist()

    def _numpy(self, tensor: Tensor) -> Any:
        if self._is_cuda(tensor):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        return tensor.numpy()

    def _deepcopy(self, tensor: Tensor, memo: Any) -> Any:
        assert not self._is_cuda(tensor), "the stand-in copies no tensor of the GPU that way"
        return Tensor.__deepcopy__(tensor, memo)


# What threads of the host tell each other of


class HostLock:
    """A condition's lock, whose next holder knows what the last one did."""

    def __init__(self, cuda: Cuda):
        self._cuda = cuda
        self._lock: Any = threading.RLock()
        self._host: Times = {}

    def acquire(self) -> None:
        self._lock.acquire()
        self._cuda.know(self._host)

    def release(self) -> None:
        self._host = merged(self._host, self._cuda.thread.host.knows)
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *raised: Any) -> None:
        self.release()

    def _release_save(self) -> Any:
        self._host = merged(self._host, self._cuda.thread.host.knows)
        return self._lock._release_save()

    def _acquire_restore(self, state: Any) -> None:
        self._lock._acquire_restore(state)
        self._cuda.know(self._host)

    def _is_owned(self) -> bool:
        return bool(self._lock._is_owned())


class HostQueue:
    """A `queue.SimpleQueue` whose getter knows what the putter did."""

    def __init__(self, cuda: Cuda):
        self._cuda = cuda
        self._items: Any = _SimpleQueue()

    def put(self, item: Any) -> None:
        self._items.put((self._cuda.thread.host.knows, item))

    def get(self, block: bool = True) -> Any:
        host, item = self._items.get(block)
        self._cuda.know(host)
        return item

    def get_nowait(self) -> Any:
        return self.get(block=False)

    def empty(self) -> bool:
        return bool(self._items.empty())


_SimpleQueue, _Condition, _start = queue.SimpleQueue, threading.Condition, threading.Thread.start


def install(patch: pytest.MonkeyPatch) -> Cuda:
    """Put the stand-in in the place of torch.cuda, and of what threads tell each other by."""
    cuda = Cuda()

    def start(thread: threading.Thread) -> None:
        """A thread is one of its maker's process, and knows what that knew."""
        if cuda.thread.inside:
            process, host, run = cuda.thread.process, cuda.thread.host.knows, thread.run

            def run_inside() -> None:
                with cuda.inside(process):
                    cuda.know(host)
                    run()

            thread.run = run_inside  # type: ignore[method-assign]  # the one that is about to begin
        _start(thread)

    def condition(lock: Any = None) -> threading.Condition:
        """The package's own tell what its threads know; those of Python's thread pools would by chance."""
        ours = sys._getframe(1).f_code.co_filename.startswith(OURS)
        return _Condition(HostLock(cuda) if ours else lock)  # type: ignore[arg-type]  # it has what is called

    stand_ins: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "set_device": lambda device: None,
        "current_device": lambda: 0,
        "_lazy_init": lambda: None,
        "current_stream": cuda.current_stream,
        "default_stream": cuda.default_stream,
        "set_stream": cuda.set_stream,
        "stream": cuda.use,
        "Stream": cuda.stream,
        "Event": cuda.event,
        "synchronize": cuda.synchronize,
        "CUDAGraph": lambda: Graph(cuda),
        "graph_pool_handle": cuda.pool_handle,
        "is_current_stream_capturing": lambda: cuda.thread.capture is not None,
        "empty_cache": cuda.empty_cache,
    }
    for name, stand_in in stand_ins.items():
        patch.setattr(torch.cuda, name, stand_in)
    patch.setattr(Tensor, "record_stream", lambda tensor, stream: cuda.record_stream(tensor, stream))
    patch.setattr(torch.accelerator, "current_stream", cuda.current_stream)
    patch.setattr(torch._C, "_cuda_endAllocateToPool", cuda.end_allocation, raising=False)
    patch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: None, raising=False)
    grouped = torch.optim.Optimizer._group_tensors_by_device_and_dtype

    def group(lists: Any, **how: Any) -> Any:
        """By the devices that tensors say they are on."""
        found = grouped(lists, **how)
        return {
            (value[0][0][0].device, *key[1:]) if value[0][0] and value[0][0][0] is not None else key: value
            for key, value in found.items()
        }

    patch.setattr(torch.optim.Optimizer, "_group_tensors_by_device_and_dtype", staticmethod(group))
    patch.setattr(threading.Thread, "start", start)
    patch.setattr(threading, "Condition", condition)
    patch.setattr(queue, "SimpleQueue", lambda: HostQueue(cuda))
    return cuda


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    """The stand-in; what is freed after the test is not looked at."""
    cuda = install(monkeypatch)
    yield cuda
    cuda.active = False


@pytest.fixture
def process(cuda: Cuda) -> Iterator[Process]:
    """The test is a process on the GPU."""
    with cuda.inside(Process(cuda, "one")) as process:
        yield process
