"""How a fault on one rank ends all of them: in bounded time, with one message."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from typing import NoReturn

from torch.distributed import Store

from fslsage_rpc.comm.connections import Patience
from fslsage_rpc.comm.roll_call import FAILURE, Presence

PERIOD_SECONDS = 1.0
CONNECTING_SECONDS = 30.0
"""how long connecting may take at least"""
GRACE_SECONDS = 3.0
"""how long a rank that lost a connection waits for the guilty rank's own message, and for signs of life"""


def leave(status: int, hosts_store: bool) -> NoReturn:
    """End the process at once: sys.exit would wait for threads that wait for ranks that are gone."""
    with suppress(OSError):  # nobody reads it any more
        sys.stdout.flush()
    if hosts_store:
        time.sleep(2 * PERIOD_SECONDS)  # the others have to see the claim in it
    os._exit(status)


def claim_failure(store: Store, rank: int) -> bool:
    """Is this rank the first to report a failure, so that it should print it?

    Raises:
        RuntimeError: the store is gone.
    """
    return store.compare_set(FAILURE, "", str(rank)).decode() == str(rank)


@contextmanager
def connecting(seconds: float, end: Callable[[str], None]) -> Iterator[None]:
    """If ranks that have met in the store do not reach each other in time, end with what is to be said.

    Args:
        seconds: how long that may take, if it is not less than `CONNECTING_SECONDS`.
    """
    seconds = max(seconds, CONNECTING_SECONDS)
    why = (
        f"could not connect to all other ranks within {seconds:g} s: is there a firewall between their "
        "hosts, or a wrong comm.interface?"
    )
    alarm = threading.Timer(seconds, end, [why])
    alarm.daemon = True
    alarm.start()
    try:
        yield
    finally:
        alarm.cancel()


