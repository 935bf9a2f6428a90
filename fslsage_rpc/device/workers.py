"""Threads for the server's work on a rank of the real transport."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from fslsage_rpc.device.cores import server_workers


class Workers:
    """Runs pieces of work of several kinds, those of one kind on at most `server_workers` threads.

    On a CPU the first free thread takes the next piece. On a GPU all pieces of one lane, or of one fit, have
    one thread: cuBLAS's workspaces and cuDNN's plans are a thread's own. On several threads they would
    multiply, and a thread might make its first ones while it captures.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._pools: dict[tuple[str, int], ThreadPoolExecutor] = {}

    def start(self, kind: str, number: int, work: Callable[[], None]) -> None:
        """Run a piece of work.

        Args:
            number: of the lane or fit that it is of.
        """
        threads, pool = server_workers(self._device), 0
        if self._device.type == "cuda":
            threads, pool = 1, number % threads
        if (kind, pool) not in self._pools:
            new = ThreadPoolExecutor(threads, thread_name_prefix=kind)
            self._pools.setdefault((kind, pool), new)  # another thread may have been first
        self._pools[kind, pool].submit(work)

    def dissolve(self) -> None:
        """Wait for what runs, and drop what has yet to begin."""
        while self._pools:  # what still runs in one may start another
            _, pool = self._pools.popitem()
            pool.shutdown(cancel_futures=True)
