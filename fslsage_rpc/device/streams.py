"""Streams of a GPU: work is queued by the host and done later, so what depends on it waits for its place in a
stream, and the host goes on.

On a CPU work is done when the call that does it returns, and all of this does nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fslsage_rpc.device.clock import Reading, device_clock

Place = Reading
"""A place in a stream: the device gets there when it has done all that was queued before. None on a CPU."""

STREAMS = 32
"""that torch has for a device and a priority: further queues share them, between each other's work"""
PRIORITY = -1
"""of our streams. torch's RPC, whose threads take streams in turn, takes those of the lowest and the highest
priority: it would queue between our work, which does harm while that is captured as a graph"""


def can_capture(device: torch.device) -> bool:
    """Can CUDA graphs be captured here? A GPU needs a priority between the lowest, 0, and the highest."""
    if device.type != "cuda":
        return False
    _, highest = torch.cuda.current_stream(device).priority_range()
    return highest < PRIORITY


def own_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream of a GPU for what one thread at a time queues; what the caller has queued comes first."""
    stream = torch.cuda.Stream(device, priority=PRIORITY)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream


def current_place(device: torch.device) -> Place:
    """The place that the calling thread's current stream has got to; it can be read as a clock."""
    return device_clock(device)


class WorkQueue:
    """Where a lane, or a fit, queues its work: a stream of its own beside all others of its GPU.

    Without a stream (on a CPU, or where one thread does everything) work is queued where the caller is.
    """

    def __init__(self, stream: torch.cuda.Stream | None = None):
        self._stream = stream

    @classmethod
    def beside_others(cls, device: torch.device) -> "WorkQueue":
        """A queue with a stream of its own, on a GPU; what the caller has queued so far comes first."""
        return cls(own_stream(device)) if device.type == "cuda" else cls()

    @contextmanager
    def after(self, place: Place) -> Iterator[None]:
        """What this thread queues inside goes here, and comes after a place in some other stream."""
        if self._stream is None or place is None:
            yield
            return
        self._stream.wait_event(place)
        with torch.cuda.stream(self._stream):  # makes its device the thread's current one, too
            yield

    def keep(self, *tensors: Tensor) -> None:
        """Tensors that were made on another stream: when they are freed, their memory is used again only
        after what is queued here by then.
        """
        for tensor in tensors:
            if self._stream is not None and tensor.is_cuda:
                tensor.record_stream(self._stream)

    def end(self) -> Place:
        """The end of the queue, for a thread that waits there asleep; None where all is done."""
        if self._stream is None:
            return None
        place: Place = self._stream.record_event(torch.cuda.Event(blocking=True))
        return place

    def wait(self) -> None:
        """Until the device has done all that was queued here so far."""
        if self._stream is not None:
            self._stream.synchronize()
