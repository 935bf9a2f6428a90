"""Signs of life: how each rank learns through the job's store who failed, or is lost, and what follows."""

import os
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from typing import NoReturn, TypeVar

from torch.distributed import Store

from fslsage_rpc.job.connections import Patience
from fslsage_rpc.job.roll_call import FAILURE, Presence, claim_failure

Told = TypeVar("Told")

PERIOD_SECONDS = 1.0
CONNECTING_SECONDS = 30.0
"""how long connecting may take at least"""
GRACE_SECONDS = 3.0
"""how long a rank that lost a connection waits for the guilty rank's own message, and for signs of life.
A rank that ends waits so long for the store."""
ENDED = "its process has ended"


class Clock:
    """Time as it passes; tests have one that they advance."""

    def now(self) -> float:
        """Seconds from some moment on."""
        return time.monotonic()

    def wait(self, seconds: float, happening: threading.Event | threading.Condition | None = None) -> None:
        """Let so much time pass, less if that happens."""
        (happening or threading.Event()).wait(seconds)

    @contextmanager
    def alarm(self, seconds: float, action: Callable[[], None]) -> Iterator[None]:
        """Act, on another thread, if the context has not ended by then."""
        timer = threading.Timer(seconds, action)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def within(self, seconds: float, question: Callable[[], Told]) -> Told | None:
        """The answer, asked for on another thread; None where it comes too late, or is a RuntimeError."""
        answers = []

        def ask() -> None:
            with suppress(RuntimeError):
                answers.append(question())

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(seconds)
        return answers[0] if answers else None


def leave(status: int, hosts_store: bool) -> NoReturn:
    """End the process at once: sys.exit would wait for threads that wait for ranks that are gone."""
    with suppress(OSError):  # nobody reads it any more
        sys.stdout.flush()
    if hosts_store:
        time.sleep(2 * PERIOD_SECONDS)  # the others have to see the claim in it
    os._exit(status)


class Policy(ABC):
    """Decides what follows from a loss. Whatever asks the store raises a RuntimeError where that is gone.

    Attributes:
        signs: whose policy this is.
        speaker: begins what this process says of itself.
        processes: the ranks whose processes may be seen to end.
    """

    signs: "SignsOfLife"
    speaker: str
    processes: Sequence[Presence] = ()
    period_seconds = PERIOD_SECONDS

    def bind(self, signs: "SignsOfLife") -> None:
        """Take part, before the first sign of life."""
        self.signs = signs

    def look(self) -> None:  # noqa: B027 (there may be nothing)
        """Look for more than signs of life; in each period, on their thread."""

    @abstractmethod
    def lost(self, rank: int, why: str) -> None:
        """Act on a rank that is silent, or whose process has ended; on that thread."""

    @abstractmethod
    def lost_store(self, error: RuntimeError | None) -> str:
        """Say that the store is gone, or, without an error, silent."""

    @abstractmethod
    def speaks_without_store(self) -> bool:
        """Is this the rank to report a failure where no claim is answered?"""

    @abstractmethod
    def explain_loss(self, seen: str) -> str:
        """Say what is behind a connection lost on the main thread, of which the library said that.

        Returns only where no other rank reports the failure meanwhile; else the process ends.
        """

    def farewell(self, message: str) -> str | None:
        """Say what replaces the message where the others go on without this process: that claims nothing."""
        return None


