"""Where the time went: seconds per phase on one timeline of the host, phases never overlapping."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fslsage_rpc.device.clock import DeviceIntervals, Reading, clock, cpu_clock, device_clock
from fslsage_rpc.device.placement import CPU
from fslsage_rpc.measure.trace import Arrow, Span, Tracer


class Timeline:
    """Seconds per named phase of one thread of the host; another one may take them.

    Phases do not nest: entering one while another is open is a mistake in the program, not in the
    measurement. On a GPU the host only queues the work of a phase; what the device took for it stands apart.

    Args:
        row: the row of a trace that its phases are drawn on, unless they name another.
        tracer: gets every phase as a span; None where there is no trace.
        device: that phases, but for waits, queue work on.
    """

    def __init__(
        self, row: str = "", tracer: Tracer | None = None, device: torch.device | None = None
    ) -> None:
        self.seconds: dict[str, float] = {}
        self._cpu_seconds: dict[str, float] = {}
        self.row = row
        self._tracer = tracer
        self._device = device or CPU
        self._on_device: DeviceIntervals[str] = DeviceIntervals()
        self._open: str | None = None
        self._cpu_began = 0.0  # of the open phase, or its last pause ended, and on the device:
        self._began: Reading = None
        self._lock = threading.Lock()

    @property
    def open_phase(self) -> str | None:
        """The phase that is under way."""
        return self._open

    @contextmanager
    def phase(self, name: str, row: str | None = None, arrow: Arrow | None = None) -> Iterator[None]:
        """Add the time spent inside to a phase.

        Args:
            row: of a trace.
            arrow: begins or ends here.
        """
        if self._open is not None:
            raise RuntimeError(f"phase {name} opened inside phase {self._open}")
        self._open = name
        started = clock()
        self._work(name)
        try:
            yield
        finally:
            self._open = None
            self._pause(name)
            self.add(name, started, clock() - started, row, arrow)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Neither a CPU's nor a device's seconds of the open phase are counted inside; those so far may be
        taken.
        """
        name = self._open
        assert name is not None
        self._pause(name)
        try:
            yield
        finally:
            self._work(name)

    def add(
        self, name: str, started: float, seconds: float, row: str | None = None, arrow: Arrow | None = None
    ) -> None:
        """Add a measured phase that began at a reading of the clock."""
        with self._lock:
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        if self._tracer is not None:
            self._tracer.add(Span(name, row or self.row, started, seconds, arrow))

    def _work(self, name: str) -> None:
        self._cpu_began = cpu_clock()
        self._began = None if name.endswith("_wait") else device_clock(self._device)

    def _pause(self, name: str) -> None:
        began, cpu_seconds = self._began, cpu_clock() - self._cpu_began
        self._on_device.add(name, began, began and device_clock(self._device))
        with self._lock:
            self._cpu_seconds[name] = self._cpu_seconds.get(name, 0.0) + cpu_seconds

    def take(self) -> dict[str, float]:
        """The seconds so far; the timeline starts again from zero."""
        with self._lock:
            taken, self.seconds = self.seconds, {}
        return taken

    def take_cpu_seconds(self) -> dict[str, float]:
        """Per phase, the CPU seconds of the threads that were in it so far; starts again from zero."""
        with self._lock:
            taken, self._cpu_seconds = self._cpu_seconds, {}
        return taken

    def take_device_seconds(self) -> dict[str, float]:
        """Per phase, from when the device came to its work until it had done it, gaps between kernels
        included; starts again from zero. Empty on a CPU. For the end of a round: it waits for the device.
        """
        return self._on_device.take()
