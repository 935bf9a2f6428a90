"""How a fault on one rank ends all of them: in bounded time, with one message."""

import os
import sys
import threading
import time
from collections.abc import Collection
from datetime import timedelta

from torch.distributed import Store

PERIOD_SECONDS = 1.0
GRACE_SECONDS = 3.0
"""how long a rank that lost its connection waits for the guilty rank's own message"""


class Watchdog:
    """Shares failures and signs of life through the job's store, on a thread and a connection of its own.

    The first rank to `claim` a failure prints it; every other rank that sees the claim ends silently. A rank
    that gives no sign of life for `timeout_seconds` is claimed as lost by the rank that watches it: rank 0
    watches all, all watch rank 0. Ranks blocked inside a collective end too, as the thread ends the process.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout_seconds: float):
        self._store = store
        self._rank = rank
        self._watch([r for r in range(size) if r != rank] if rank == 0 else [0])
        self._timeout_seconds = timeout_seconds
        self._stopped = threading.Event()
        self._reported = False
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        store.set_timeout(timedelta(seconds=max(timeout_seconds, 10.0)))

    def start(self) -> None:
        """Begin to give and watch signs of life."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, before the store goes away."""
        self._stopped.set()
        self._thread.join()

    def claim(self, wait: bool = False) -> bool:
        """Is this rank the first to report a failure, so that it should print it?

        Args:
            wait: the failure may be another rank's doing; give that rank time to claim first.
        """
        deadline = time.monotonic() + (GRACE_SECONDS if wait else 0.0)
        self._reported = True
        try:
            while wait and time.monotonic() < deadline:
                if self._store.check(["failure"]):
                    return False
                time.sleep(0.05)
            return self._store.compare_set("failure", "", str(self._rank)).decode() == str(self._rank)
        except RuntimeError:
            return True  # the store has gone with the launcher or rank 0: nobody else can say it

    def _watch(self, ranks: Collection[int]) -> None:
        """Look for these ranks' signs of life from now on: by rank, the last one and when it came."""
        self._signs = dict.fromkeys(ranks, (b"", time.monotonic()))

    def _pause(self) -> bool:
        """Until the next look; has the thread to end?"""
        return self._stopped.wait(PERIOD_SECONDS)

    def _look(self) -> None:
        """What a subclass has to look for besides."""

    def _silent(self, rank: int) -> None:
        """A watched rank is lost."""
        self._end(f"rank {rank} has given no sign of life for {self._timeout_seconds:g} s")

    def _run(self) -> None:
        """Beat, look for a claimed failure, and look for silence; until stopped."""
        beats = 0
        while not self._pause() and not self._reported:
            beats += 1
            # Where the store's host is silent, so is the store: then this thread never returns from it.
            alarm = threading.Timer(self._timeout_seconds, self._end, ["the job's store has not answered"])
            alarm.daemon = True
            alarm.start()
            try:
                self._store.set(f"beat/{self._rank}", str(beats))
                if self._store.check(["failure"]) and not self._reported:
                    os._exit(1)
                self._look()
                signs = self._signs
                for rank, (seen, _) in signs.items():
                    beat = self._store.get(f"beat/{rank}") if self._store.check([f"beat/{rank}"]) else b""
                    if beat != seen:
                        signs[rank] = beat, time.monotonic()
            except RuntimeError as error:
                if not self._stopped.is_set():
                    self._end(
                        f"lost the job's store, so rank 0 or its launcher is gone ({type(error).__name__})"
                    )
                return
            finally:
                alarm.cancel()
            for rank, (_, came) in signs.items():
                if time.monotonic() - came > self._timeout_seconds:
                    self._silent(rank)

    def _end(self, message: str) -> None:
        if self._reported:
            return  # the main thread is about to end the process
        # A silent store answers no claim.
        last_resort = threading.Timer(GRACE_SECONDS, self._print_and_exit, [message])
        last_resort.daemon = True
        last_resort.start()
        if self.claim():
            self._print_and_exit(message)
        os._exit(1)

    def _print_and_exit(self, message: str) -> None:
        print(f"fslsage_rpc: rank {self._rank}: {message}", file=sys.stderr, flush=True)
        os._exit(1)