class SignsOfLife:
    """Gives and watches signs of life through the job's store, on a thread and a connection of its own.

    The first rank to `claim` a failure prints it; every other rank that sees the claim ends silently. What
    follows where a rank gives no sign of life for `silence_seconds`, or its process has ended, is the
    policy's to say. Ranks blocked inside a collective end too, as the thread ends the process. A connection
    that is silent although both its ranks live fails a little later.

    Attributes:
        reported: the process is about to be ended; until then it is alive, but looks for nothing more.

    Args:
        here: this process, with its rank as the job was started.
        doing: what this rank is at, in words; told with each sign of life.
        leave: ends the process with a status.
    """

    def __init__(
        self,
        store: Store,
        here: Presence,
        timeout_seconds: float,
        doing: Callable[[], str],
        policy: Policy,
        leave: Callable[[int], NoReturn],
        clock: Clock | None = None,
    ):
        self.store = store
        self.here = here
        self.timeout_seconds = self.silence_seconds = timeout_seconds
        self.doing = doing
        self.policy = policy
        self.clock = clock or Clock()
        self.reported = self._ending = False
        self.wake = threading.Event()
        self._leave = leave
        self._watched: dict[int, tuple[bytes, float]] = {}  # the last sign of life, and when it came
        self._count = 0
        self._ends = threading.RLock()  # held by the thread that ends the process, for good
        self._stopped = threading.Event()
        self._patience = Patience(timeout_seconds + GRACE_SECONDS)
        self._thread = threading.Thread(target=self._run, name="signs of life", daemon=True)
        store.set_timeout(timedelta(seconds=max(timeout_seconds, 10.0)))
        policy.bind(self)

    def start(self) -> None:
        """Begin to give and watch signs of life."""
        self._beat()
        self._thread.start()

    def stop(self) -> None:
        """End the thread, before the store goes away."""
        self._stopped.set()
        self.wake.set()
        self._thread.join()

    def watch(self, ranks: Iterable[int]) -> None:
        """Look for the silence of these ranks and no others; of those watched before, go on."""
        known, never = self._watched, (b"", self.clock.now())
        self._watched = {rank: known.get(rank, never) for rank in ranks}

    def beat_of(self, rank: int) -> bytes:
        """A rank's last sign of life; nothing where it has given none."""
        key = f"beat/{rank}"
        return self.store.get(key) if self.store.check([key]) else b""

    def ended(self) -> Presence | None:
        """A rank of this host whose process has ended: nobody leaves in order before all threads stop."""
        return next((rank for rank in self.policy.processes if rank.has_ended(self.here.machine)), None)

    def expects_connections(self, seconds: float) -> AbstractContextManager[None]:
        """End the job if ranks do not reach each other in so long, and not in `CONNECTING_SECONDS`."""
        seconds = max(seconds, CONNECTING_SECONDS)
        why = (
            f"could not connect to all other ranks within {seconds:g} s: is there a firewall between their "
            "hosts, or a wrong comm.interface?"
        )
        return self.clock.alarm(seconds, lambda: self.end(f"{self.policy.speaker} {why}"))

    def claim(self) -> bool:
        """Is this rank the first to report a failure, so that it should print it?"""
        self.leave_the_end_to_caller()
        # A silent store answers no claim.
        claimed = self.clock.within(GRACE_SECONDS, lambda: claim_failure(self.store, self.here.rank))
        return self.policy.speaks_without_store() if claimed is None else claimed

    def leave_the_end_to_caller(self) -> None:
        """Let no other thread end the process any more. Where one is at that already, it ends here."""
        with self._ends:
            self.reported = True

    def leave_if_claimed(self) -> None:
        """End silently where another rank reports a failure."""
        if self.store.check([FAILURE]) and not self._ending:  # else it is this one, which has yet to speak
            self._leave(1)

    def end(self, message: str) -> None:
        """End the process, and the job, with this message if no other rank has reported a failure.

        Returns only where the process is about to be ended anyway.
        """

        def last_words() -> str:
            farewell = self.policy.farewell(message)
            return farewell or (message if claim_failure(self.store, self.here.rank) else "")

        with self._ends:
            if self.reported:
                return
            self.reported = self._ending = True
            words = self.clock.within(GRACE_SECONDS, last_words)
            if words is None and self.policy.speaks_without_store():
                words = message
            if words:
                print(f"fslsage_rpc: {words}", file=sys.stderr, flush=True)
            self._leave(1)

    def period(self) -> None:
        """Give a sign of life, and look for what may have happened since the last."""
        self._patience.ask()
        try:
            # Where the store's host is silent, so is the store: then this thread never returns from it.
            with self.clock.alarm(self.timeout_seconds, lambda: self.end(self.policy.lost_store(None))):
                self._beat()
                if not self.reported:
                    self.leave_if_claimed()
                    self.policy.look()
                    self._look_for_losses()
        except RuntimeError as error:
            if not self._stopped.is_set():
                self.end(self.policy.lost_store(error))
            self._stopped.set()  # nothing more is heard

    def _run(self) -> None:
        while not self._stopped.is_set():
            self.clock.wait(self.policy.period_seconds, self.wake)
            self.wake.clear()
            if not self._stopped.is_set():
                self.period()

    def _beat(self) -> None:
        self.store.set(f"beat/{self.here.rank}", f"{self._count} {self.doing()}")
        self._count += 1

    def _look_for_losses(self) -> None:
        if gone := self.ended():
            self.policy.lost(gone.rank, ENDED)
        watched = self._watched  # another thread may put another in its place
        for rank, (last, came) in watched.items():
            beat = self.beat_of(rank)
            if beat != last:
                watched[rank] = beat, self.clock.now()
            elif self.clock.now() - came > self.silence_seconds:
                self.policy.lost(rank, f"no sign of life for {self.silence_seconds:g} s")


