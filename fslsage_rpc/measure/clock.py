"""The clock that everything is measured with, and when a GPU's work counts as done."""

import time

import torch

clock = time.perf_counter


def synchronise(device: torch.device) -> None:
    """Wait for what the host has queued on a GPU, so that the phase that queued it is charged with it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
