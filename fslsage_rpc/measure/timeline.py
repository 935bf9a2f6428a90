"""Where the host's time went: seconds per phase on one timeline, phases never overlapping."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

clock = time.perf_counter


def synchronise(device: torch.device) -> None:
    """Wait for what the host has queued on a GPU, so that the phase that queued it is charged with it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Timeline:
    """Seconds per named phase of one thread.

    Phases do not nest: entering one while another is open is a mistake in the program, not in the
    measurement.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: str | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a phase."""
        if self._open is not None:
            raise RuntimeError(f"phase {name} opened inside phase {self._open}")
        self._open = name
        started = clock()
        try:
            yield
        finally:
            self._open = None
            self.add(name, clock() - started)

    def add(self, name: str, seconds: float) -> None:
        """Add measured seconds to a phase."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """The seconds so far; the timeline starts again from zero."""
        taken, self.seconds = self.seconds, {}
        return taken
