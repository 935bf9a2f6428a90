"""The clocks that everything is measured with: the host's, and a GPU's."""

import threading
import time
from collections.abc import Hashable
from typing import Generic, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)
Reading = torch.cuda.Event | None
"""of a GPU's clock, made when the GPU gets there; None on a CPU, which has no such clock"""

clock = time.perf_counter

cpu_clock = time.thread_time
"""CPU seconds of the calling thread"""


def synchronise(device: torch.device) -> None:
    """Wait for all that the host has queued on a GPU, on whatever stream; for the ends of a round."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def synchronise_stream(device: torch.device) -> None:
    """Wait for what this thread has queued in its current stream of a GPU."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def device_clock(device: torch.device) -> Reading:
    """Reads the device's clock when the device gets to here in the thread's current stream; None on a CPU."""
    if device.type != "cuda":
        return None
    reading: Reading = torch.cuda.current_stream(device).record_event(torch.cuda.Event(enable_timing=True))
    return reading


class DeviceIntervals(Generic[Key]):
    """Seconds between two readings of a device's clock, summed by key; any thread may add.

    Nobody waits for the device until they are taken, at the end of a round.
    """

    def __init__(self) -> None:
        self._readings: list[tuple[Key, torch.cuda.Event, torch.cuda.Event]] = []
        self._lock = threading.Lock()

    def add(self, key: Key, began: Reading, ended: Reading) -> None:
        """Count an interval; there is none on a CPU."""
        if began is not None and ended is not None:
            with self._lock:
                self._readings.append((key, began, ended))

    def take(self) -> dict[Key, float]:
        """The sums so far; they start again from zero. Waits for the device to have come to the ends."""
        with self._lock:
            taken, self._readings = self._readings, []
        seconds: dict[Key, float] = {}
        for key, began, ended in taken:
            ended.synchronize()
            seconds[key] = seconds.get(key, 0.0) + began.elapsed_time(ended) / 1000
        return seconds
