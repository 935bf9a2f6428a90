"""Random delays in front of the work of every phase, which must change no number.

On a GPU they are queued where the work will be: its stream comes to it later than others expect. On a CPU the
thread sleeps.
"""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fslsage_rpc.measure.timeline import Timeline

LONGEST_SECONDS = 0.003
CYCLES_PER_SECOND = 1.5e9
"""about, of a GPU"""


def delayed_phase(seed: int) -> Any:
    """A `Timeline.phase` that begins late, but for waits."""
    delays, undelayed = random.Random(seed), Timeline.phase

    @contextmanager
    def phase(timeline: Timeline, name: str, *arguments: Any, **keys: Any) -> Iterator[None]:
        with undelayed(timeline, name, *arguments, **keys):
            if not name.endswith("_wait"):
                delay(delays.uniform(0, LONGEST_SECONDS), timeline._device)
            yield

    return phase


def delay(seconds: float, device: torch.device) -> None:
    """Let the current stream, or on a CPU this thread, do nothing for so long."""
    if device.type == "cuda":
        torch.cuda._sleep(int(seconds * CYCLES_PER_SECOND))
    else:
        time.sleep(seconds)
