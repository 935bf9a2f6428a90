"""The clocks that everything is measured with: the host's, and a GPU's."""

import time

import torch

clock = time.perf_counter


def synchronise(device: torch.device) -> None:
    """Wait for all that the host has queued on a GPU, on whatever stream; for the ends of a round."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def synchronise_stream(device: torch.device) -> None:
    """Wait for what this thread has queued in its current stream of a GPU."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def device_clock(device: torch.device) -> torch.cuda.Event | None:
    """Reads the device's clock when the device gets to here in the thread's current stream; None on a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_stream(device).record_event(torch.cuda.Event(enable_timing=True))
