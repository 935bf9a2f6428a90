"""How the C library hands out large blocks of memory."""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
LARGEST_BYTES = 2**31 - 1


def keep_large_blocks() -> None:
    """Have blocks of 32 MiB and more taken from memory that is kept, not from fresh pages each time.

    Received tensors are such blocks: mapping and clearing their pages costs more than receiving them. Does
    nothing where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, LARGEST_BYTES)
        mallopt(TRIM_THRESHOLD, LARGEST_BYTES)
