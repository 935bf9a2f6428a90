"""How the C library hands out large blocks of memory: what lasts apart from what comes and goes."""

import ctypes
import math
import mmap
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
LARGEST_BYTES = 2**31 - 1
OLD_LARGEST_BYTES = 2**25
"""the highest threshold that older versions of glibc take"""
LASTING_BYTES = 2**17
"""from which on a block that lasts has pages of its own"""


@contextmanager
def lasting_blocks() -> Iterator[None]:
    """What is allocated inside stays: weights, states of optimizers, data. Each large block gets pages of its
    own, which the system has back when it is freed.

    Otherwise they would lie among blocks that come and go, and what these leave free between them, in pieces
    too small for the next ones, would grow with every client. Afterwards `keep_large_blocks` holds.
    """
    _set_thresholds(LASTING_BYTES)
    try:
        yield
    finally:
        keep_large_blocks()


def keep_large_blocks() -> None:
    """From now on have large blocks taken from memory that is kept, not from fresh pages each time.

    Activations and received tensors are such blocks: mapping and clearing their pages costs more than
    receiving them.
    """
    _set_thresholds(LARGEST_BYTES)


def _set_thresholds(size: int) -> None:
    """Does nothing where the C library is not glibc."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        if not mallopt(MMAP_THRESHOLD, size):
            mallopt(MMAP_THRESHOLD, OLD_LARGEST_BYTES)
        mallopt(TRIM_THRESHOLD, size)


def on_own_pages(shape: Sequence[int], like: Tensor) -> Tensor:
    """A tensor of such numbers and on such a device, uninitialised; in host memory on pages of its own, also
    where there is room among the blocks that come and go.
    """
    size = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or not size:
        return like.new_empty(shape)
    return torch.frombuffer(mmap.mmap(-1, size, access=mmap.ACCESS_COPY), dtype=like.dtype).view(shape)
