"""CUDA graphs: the kernels of a step are captured once and queued again in one call, not one call for each.

What is captured must run on a stream that is not the device's default one (`open_device`, `WorkQueue`), do
nothing that waits for the device, and find its weights and optimizer states where they were: they are only
ever changed in place. Where torch or CUDA refuses, the steps run as they would without graphs.
"""

import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from fslsage_rpc.parties.optimizers import ScheduledOptimizer

Tensors = tuple[Tensor, ...]
SHAPES = 4
"""captured for one computation; batches of any further shape are computed without"""

_one_at_a_time = threading.Lock()  # torch supports one capture in a process
_thread = threading.local()


def can_capture(device: torch.device) -> bool:
    """Are there graphs on this kind of device?"""
    return device.type == "cuda"


def capture(work: Callable[[], Tensors], pool: Any) -> tuple[Callable[[], None], Tensors]:
    """Have work done later, as often as is wanted: it is written down, and nothing is computed now.

    Not by `torch.cuda.graph`, which waits for the whole device: other lanes go on meanwhile, and their
    threads may do what would be an error in a process that captures in all its threads.

    Returns:
        What queues the work on the current stream, and the tensors that it writes each time.
    """
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        outputs = work()
    except BaseException:
        with suppress(RuntimeError):
            graph.capture_end()
        raise
    graph.capture_end()
    return graph.replay, outputs


class Captured:
    """A computation for tensors of fixed shapes, which it is given in tensors of its own."""

    def __init__(self, compute: Callable[..., Tensors], like: Tensors, pool: Any):
        self._inputs = tuple(tensor.detach().clone() for tensor in like)
        self._replay, outputs = capture(lambda: compute(*self._inputs), pool)
        self.outputs = tuple(tensor.detach() for tensor in outputs)

    def __call__(self, *inputs: Tensor) -> Tensors:
        """The outputs for these inputs; copies, as the next call writes over the graph's own."""
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given.detach())
        self._replay()
        return tuple(tensor.clone() for tensor in self.outputs)


class Graphed:
    """A computation that is captured for each shape of its inputs, or not, with the same results.

    The first call for a shape computes as usual, by which everything is there that a graph must find: states
    of optimizers, handles of libraries, plans of convolutions. The second one captures. Called by one thread
    at a time.

    Args:
        compute: from tensors to tensors; it may change weights and states in place.
        enabled: else every call computes as usual.
        optimizer: that `compute` (or `then`) applies, if any.
        then: a second half, as a backward pass: from the first output, with its autograd graph, and a tensor
            like it, to nothing.
    """

    def __init__(
        self,
        compute: Callable[..., Tensors],
        enabled: bool,
        optimizer: ScheduledOptimizer | None = None,
        then: Callable[[Tensor, Tensor], None] | None = None,
    ):
        self._compute = compute
        self._enabled = enabled
        self._optimizer = optimizer
        self._then = then
        self._seen: set[Any] = set()
        self._captured: dict[Any, tuple[Captured, Captured | None, Any]] = {}
        self._pool: Any = None
        self._held: Tensor | None = None
        self._given: tuple[Tensor, Captured] | None = None  # the last first half, if it was a graph's

    @property
    def shapes(self) -> int:
        """For how many shapes there is a graph."""
        return len(self._captured)

    def __call__(self, *inputs: Tensor) -> Tensors:
        """The first half, or all of it."""
        self._given = None
        halves = self._halves(inputs) if self._enabled else None
        if halves is None:
            return self._compute(*inputs)
        first, second = halves
        outputs = first(*inputs)
        if second is not None:
            self._given = outputs[0], second
        return outputs

    def finish(self, output: Tensor, tensor: Tensor) -> None:
        """The second half, of the call that gave this output."""
        assert self._then is not None
        if self._given is not None and self._given[0] is output:
            self._given[1](tensor)
        else:
            self._then(output, tensor)
        self._given = None

    def _halves(self, inputs: Tensors) -> tuple[Captured, Captured | None] | None:
        """The graphs for inputs of these shapes, if there are any or it is time to capture them."""
        key = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        constants = None
        if self._optimizer is not None:
            self._optimizer.place_rate()
            constants = self._optimizer.constants()
        if key in self._captured:
            first, second, then = self._captured[key]
            return (first, second) if then == constants else None
        warm = key in self._seen and getattr(_thread, "warm", False)
        self._seen.add(key)
        _thread.warm = True  # libraries' handles are a thread's own
        if not warm or len(self._captured) == SHAPES:
            return None
        try:
            first, second = self._capture(inputs)
        except RuntimeError as error:
            self._enabled = False
            self._held = None
            if self._optimizer is not None:
                self._optimizer.clear()
            reason = str(error).partition("\n")[0]
            warnings.warn(f"graphs: could not capture ({reason}): such steps run without", stacklevel=2)
            return None
        self._captured[key] = first, second, constants
        return first, second

    def _capture(self, inputs: Tensors) -> tuple[Captured, Captured | None]:
        if self._pool is None and inputs[0].is_cuda:
            self._pool = torch.cuda.graph_pool_handle()
        captured = self._optimizer.captured() if self._optimizer is not None else nullcontext()
        with _one_at_a_time, captured:
            if self._then is None:
                return Captured(self._compute, inputs, self._pool), None
            first = Captured(self._first_half, inputs, self._pool)
            second = Captured(self._second_half, first.outputs, self._pool)
        self._held = None
        return first, second

    def _first_half(self, *inputs: Tensor) -> Tensors:
        outputs = self._compute(*inputs)
        self._held = outputs[0]
        return outputs

    def _second_half(self, tensor: Tensor) -> Tensors:
        assert self._then is not None
        assert self._held is not None
        self._then(self._held, tensor)
        return ()
