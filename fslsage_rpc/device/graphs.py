"""CUDA graphs: the kernels of a step are captured once and queued again in one call, not one call for each.

What is captured must run on a stream that nobody else queues in meanwhile (`open_device`, `WorkQueue`), do
nothing that waits for the device, and find its weights and optimizer states where they were: they are only
ever changed in place. Where torch or CUDA refuses, the steps run as they would without graphs.
"""

import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, Protocol

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
Compute = Callable[..., Tensors]
Then = Callable[[Tensor, Tensor], None]


class CapturedOptimizer(Protocol):
    """An optimizer whose steps can be captured: see `ScheduledOptimizer`."""

    def place_rate(self) -> None: ...
    def constants(self) -> dict[str, Any]: ...
    def captured(self) -> AbstractContextManager[None]: ...
    def clear(self) -> None: ...


SHAPES = 4
"""captured for one computation; batches of any further shape are computed without"""

_one_at_a_time = threading.Lock()
"""torch supports one capture in a process; up to 2.11 a replay fails, too, while another thread captures, as
all graphs of a device share the state of its random generator"""


def capture(work: Callable[[], Tensors], pool: Any) -> tuple[Callable[[], None], Tensors]:
    """Have work done later, as often as is wanted: it is written down, and nothing is computed now.

    Not by `torch.cuda.graph`, which waits for the whole device: other lanes go on meanwhile, and their
    threads may do what would be an error in a process that captures in all its threads.

    Returns:
        What queues the work on the current stream, and the tensors that it writes each time.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            outputs = work()
        except BaseException:
            with suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()
    except BaseException:
        _clean_up(graph, pool)
        raise
    return graph.replay, outputs


_failed: list[torch.cuda.CUDAGraph] = []
"""kept, as torch's allocator of pinned memory goes on to ask a graph of 2.11 whose capture failed"""


def _clean_up(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """Let torch go on, after a capture that failed, as if it had not been begun.

    Up to 2.11 `capture_end`, and `capture_begin`, throw before the allocator is told: it would go on to take
    this thread's blocks from the pool, keep those that other streams have used for ever, and fail an
    assertion in `empty_cache`. And the device's random generator would take itself for captured, so that
    every draw and every replay failed, until the end of a capture that succeeds: here of one small kernel.
    """
    _failed.append(graph)
    device = torch.cuda.current_device()
    with suppress(RuntimeError):  # it has been told
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
    scratch = torch.zeros(1, device=device)
    pool = torch.cuda.graph_pool_handle()
    graph = torch.cuda.CUDAGraph()
    try:
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        scratch.zero_()
        graph.capture_end()
    except RuntimeError:  # nothing can be captured here
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device, pool)


class Captured:
    """A computation for tensors of fixed shapes, which it is given in tensors of its own."""

    def __init__(self, compute: Compute, like: Tensors, pool: Any):
        self._inputs = tuple(tensor.detach().clone() for tensor in like)
        self._replay, outputs = capture(lambda: compute(*self._inputs), pool)
        self.outputs = tuple(tensor.detach() for tensor in outputs)

    def __call__(self, *inputs: Tensor) -> Tensors:
        """The outputs for these inputs; copies, as the next call writes over the graph's own."""
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given.detach())
        with _one_at_a_time:
            self._replay()
        return tuple(tensor.clone() for tensor in self.outputs)


class Graphed:
    """A computation that is captured for each shape of its inputs, or not, with the same results.

    A thread's first call for a shape computes as usual, by which everything is there that a graph must find:
    states of optimizers, handles of libraries and plans of convolutions, which are a thread's own. The second
    one captures. Called by one thread at a time, and always for the same computation: it is not kept, as it
    is its owner's, who keeps this.

    Args:
        enabled: else every call computes as usual.
        optimizer: that the computation applies, if any.
    """

    def __init__(self, enabled: bool, optimizer: CapturedOptimizer | None = None):
        self._enabled = enabled
        self._optimizer = optimizer
        self._seen: set[Any] = set()
        self._captured: dict[Any, tuple[Captured, Captured | None, Any]] = {}
        self._pool: Any = None
        self._given: tuple[Tensor, Captured] | None = None  # the last first half, if it was a graph's

    @property
    def shapes(self) -> int:
        """For how many shapes there is a graph."""
        return len(self._captured)

    def __call__(self, compute: Compute, *inputs: Tensor, then: Then | None = None) -> Tensors:
        """Compute from tensors to tensors; weights and states may change in place.

        Args:
            then: the second half, as a backward pass, which `finish` computes.
        """
        self._given = None
        halves = self._halves(compute, inputs, then) if self._enabled else None
        if halves is None:
            return compute(*inputs)
        first, second = halves
        outputs = first(*inputs)
        if second is not None:
            self._given = outputs[0], second
        return outputs

    def finish(self, then: Then, output: Tensor, tensor: Tensor) -> None:
        """The second half of the call whose first output this was, with a tensor like it."""
        if self._given is not None and self._given[0] is output:
            self._given[1](tensor)
        else:
            then(output, tensor)
        self._given = None

    def _halves(
        self, compute: Compute, inputs: Tensors, then: Then | None
    ) -> tuple[Captured, Captured | None] | None:
        """The graphs for inputs of these shapes, if there are any or it is time to capture them."""
        key = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        constants = None
        if self._optimizer is not None:
            self._optimizer.place_rate()
            constants = self._optimizer.constants()
        if key in self._captured:
            first, second, at_capture = self._captured[key]
            return (first, second) if at_capture == constants else None
        by_thread = (threading.get_ident(), key)
        warm = by_thread in self._seen
        self._seen.add(by_thread)
        if not warm or len(self._captured) == SHAPES:
            return None
        try:
            first, second = self._capture(compute, inputs, then)
        except RuntimeError as error:
            self._enabled = False
            if self._optimizer is not None:
                self._optimizer.clear()
            reason = str(error).partition("\n")[0]
            warnings.warn(f"graphs: could not capture ({reason}): such steps run without", stacklevel=2)
            return None
        self._captured[key] = first, second, constants
        return first, second

    def _capture(
        self, compute: Compute, inputs: Tensors, then: Then | None
    ) -> tuple[Captured, Captured | None]:
        if self._pool is None and inputs[0].is_cuda:
            self._pool = torch.cuda.graph_pool_handle()
        held: list[Tensor] = []  # the first output, with the autograd graph that the second half goes through

        def first_half(*inputs: Tensor) -> Tensors:
            outputs = compute(*inputs)
            held[:] = outputs[:1]
            return outputs

        def second_half(tensor: Tensor) -> Tensors:
            assert then is not None
            then(held[0], tensor)
            return ()

        captured = self._optimizer.captured() if self._optimizer is not None else nullcontext()
        with _one_at_a_time, captured:
            if then is None:
                return Captured(compute, inputs, self._pool), None
            first = Captured(first_half, inputs, self._pool)
            return first, Captured(second_half, first.outputs[:1], self._pool)