class EndTheJob(Policy):
    """One message, and the end of all ranks.

    A rank whose process has ended is claimed as lost by the ranks of its host. One that gives no sign of life
    is, by the rank that watches it: rank 0 watches all, all watch rank 0.

    Args:
        ranks: what the roll call has found, by rank.
        launcher_hosts_store: the store lives in the launcher; else in rank 0.
    """

    def __init__(self, ranks: Sequence[Presence], launcher_hosts_store: bool):
        self.processes = ranks
        self._launcher_hosts_store = launcher_hosts_store

    def bind(self, signs: SignsOfLife) -> None:
        super().bind(signs)
        self.speaker = str(signs.here)
        signs.watch(range(1, len(self.processes)) if signs.here.rank == 0 else [0])

    def lost(self, rank: int, why: str) -> None:
        self.signs.end(self._loss(self.processes[rank], why))

    def lost_store(self, error: RuntimeError | None) -> str:
        # Nobody can be asked: what was being done is what this rank does.
        how = "is gone" if error else f"has not answered for {self.signs.timeout_seconds:g} s"
        why = f"the job's store, which is there, {how}"
        if self._launcher_hosts_store:
            return f"{self.speaker} lost its launcher in {self.signs.doing()}: {why}"
        server = self.processes[0]
        ended = server.has_ended(self.signs.here.machine)
        return f"{server} was lost in {self.signs.doing()}: {ENDED if ended else why}"

    def speaks_without_store(self) -> bool:
        # The first rank of each host that is left.
        rank, machine = self.signs.here.rank, self.signs.here.machine
        here = [r.rank for r in self.processes if r.rank > 0 and r.machine == machine]
        return machine is None or rank == min(here, default=0)

    def explain_loss(self, seen: str) -> str:
        signs, clock = self.signs, self.signs.clock
        signs.leave_the_end_to_caller()
        before = clock.within(GRACE_SECONDS, self._beats)
        deadline = clock.now() + GRACE_SECONDS
        while clock.now() < deadline:
            clock.wait(0.1)
            clock.within(GRACE_SECONDS, signs.leave_if_claimed)
            if gone := signs.ended():
                return self._loss(gone, ENDED)
        after = clock.within(signs.timeout_seconds, self._beats)
        if not isinstance(after, list):
            return self.lost_store(after)
        known = before if isinstance(before, list) else [b""] * len(after)
        silent = [r for r in self.processes if after[r.rank] == known[r.rank] != b""]
        if silent:
            return self._loss(silent[0], f"{seen}; no sign of life for {GRACE_SECONDS:g} s")
        return (
            f"{self.speaker} lost a connection in {signs.doing()}: {seen}; all ranks still give "
            "signs of life, so it is the network between them"
        )

    def _loss(self, lost: Presence, why: str) -> str:
        """The message; what the rank was doing is as of its last sign of life."""
        try:
            doing = self.signs.beat_of(lost.rank).decode().partition(" ")[2]
        except RuntimeError as error:
            return self.lost_store(error)
        return f"{lost} was lost in {doing}: {why}"

    def _beats(self) -> list[bytes] | RuntimeError:
        """The last sign of life of every rank, or why the store cannot be asked."""
        try:
            return [self.signs.beat_of(rank.rank) for rank in self.processes]
        except RuntimeError as error:
            return error