class Watchdog:
    """Shares failures and signs of life through the job's store, on a thread and a connection of its own.

    The first rank to `claim` a failure prints it; every other rank that sees the claim ends silently. A rank
    whose process has ended is claimed as lost by the ranks of its host; one that gives no sign of life for
    `timeout_seconds`, by the rank that watches it: rank 0 watches all, all watch rank 0. Ranks blocked inside
    a collective end too, as the thread ends the process. A connection that is silent although both its ranks
    live fails a little later.

    Args:
        ranks: what the roll call has found, by rank.
        doing: what this rank is at, in words; told with each sign of life.
        launcher_hosts_store: the store lives in the launcher; else in rank 0.
    """

    def __init__(
        self,
        store: Store,
        ranks: Sequence[Presence],
        rank: int,
        timeout_seconds: float,
        doing: Callable[[], str],
        launcher_hosts_store: bool,
    ):
        self._store = store
        self._ranks = ranks
        self._rank = rank
        self._timeout_seconds = timeout_seconds
        self._doing = doing
        self._launcher_hosts_store = launcher_hosts_store
        self._hosts_store = rank == 0 and not launcher_hosts_store
        others = [other for other in range(len(ranks)) if other != rank]
        self._watched = others if rank == 0 else [0]
        self._stopped = threading.Event()
        self._reported = False
        self._patience = Patience(timeout_seconds + GRACE_SECONDS)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        store.set_timeout(timedelta(seconds=max(timeout_seconds, 10.0)))

    def start(self) -> None:
        """Begin to give and watch signs of life."""
        self._store.set(f"beat/{self._rank}", f"0 {self._doing()}")
        self._thread.start()

    def expects_connections(self) -> AbstractContextManager[None]:
        """End the job if ranks that have met in the store do not reach each other in time."""
        return connecting(self._timeout_seconds, lambda why: self._end(f"{self._ranks[self._rank]} {why}"))

    def stop(self) -> None:
        """End the thread, before the store goes away."""
        self._stopped.set()
        self._thread.join()

    def claim(self) -> bool:
        """Is this rank the first to report a failure, so that it should print it?"""
        self._reported = True
        try:
            return claim_failure(self._store, self._rank)
        except RuntimeError:
            return self._speaks_without_store()

    def explain_loss(self, seen: str) -> str:
        """What is to be said of a lost connection, once it is clear which rank is gone.

        Returns only where no other rank reports the failure meanwhile; else ends the process.

        Args:
            seen: what the library said.
        """
        self._reported = True
        before = self._beats()
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(0.1)
            self._leave_if_claimed()
            if gone := self._ended():
                return self._lost(gone, "its process has ended")
        after = self._beats()
        if after is None:
            return self._lost_store("is gone")
        silent = [r for r in self._ranks if before and after[r.rank] == before[r.rank] != b""]
        if silent:
            return self._lost(silent[0], f"{seen}; no sign of life for {GRACE_SECONDS:g} s")
        return (
            f"{self._ranks[self._rank]} lost a connection in {self._doing()}: {seen}; all ranks still give "
            "signs of life, so it is the network between them"
        )

    def _run(self) -> None:
        """Beat, look for a claimed failure, for ended processes and for silence; until stopped."""
        count, seen = 0, dict.fromkeys(self._watched, b"")
        changed = dict.fromkeys(self._watched, time.monotonic())
        while not self._stopped.wait(PERIOD_SECONDS):
            count += 1
            self._patience.ask()
            # Where the store's host is silent, so is the store: then this thread never returns from it.
            silent = f"has not answered for {self._timeout_seconds:g} s"
            alarm = threading.Timer(self._timeout_seconds, self._end, [self._lost_store(silent)])
            alarm.daemon = True
            alarm.start()
            try:
                self._store.set(f"beat/{self._rank}", f"{count} {self._doing()}")
                if self._reported:
                    continue  # the main thread is about to end the process; until then it is alive
                self._leave_if_claimed()
                beats = self._beats_of(self._watched)
            except RuntimeError:
                if not self._stopped.is_set():
                    self._end(self._lost_store("is gone"))
                return
            finally:
                alarm.cancel()
            if gone := self._ended():
                self._end(self._lost(gone, "its process has ended"))
            for rank in self._watched:
                if beats[rank] != seen[rank]:
                    seen[rank], changed[rank] = beats[rank], time.monotonic()
                elif time.monotonic() - changed[rank] > self._timeout_seconds:
                    why = f"no sign of life for {self._timeout_seconds:g} s"
                    self._end(self._lost(self._ranks[rank], why))

    def _ended(self) -> Presence | None:
        """A rank of this host whose process has ended: nobody leaves in order before all watchdogs stop."""
        machine = self._ranks[self._rank].machine
        return next((rank for rank in self._ranks if rank.has_ended(machine)), None)

    def _lost(self, lost: Presence, why: str) -> str:
        """The message; what the rank was doing is as of its last sign of life."""
        try:
            doing = self._beats_of([lost.rank])[lost.rank].decode().partition(" ")[2]
        except RuntimeError:
            return self._lost_store("is gone")
        return f"{lost} was lost in {doing}: {why}"

    def _lost_store(self, how: str) -> str:
        """The message where the store cannot be asked; what was being done is what this rank does."""
        if self._launcher_hosts_store:
            here = f"{self._ranks[self._rank]} lost its launcher in {self._doing()}"
            return f"{here}: the job's store, which is there, {how}"
        ended = self._ranks[0].has_ended(self._ranks[self._rank].machine)
        why = "its process has ended" if ended else f"the job's store, which is there, {how}"
        return f"{self._ranks[0]} was lost in {self._doing()}: {why}"

    def _beats(self) -> list[bytes] | None:
        """The last sign of life of every rank; None where the store does not answer."""
        try:
            beats = self._beats_of(range(len(self._ranks)))
        except RuntimeError:
            return None
        return [beats[rank] for rank in range(len(self._ranks))]

    def _beats_of(self, ranks: Sequence[int]) -> dict[int, bytes]:
        keys = {rank: f"beat/{rank}" for rank in ranks}
        return {rank: self._store.get(key) if self._store.check([key]) else b"" for rank, key in keys.items()}

    def _leave_if_claimed(self) -> None:
        """End silently where another rank reports a failure."""
        try:
            claimed = self._store.check([FAILURE])
        except RuntimeError:
            return  # the thread, or the end of the grace, sees it
        if claimed:
            leave(1, self._hosts_store)

    def _speaks_without_store(self) -> bool:
        """Without a store nobody can be asked: the first rank of each host that is left speaks."""
        machine = self._ranks[self._rank].machine
        here = [r.rank for r in self._ranks if r.rank > 0 and r.machine == machine]
        return machine is None or self._rank == min(here, default=0)

    def _end(self, message: str) -> None:
        if self._reported:
            return  # the main thread is about to end the process
        # A silent store answers no claim.
        last_resort = threading.Timer(GRACE_SECONDS, self._leave, [message, self._speaks_without_store])
        last_resort.daemon = True
        last_resort.start()
        self._leave(message, self.claim)

    def _leave(self, message: str, speaks: Callable[[], bool]) -> NoReturn:
        if speaks():
            print(f"fslsage_rpc: {message}", file=sys.stderr, flush=True)
        leave(1, self._hosts_store)
