"""A host's memory: how much there is, how much a process takes, and how the C library hands out
large blocks of it, what lasts apart from what comes and goes.
"""

import ctypes
import math
import mmap
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from fslsage_rpc.units import KIB

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # glibc's malloc.h
LARGEST_BYTES = 2**31 - 1
OLD_LARGEST_BYTES = 2**25
"""the highest threshold that older versions of glibc take"""
LASTING_BYTES = 2**17
"""from which on a block that lasts has pages of its own"""


def physical_memory() -> int | None:
    """Bytes of this host's memory, where the system says."""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def status_bytes(key: str) -> int | None:
    """Bytes of memory that the kernel says of this process: `VmRSS` now, `VmHWM` at most so far.

    Returns:
        None where it does not say.
    """
    with suppress(OSError):
        found = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        return int(found[1]) * KIB if found else None
    return None


def forget_host_peak() -> None:
    """Begin to look for the peak of `status_bytes` anew, where the system allows.

    Free pages that the heap keeps from an earlier training would count, so they are given back first.
    """
    give_back_free_pages()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS, and nothing else


def one_heap() -> None:
    """From now on no thread gets a heap of its own, so called before others are started.

    Each such heap would keep what its thread needed at its worst moment, and what a thread of the transport
    takes another one frees: the more requests a round has, the more of that there is.
    """
    _set(ARENA_MAX, 1)


@contextmanager
def lasting_blocks() -> Iterator[None]:
    """What is allocated inside stays: weights, states of optimizers, data. Each large block gets pages of its
    own, which the system has back when it is freed.

    Otherwise they would lie among blocks that come and go, and what these leave free between them, in pieces
    too small for the next ones, would grow with every client. Afterwards `keep_large_blocks` holds, and what
    the preparation has left free is the system's again.
    """
    _set(MMAP_THRESHOLD, LASTING_BYTES)
    _set(TRIM_THRESHOLD, LASTING_BYTES)
    try:
        yield
    finally:
        keep_large_blocks()
        give_back_free_pages()


def give_back_free_pages() -> None:
    """Let the system have the heap's pages that hold nothing.

    What stays, however small, lies where there was room when it came, and may split a place that the next
    large block would have taken: then the heap grows, although much of it is free.
    """
    _call("malloc_trim", 0)


def keep_large_blocks() -> None:
    """From now on have large blocks taken from memory that is kept, not from fresh pages each time.

    Activations and received tensors are such blocks: mapping and clearing their pages costs more than
    receiving them.
    """
    if not _set(MMAP_THRESHOLD, LARGEST_BYTES):
        _set(MMAP_THRESHOLD, OLD_LARGEST_BYTES)
    _set(TRIM_THRESHOLD, LARGEST_BYTES)


def _set(parameter: int, value: int) -> bool:
    """Set one of malloc's parameters.

    Returns:
        Has it been taken? Not where the C library is not glibc.
    """
    return _call("mallopt", parameter, value)


def _call(function: str, *arguments: int) -> bool:
    """A function of glibc's; where there is none, false."""
    there = getattr(ctypes.CDLL(None), function, None) if sys.platform.startswith("linux") else None
    return there is not None and bool(there(*arguments))


def on_own_pages(shape: Sequence[int], like: Tensor) -> Tensor:
    """A tensor of such numbers and on such a device, uninitialised; in host memory on pages of its own, also
    where there is room among the blocks that come and go.
    """
    size = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or not size:
        return like.new_empty(shape)
    return torch.frombuffer(mmap.mmap(-1, size, access=mmap.ACCESS_COPY), dtype=like.dtype).view(shape)
